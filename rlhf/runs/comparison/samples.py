"""The prompts with every method's responses, as the page's script reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.runs.comparison.methods import Method

# The page stays readable on a phone: of more text the prompts with the largest disagreement are kept.
MOST_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class Samples:
    """What the browser of samples shows: `body` is plain data; `num_prompts` of `num_all` are in it."""

    body: Mapping[str, Any]
    num_prompts: int
    num_all: int


def collect_samples(methods: Sequence[Method], *, most_characters: int = MOST_CHARACTERS) -> Samples:
    """All prompts of the methods' evaluations in their order, those with the largest disagreement first to stay.

    The disagreement of a prompt is the largest method's mean score less the smallest one's.
    """
    prompts = {
        name: answered.prompt for method in methods for run in method.runs for name, answered in run.answers.items()
    }
    rows: list[dict[str, Any]] = []
    for number, (name, prompt) in enumerate(prompts.items()):
        responses = [
            [_response(run.answers[name].own) if name in run.answers else None for run in method.runs]
            for method in methods
        ]
        means = [_mean(of_method) for of_method in responses]
        known = [mean for mean in means if mean is not None]
        gap = max(known) - min(known) if len(known) > 1 else None
        rows.append({"n": number, "prompt": _prompt(prompt), "responses": responses, "means": means, "gap": gap})
    kept: list[dict[str, Any]] = []
    used = 0
    for row in sorted(rows, key=lambda row: -math.inf if row["gap"] is None else row["gap"], reverse=True):
        used += len(json.dumps(row))
        if used > most_characters and kept:
            break
        kept.append(row)
    kept.sort(key=lambda row: row["n"])
    body = {
        "methods": [method.name for method in methods],
        "seeds": [[run.seed for run in method.runs] for method in methods],
        "rows": kept,
    }
    return Samples(body, len(kept), len(rows))


def to_script(body: Mapping[str, Any]) -> str:
    """JSON that can stand inside a script element: ASCII, with no character that could end it or begin markup."""
    text = json.dumps(body, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _response(response: Any) -> dict[str, Any]:
    return {"text": response.text.lstrip(" "), **{name: round(value, 4) for name, value in response.numbers.items()}}


def _mean(responses: Sequence[Mapping[str, Any] | None]) -> float | None:
    scores = [one["score"] for one in responses if one is not None and "score" in one]
    return math.fsum(scores) / len(scores) if scores else None


def _prompt(prompt: Any) -> list[list[str]]:
    """Turns as [role, text]; a plain prompt has no role."""
    if isinstance(prompt, list):
        return [
            [str(turn.get("role", "")), str(turn.get("content", ""))] for turn in prompt if isinstance(turn, Mapping)
        ]
    return [["", str(prompt if prompt is not None else "")]]
