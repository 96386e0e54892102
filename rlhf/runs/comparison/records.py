"""What a comparison reads of a run: its config, results, metrics and responses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf.runs import results
from rlhf.runs.folder import RunFolder
from rlhf.runs.jsonable import read_json, read_lines
from rlhf.runs.manifest import read_manifest
from rlhf.runs.results import Estimate

RESPONSES_FILE = "responses.jsonl"
EVALUATE = "evaluate"
# Numbers of a response that methods are compared by, the judge's score first.
MEASURES = ("score", "reward_model_score", "kl", "length")


@dataclass(frozen=True)
class Response:
    """A response with its numbers: `score` (the judge's), `reward_model_score`, `kl` (nats), `length` (tokens)."""

    text: str
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class Answered:
    """A prompt with the run's response and that of its baseline."""

    prompt: Any
    own: Response
    baseline: Response | None


@dataclass(frozen=True)
class Run:
    """A run folder as it is now. Pieces that are missing or cannot be read are empty."""

    folder: RunFolder
    label: str | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, label: str | None = None) -> Run:
        """The run at `path`."""
        folder = RunFolder(path)
        return cls(folder, label, read_manifest(folder))

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved config."""
        config = self.manifest.get("config")
        return config if isinstance(config, dict) else {}

    @property
    def seed(self) -> int | None:
        """The seed; None when the manifest does not tell."""
        seed = self.manifest.get("seed", self.config.get("seed"))
        return seed if isinstance(seed, int) else None

    @property
    def status(self) -> str:
        """The manifest's status."""
        return str(self.manifest.get("status") or "unknown")

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that the config lists."""
        stages = self.config.get("stages")
        return tuple(str(stage) for stage in stages) if isinstance(stages, list | tuple) else ()

    @cached_property
    def summaries(self) -> dict[str, Mapping[str, Any]]:
        """The key results of each finished stage."""
        folders = sorted(path for path in self.folder.stages.glob("*") if path.is_dir())
        found = {path.name: self.folder.stage(path.name).read_result() for path in folders}
        return {name: result.summary for name, result in found.items() if result is not None}

    @cached_property
    def results(self) -> dict[str, Estimate]:
        """All results by `stage/name`. Of the evaluation the policy's: `evaluate/gold_score`, not the baseline's."""
        found: dict[str, Estimate] = {}
        for stage, summary in self.summaries.items():
            if stage == EVALUATE:
                found |= {f"{stage}/{row.name}": row.after for row in results.comparisons(summary)}
                continue
            for name, value in summary.items():
                one = results.estimate(value)
                if one is not None and not name.startswith("num_"):
                    found[f"{stage}/{name}"] = one
        return found

    @property
    def judge(self) -> str | None:
        """Who judged the responses."""
        summary = self.summaries.get(EVALUATE, {})
        judge, model = summary.get("judge"), summary.get("judge_model")
        return None if judge is None else f"{judge} ({model})" if model else str(judge)

    @property
    def baseline(self) -> str | None:
        """What the policy was judged against: the hash of the baseline's content, as the stage recorded it."""
        decided = read_json(self.folder.stage(EVALUATE).decided_by)
        inputs = decided.get("inputs") if isinstance(decided, dict) else None
        return str(inputs["baseline"]) if isinstance(inputs, dict) and "baseline" in inputs else None

    @property
    def data_content(self) -> str | None:
        """The hash of the data that the run read; None when the manifest does not tell."""
        data = self.manifest.get("data")
        return str(data["hash"]) if isinstance(data, dict) and data.get("hash") else None

    @cached_property
    def metrics(self) -> dict[str, list[tuple[int, dict[str, float]]]]:
        """Of each stage its logged steps in order, each with its finite numbers."""
        found: dict[str, dict[int, dict[str, float]]] = {}
        for entry in read_lines(self.folder.metrics):
            stage, step = entry.get("stage"), entry.get("step")
            if not isinstance(stage, str) or not isinstance(step, int) or isinstance(step, bool):
                continue
            numbers = {
                name: one.value for name, value in entry.items() if "/" in name and (one := results.estimate(value))
            }
            found.setdefault(stage, {}).setdefault(step, {}).update(numbers)
        return {stage: sorted(steps.items()) for stage, steps in found.items()}

    @cached_property
    def answers(self) -> dict[str, Answered]:
        """The evaluation's prompts by id. Of a run without responses.jsonl those of its sample table."""
        found = {}
        for entry in read_lines(self.folder.stage(EVALUATE).path / RESPONSES_FILE):
            own = _response(entry.get("policy"))
            if own is not None:
                found[str(entry.get("prompt_id"))] = Answered(
                    entry.get("prompt"), own, _response(entry.get("baseline"))
                )
        return found or self._shown_answers()

    @property
    def has_all_responses(self) -> bool:
        """Whether every response was kept, and not only those of the sample table."""
        return (self.folder.stage(EVALUATE).path / RESPONSES_FILE).is_file()

    def _shown_answers(self) -> dict[str, Answered]:
        found = {}
        for entry in read_lines(self.folder.samples):
            if entry.get("stage") != EVALUATE:
                continue
            sides = [
                _response({"response": entry.get(f"{role}_response"), "score": entry.get(f"{role}_score")})
                for role in ("policy", "baseline")
            ]
            if sides[0] is not None:
                found[prompt_id(entry.get("prompt"))] = Answered(entry.get("prompt"), sides[0], sides[1])
        return found


def prompt_id(prompt: Any) -> str:
    """The id that stage evaluate gives a prompt: the beginning of the hash of its canonical JSON."""
    text = json.dumps(prompt, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", errors="backslashreplace")).hexdigest()[:16]


def short_names(paths: Sequence[Path]) -> list[str]:
    """The ends of the paths that tell them apart, at least the last name."""
    parts = [path.resolve().parts for path in paths]
    for size in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(one[-size:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(one) for one in parts]


def _response(side: Any) -> Response | None:
    if not isinstance(side, Mapping) or not isinstance(side.get("response"), str):
        return None
    numbers = {name: one.value for name in MEASURES if (one := results.estimate(side.get(name))) is not None}
    return Response(side["response"], numbers)
