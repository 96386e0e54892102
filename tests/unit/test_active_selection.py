"""The study active_selection: what it counts, how it chooses and labels, and that it trains as the stage does."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rlhf.config import RLHFConfig
from rlhf.config.active_selection import ActiveSelectionConfig
from rlhf.data.embedded import gold_reward
from rlhf.distributed.runtime import Runtime
from rlhf.errors import ConfigError, DataError
from rlhf.pipeline import decided_by, preflight, resolve_inputs
from rlhf.records import Comparison, dump_line, read_records
from rlhf.runs.exhibits import Exhibits
from rlhf.runs.folder import RunFolder
from rlhf.stages import reward_model
from rlhf.stages.reward_members import member_seed
from rlhf.studies import active_selection
from rlhf.studies.active_curves import Curve, Point
from rlhf.studies.active_pool import Pool, PoolMaker
from rlhf.studies.active_training import RewardLearner
from tests.collect_example import collect_config, write_policy
from tests.stage_example import make_context, metrics_of

SMALL: dict[str, Any] = {
    "num_seeds": 1,
    "num_labels": (6, 12, 18),
    "num_prompts": 8,
    "num_responses": 3,
    "num_test_pairs": 12,
    "num_members": 2,
}


def small_config(section: dict[str, Any] | None = None, **sections: Any) -> RLHFConfig:
    sections.setdefault("reward_model", {"batch_size": 4, "num_epochs": 2, "learning_rate": 1e-2})
    return collect_config(stages=("active_selection",), active_selection=SMALL | (section or {}), **sections)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_policy(tmp_path_factory.mktemp("policy"))


# --- the config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"strategies": ("near_tie",)}, "lacks random"),
        ({"strategies": ("random", "random")}, "lists a value twice"),
        ({"target_accuracies": (0.7, 0.7)}, "lists a value twice"),
        ({"num_responses": 2}, "at least 3 responses"),
        ({"num_labels": (100, 50)}, "ascends"),
        ({"num_labels": (10, 200), "num_prompts": 60, "num_responses": 3}, "are 180 pairs"),
        ({"target_accuracies": (0.4,)}, "greater than 0.5"),
    ],
)
def test_settings_that_make_no_study_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ActiveSelectionConfig.model_validate(values)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"type": "files", "path": "nowhere"}}, "data=embedded"),
        ({"preferences": {"annotator": {"type": "human"}}}, "simulated annotators who see the gold reward"),
        ({"preferences": {"kind": "rating"}}, "preferences.kind=pairwise"),
        ({"preferences": {"labels_per_task": 2}}, "preferences.labels_per_task=1"),
        ({"preferences": {"selection": {"type": "diversity"}}}, "preferences.selection.type=random"),
        ({"reward_model": {"loss": {"type": "kwise"}}}, "single reward models on pairs"),
        ({"reward_model": {"num_members": 2}}, "active_selection.num_members"),
        ({"zero": {"stage": 1}}, "without sharding"),
        ({"peft": {"type": "lora"}}, "without sharding"),
        ({"distributed": {"device": "cpu", "num_processes": 2}}, "one process, not on 2"),
    ],
)
def test_what_the_study_cannot_do_is_refused_before_anything_runs(
    sections: dict[str, Any], said: str, tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.data.preflight", lambda data: None)
    monkeypatch.setattr("rlhf.pipeline.check_user_entries", lambda config: None)
    with pytest.raises(ConfigError, match=said):
        preflight(small_config({"policy": policy}, **sections), RunFolder(tmp_path))


def test_a_launcher_of_several_processes_is_refused_too(policy: str, tmp_path: Path) -> None:
    runtime = Runtime(rank=0, world_size=2, local_rank=0, device=torch.device("cpu"), precision="fp32")
    with pytest.raises(ConfigError, match="one process, not on 2"):
        active_selection.run(make_context(small_config(), tmp_path, "active_selection", {}, runtime))


def test_inputs_and_what_decides_the_result(tmp_path: Path, policy: str) -> None:
    run = RunFolder(tmp_path)
    config = small_config({"policy": policy})
    assert resolve_inputs(config, run, "active_selection") == {"policy": policy, "base": policy}
    other = config.model_copy(update={"reward_model": config.reward_model.model_copy(update={"base": "elsewhere"})})
    assert resolve_inputs(other, run, "active_selection")["base"] == "elsewhere"
    with pytest.raises(ConfigError, match=r"active_selection\.policy"):
        resolve_inputs(small_config(), run, "active_selection")

    def decisive(**sections: Any) -> str:
        changed = small_config({"policy": policy}, **sections)
        return json.dumps(decided_by(changed, run, "active_selection", {}, ""), sort_keys=True)

    found = {
        decisive(),
        decisive(preferences={"annotator": {"type": "simulated", "temperature": 0.1}}),
        decisive(preferences={"annotator": {"type": "simulated", "reward": {"type": "gold", "weight": 2.0}}}),
        decisive(collect={"sampling": {"temperature": 0.9}}),
        decisive(reward_model={"learning_rate": 0.5}),
    }
    assert len(found) == 5
    assert decisive(reward_model={"save_every": 3}) == decisive(reward_model={"log_every": 4})


# --- training ---------------------------------------------------------------------------------------------------------


def write_rows(folder: Path) -> str:
    """21 comparisons for training, 5 for the others; a word decides."""
    folder.mkdir()
    for split, size in (("train", 21), ("validation", 5), ("test", 5)):
        rows = [
            Comparison(f"the {split} film {n}", f"was good{' and fine' * (n % 3)}", f"was bad{' and dull' * (n % 4)}")
            for n in range(size)
        ]
        (folder / f"{split}.jsonl").write_text("".join(dump_line(row) + "\n" for row in rows))
    return str(folder)


@pytest.mark.parametrize(
    "values",
    [
        # TRL's trainer; then ours, on the members of an ensemble.
        {"warmup_steps": 2, "adam_beta2": 0.98, "weight_decay": 0.1},
        {
            "num_members": 2,
            "bootstrap": True,
            "center_coefficient": 0.05,
            "schedule": "linear",
            "max_grad_norm": 0.3,
            "micro_batch_size": 2,
            "loss": {"type": "bradley_terry", "label_smoothing": 0.1},
        },
    ],
)
def test_it_trains_as_the_stage_does(values: dict[str, Any], policy: str, tmp_path: Path) -> None:
    """The held-out scores are the stage's but for rounding, and training has moved them far from the first ones."""
    section = {"batch_size": 4, "num_epochs": 2, "learning_rate": 1e-2, **values}
    config = small_config(reward_model=section)
    inputs = {"base": policy, "comparisons": write_rows(tmp_path / "rows")}
    reward_model.run(make_context(config, tmp_path / "run", "reward_model", inputs))
    lines = (tmp_path / "run/stages/reward_model/held_out_scores.jsonl").read_text().splitlines()
    held_out = [json.loads(line) for line in lines]
    rows = read_records(tmp_path / "rows/train.jsonl", Comparison)
    learner = RewardLearner(make_context(config, tmp_path / "other", "active_selection"), policy)
    sides = [(line["comparison"]["prompt"], line["comparison"][side]) for line in held_out for side in SIDES]
    texts = learner.encode(sides)
    before = learner.scores(texts)
    for number in range(values.get("num_members", 1)):
        learner.train(rows[:3], seed=9)  # must leave nothing behind
        learner.train(rows, seed=member_seed(config.seed, number), bootstrap=bool(values.get("bootstrap")))
        expected = [line[f"{side}_scores"][number] for line in held_out for side in SIDES]
        found = learner.scores(texts)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert np.abs(found - before).max() > 0.1


SIDES = ("chosen", "rejected")


# --- the study --------------------------------------------------------------------------------------------------------


def run_study(folder: Path, policy: str, section: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    inputs = {"policy": policy, "base": policy}
    context = make_context(small_config(section, **sections), folder, "active_selection", inputs)
    return active_selection.run(context).summary


def curves_in(folder: Path) -> dict[str, tuple[Point, ...]]:
    found = {}
    for path in sorted((folder / "stages/active_selection/curves").glob("*.json")):
        curve = Curve.read(path)
        assert curve is not None
        found[path.stem] = curve.points
    return found


@pytest.fixture(scope="module")
def study(policy: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished study."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "summary.json").write_text(json.dumps(run_study(folder, policy)))
    return folder


def test_the_study_from_end_to_end(study: Path) -> None:
    curves, summary = curves_in(study), json.loads((study / "summary.json").read_text())
    names = ("best_worst", "disagreement", "diversity", "near_tie", "random")
    assert sorted(curves) == [f"seed-1-{name}" for name in names]
    # The first labels are the same for all, and later ones are not: the strategies ask different pairs.
    assert len({own[0] for own in curves.values()}) == 1
    assert [point.labels for point in curves["seed-1-random"]] == [6, 12, 18]
    assert len({own[1:] for own in curves.values()}) > 2
    assert summary["accuracy_random"] == curves["seed-1-random"][-1].accuracy
    shown = Exhibits.read(study / "stages/active_selection")
    assert shown is not None
    assert len(shown.figures[0].panels[0].lines) == 5
    rows = list(csv.DictReader((study / "stages/active_selection/curves.csv").open()))
    assert len(rows) == 15
    last = {"seed": "1", "strategy": "random", "labels": "18"}
    (row,) = [row for row in rows if last.items() <= row.items()]
    assert float(row["accuracy"]) == curves["seed-1-random"][-1].accuracy
    lines = metrics_of(study, "active_selection")
    assert [line["step"] for line in lines] == list(range(1, 16))
    assert lines[-1]["active_selection/accuracy/diversity"] == curves["seed-1-diversity"][-1].accuracy


def test_a_restart_measures_what_is_missing_to_the_same_numbers(
    study: Path, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    (folder / "stages/active_selection/curves/seed-1-disagreement.json").unlink()
    trained: list[int] = []
    whole = RewardLearner.train

    def train(self: RewardLearner, comparisons: Sequence[Comparison], **settings: Any) -> None:
        trained.append(len(comparisons))
        whole(self, comparisons, **settings)

    monkeypatch.setattr(RewardLearner, "train", train)
    summary = run_study(folder, policy)
    assert summary == json.loads((study / "summary.json").read_text())
    assert curves_in(folder) == curves_in(study)
    # Three rounds, and two members before each of the second and the third.
    assert trained == [6, 6, 6, 12, 12, 12, 18]
    assert metrics_of(folder, "active_selection") == metrics_of(study, "active_selection")


def test_every_setting_of_the_pool_counts(policy: str, tmp_path: Path) -> None:
    """Other prompts, responses and test pairs, and other seeds: each is another pool; the same config the same one."""

    def made(seed: int = 1, **section: Any) -> Pool:
        config = small_config(section)
        context = make_context(config, tmp_path, "active_selection", {"policy": policy})
        return PoolMaker(context, lambda text: None).make(seed)

    pool = made()
    again, other = made(), made(seed=2)
    assert (pool.texts, pool.test, pool.shuffle.tolist()) == (again.texts, again.test, again.shuffle.tolist())
    assert pool.texts != other.texts
    assert pool.test != other.test
    assert len(pool.texts) == len(pool.embeddings) == 8 * 3
    assert len(pool.candidates) <= 8 * 3
    assert 0 < len(pool.test) <= 12
    for (prompt, better), (same, worse) in pool.test:
        assert prompt == same
        assert gold_reward(prompt, better) > gold_reward(prompt, worse)
    assert len(made(num_prompts=7).texts) == 21
    assert len(made(num_responses=4).texts) == 32
    assert len(made(num_test_pairs=3).test) <= 3
    # All prompts are there before one comes twice, and then it has other responses.
    twice = made(num_prompts=20)
    assert len({prompt for prompt, _ in twice.texts}) == 10
    groups = [tuple(twice.texts[place] for place in group) for group in twice.groups]
    assert len(set(groups)) > 10


def test_a_pool_of_equal_responses_is_refused(policy: str, tmp_path: Path) -> None:
    config = small_config(
        {"num_labels": (6, 24)}, collect={"sampling": {"max_response_tokens": 1, "temperature": 1e-3}}
    )
    context = make_context(config, tmp_path, "active_selection", {"policy": policy, "base": policy})
    with pytest.raises(DataError, match=r"raise active_selection\.num_prompts"):
        active_selection.run(context)


def test_the_ensemble_and_the_annotators_count(policy: str, study: Path, tmp_path: Path) -> None:
    """Members, their bootstrap and the labels' noise change what is chosen or learnt; the measured recipe stays."""
    section = {"strategies": ("random", "disagreement")}
    run_study(tmp_path / "b", policy, {**section, "bootstrap": False})
    run_study(tmp_path / "c", policy, {**section, "num_members": 3})
    noisy = {"annotator": {"type": "simulated", "flip_share": 0.5}}
    run_study(tmp_path / "d", policy, {"strategies": ("random",)}, preferences=noisy)
    found = [curves_in(folder) for folder in (study, tmp_path / "b", tmp_path / "c")]
    assert len({curves["seed-1-random"] for curves in found}) == 1
    assert len({curves["seed-1-disagreement"] for curves in found}) == 3
    assert curves_in(tmp_path / "d")["seed-1-random"] != found[0]["seed-1-random"]
