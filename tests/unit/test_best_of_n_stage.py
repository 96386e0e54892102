"""Stage best_of_n on a tiny policy and reward model: scores, curves by brute force, its files, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlhf.config import RLHFConfig
from rlhf.config.best_of_n import BestOfNConfig, best_of_n_rewards
from rlhf.config.data import FileData, SplitConfig
from rlhf.config.root import PIPELINE
from rlhf.data import load_demonstrations
from rlhf.data.embedded import gold_reward
from rlhf.errors import ConfigError
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.models.scalar import ScalarModel, response_scores
from rlhf.pipeline import plan_stage, preflight, resolve_inputs
from rlhf.records import prompt_from_json
from rlhf.rewards.protocol import RewardError
from rlhf.runs.exhibits import Exhibits
from rlhf.runs.folder import RunFolder
from rlhf.stages import best_of_n
from rlhf.stages.sampling import decode_responses, load_encoded_prompts, sample_batch
from tests.collect_example import collect_config, write_policy, write_reward_model
from tests.stage_example import make_context, metrics_of

PROMPTS, SAMPLES = 6, 5
FILES = ["best.jsonl", "best_of_n.csv", "best_of_n.svg", "curve.json", "exhibits.json", "scores.jsonl"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`policy` and `reward_model`, and a run of the stage in `run`: two rewards that pick, gold judges."""
    folder = tmp_path_factory.mktemp("best-of-n")
    write_reward_model(folder, write_policy(folder))
    run_stage(folder, "run")
    return folder


def config_of(models: Path, **values: Any) -> RLHFConfig:
    section = {
        "num_prompts": PROMPTS,
        "num_samples": SAMPLES,
        "sampling": {"max_response_tokens": 8, "batch_size": 16},
        "bootstrap_resamples": 50,
        "rewards": {
            "learned": {"type": "model", "path": str(models / "reward_model")},
            "brief": {"type": "length", "maximum": 1, "tolerance": 8},
        },
        **values,
    }
    return collect_config(best_of_n=section)


def run_stage(models: Path, name: str, **values: Any) -> dict[str, Any]:
    config = config_of(models, **values)
    inputs = {"policy": str(models / "policy"), "reward_model": str(models / "reward_model")}
    output = best_of_n.run(make_context(config, models / name, "best_of_n", inputs))
    assert sorted(output.outputs) == FILES
    (models / name / "summary.json").write_text(json.dumps(output.summary))
    return output.summary


def rows_of(models: Path, name: str, file: str = "scores.jsonl") -> list[dict[str, Any]]:
    lines = (models / name / "stages/best_of_n" / file).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_reward_scores_n_responses_to_every_prompt(models: Path) -> None:
    rows = rows_of(models, "run")
    assert len(rows) == PROMPTS
    assert len({json.dumps(row["prompt"]) for row in rows}) == PROMPTS
    for row in rows:
        assert list(row["rewards"]) == ["learned", "brief", "gold"]
        assert all(len(scores) == SAMPLES for scores in row["rewards"].values())
        assert row["rewards"]["brief"] == [max(-1.0, min(0.0, (1 - length) / 8)) for length in row["lengths"]]
    # The samples of a prompt differ, and so do the rewards' favourites: the curves have something to tell apart.
    assert len({score for row in rows for score in row["rewards"]["learned"]}) > PROMPTS * SAMPLES / 2


def test_a_response_scored_alone_without_padding_has_the_same_score(models: Path) -> None:
    config = config_of(models)
    tokenizer, scalar = load_tokenizer(models / "policy"), ScalarModel.load(models / "reward_model")
    model = load_policy(models / "policy", config.model, torch.float32)
    prompts = load_encoded_prompts(config.data, tokenizer, print)["test"][:2]
    for prompt, row in zip(prompts, rows_of(models, "run"), strict=False):
        for sample in range(SAMPLES):
            alone = sample_batch(
                model,
                tokenizer,
                [prompt],
                [sample],
                seed=config.seed,
                purpose="best_of_n",
                step=0,
                temperature=1.0,
                max_response_tokens=8,
                device=torch.device("cpu"),
            )
            ids = torch.cat([alone.prompt_ids, alone.response_ids[alone.response_mask][None]], dim=1)
            score = response_scores(scalar, ids, torch.ones_like(ids, dtype=torch.bool), None).item()
            assert row["lengths"][sample] == int(alone.response_mask.sum())
            assert row["rewards"]["learned"][sample] == pytest.approx(score, abs=1e-3)
            text = decode_responses(tokenizer, alone.response_ids, alone.response_mask)[0]
            assert row["rewards"]["gold"][sample] == pytest.approx(gold_reward(prompt.content, text), abs=1e-6)


def test_the_best_are_demonstrations_with_their_scores(models: Path) -> None:
    best = rows_of(models, "run", "best.jsonl")
    for row, scores in zip(best, rows_of(models, "run"), strict=True):
        assert (row["picked_by"], row["n"]) == ("learned", SAMPLES)
        place = scores["rewards"]["learned"].index(max(scores["rewards"]["learned"]))
        assert row["scores"] == {name: values[place] for name, values in scores["rewards"].items()}
        prompt = prompt_from_json(row["prompt"])
        assert row["scores"]["gold"] == pytest.approx(gold_reward(prompt, row["response"]), abs=1e-6)
    path = models / "run/stages/best_of_n/best.jsonl"
    data = FileData(path=str(path), splits=SplitConfig(validation=0.0, test=0.0))
    assert [one.response for one in load_demonstrations(data).train] == [row["response"] for row in best]


@pytest.mark.parametrize("picker", ["learned", "brief"])
def test_the_curve_is_the_mean_over_all_subsets(models: Path, picker: str) -> None:
    """By enumeration of all subsets of n samples; equal favourites share."""
    rows = [row["rewards"] for row in rows_of(models, "run")]
    curve = json.loads((models / "run/stages/best_of_n/curve.json").read_text())
    assert curve["judge"] == "gold"
    assert list(curve["curves"]) == ["learned", "brief"]
    points = curve["curves"][picker]
    assert [point["n"] for point in points] == [1, 2, 4, 5]
    for point in points:
        n = point["n"]
        by_prompt, own = [], []
        for row in rows:
            favourites = []
            for subset in itertools.combinations(range(SAMPLES), n):
                top = max(row[picker][index] for index in subset)
                equal = [row["gold"][index] for index in subset if row[picker][index] == top]
                favourites.append((top, sum(equal) / len(equal)))
            own.append(sum(top for top, _ in favourites) / len(favourites))
            by_prompt.append(sum(gold for _, gold in favourites) / len(favourites))
        assert point["gold"]["value"] == pytest.approx(sum(by_prompt) / PROMPTS)
        assert point["proxy"]["value"] == pytest.approx(sum(own) / PROMPTS)
        assert point["gold"]["low"] <= point["gold"]["value"] <= point["gold"]["high"]
        assert point["kl"] == pytest.approx(math.log(n) - (n - 1) / n)


def test_summary_metrics_and_exhibits_say_what_the_curve_says(models: Path) -> None:
    summary = json.loads((models / "run/summary.json").read_text())
    folder = models / "run/stages/best_of_n"
    curve = json.loads((folder / "curve.json").read_text())
    assert summary["curves"] == curve["curves"]
    assert summary["gold_of_1"] == curve["curves"]["learned"][0]["gold"]
    assert summary["gold_of_5_by_brief"] == curve["curves"]["brief"][-1]["gold"]
    assert (summary["num_prompts"], summary["num_samples"], summary["judge"]) == (PROMPTS, SAMPLES, "gold")
    assert metrics_of(models / "run", "best_of_n")[-1]["best_of_n/gold_of_1"] == summary["gold_of_1"]["value"]
    exhibits = Exhibits.read(folder)
    assert exhibits is not None
    assert [row[:2] for row in exhibits.tables[0].rows[:5]] == [
        *(("learned", n) for n in ("1", "2", "4", "5")),
        ("brief", "1"),
    ]
    gold, own = exhibits.figures[0].panels
    for panel, name in ((gold, "gold"), (own, "proxy")):
        assert [line.name for line in panel.lines] == ["learned", "brief"]
        expected = [(math.sqrt(point["kl"]), point[name]["value"]) for point in curve["curves"]["learned"]]
        assert list(panel.lines[0].points) == [pytest.approx(place) for place in expected]


def test_batches_change_nothing_and_the_settings_do(models: Path) -> None:
    rows = rows_of(models, "run")
    small = {"max_response_tokens": 8, "batch_size": 4}
    proxy = {"proxy": {"type": "model", "path": None}}
    run_stage(models, "small", sampling=small, num_prompts=3, num_samples=4, sizes=(1, 3), rewards=proxy)
    for row, other in zip(rows[:3], rows_of(models, "small"), strict=True):
        assert other["lengths"] == row["lengths"][:4]
        assert other["rewards"]["gold"] == row["rewards"]["gold"][:4]
        # This run's model is the same one; a response's numbers depend on its prompt and sample alone.
        assert other["rewards"]["proxy"] == pytest.approx(row["rewards"]["learned"][:4], abs=1e-5)
    best = rows_of(models, "small", "best.jsonl")
    assert [row["n"] for row in best] == [3, 3, 3]
    for row, scores in zip(best, rows_of(models, "small"), strict=True):
        assert row["scores"]["proxy"] == max(scores["rewards"]["proxy"][:3])
    intervals = run_stage(models, "wide", confidence=0.5, num_prompts=3, judge="brief", bootstrap_resamples=20)
    assert intervals["judge"] == "brief"
    assert set(intervals["curves"]) == {"learned", "gold"}
    narrow, wide = (run_stage(models, f"wide-{level}", confidence=level)["gold_of_1"] for level in (0.5, 0.95))
    assert narrow["high"] - narrow["low"] < wide["high"] - wide["low"]


def test_a_reward_that_abstains_is_named(models: Path) -> None:
    source = models / "rewards.py"
    source.write_text("def some(prompts, completions):\n    return [None for _ in completions]\n")
    with pytest.raises(RewardError, match=r"best_of_n\.rewards\.picky does not apply to the response"):
        run_stage(models, "picky", rewards={"picky": {"type": "function", "file": str(source), "function": "some"}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sizes": (1, 9)}, "does not go beyond num_samples"),
        ({"sizes": (2, 2)}, "repeats nothing"),
        ({"sizes": ()}, "ascends"),
        ({"confidence": 1.0}, "both excluded"),
        ({"rewards": {"x": {"type": "gold", "weight": 2.0}}}, "rewards.x.weight has no meaning here"),
    ],
)
def test_sections_that_say_nothing_sensible_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        BestOfNConfig.model_validate({"num_samples": 8, **values})


def test_sizes_are_powers_of_two_and_n() -> None:
    assert BestOfNConfig(num_samples=8).all_sizes() == [1, 2, 4, 8]
    assert BestOfNConfig(num_samples=12).all_sizes() == [1, 2, 4, 8, 12]
    assert BestOfNConfig(num_samples=12, sizes=(3, 5)).all_sizes() == [3, 5]


def test_rewards_by_default() -> None:
    embedded = best_of_n_rewards(collect_config())
    assert {name: reward.type for name, reward in embedded.items()} == {"proxy": "model", "gold": "gold"}
    files = RLHFConfig.model_validate({"data": {"type": "files", "path": "x"}})
    assert list(best_of_n_rewards(files)) == ["proxy"]
    assert "best_of_n" not in PIPELINE


def test_what_is_missing_is_said_before_anything_runs(models: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")

    def check(data: dict[str, Any] | None = None, **section: Any) -> None:
        body: dict[str, Any] = {"stages": ("best_of_n",), "best_of_n": section}
        preflight(RLHFConfig.model_validate(body | ({} if data is None else {"data": data})), run)

    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": " b"}\n')
    files = {"type": "files", "path": str(tmp_path / "rows.jsonl")}
    with pytest.raises(ConfigError, match=r"needs a policy.*best_of_n\.policy=FOLDER_OR_HUB_ID"):
        check()
    policy = str(models / "policy")
    with pytest.raises(ConfigError, match=r"needs a reward that picks.*Add reward_model to stages"):
        check(policy=policy)
    with pytest.raises(ConfigError, match=r"best_of_n\.judge=gold is none of the rewards proxy \(data\.type=files"):
        check(files, policy=policy)
    with pytest.raises(ConfigError, match=r"the judge gold alone, and no reward that picks"):
        check(policy=policy, rewards={"gold": {"type": "gold"}})
    with pytest.raises(ConfigError, match=r"best_of_n\.rewards\.g\.type=gold needs data=embedded"):
        check(files, policy=policy, rewards={"g": {"type": "gold"}, "b": {"type": "length"}}, judge="g")
    with pytest.raises(ConfigError, match=r"best_of_n\.rewards\.p\.path: there is no model folder .*nowhere"):
        check(policy=policy, rewards={"p": {"type": "model", "path": str(tmp_path / "nowhere")}})


def test_the_columns_and_aggregations_of_rewards_are_named_by_this_stages_keys(models: Path) -> None:
    with pytest.raises(ConfigError, match=r"best_of_n\.rewards\.a\.column=answer needs the column answer"):
        run_stage(models, "columns", rewards={"a": {"type": "exact_answer"}})
    worst = {"type": "model", "path": str(models / "reward_model"), "aggregation": "worst"}
    with pytest.raises(ConfigError, match=r"best_of_n\.rewards\.a\.aggregation=worst is for an ensemble"):
        run_stage(models, "aggregation", rewards={"a": worst})


def test_the_fingerprint_holds_what_decides_the_scores(models: Path, tmp_path: Path) -> None:
    def fingerprint(**values: Any) -> str:
        config = config_of(models, policy=str(models / "policy"), **values)
        return plan_stage(config, RunFolder(tmp_path), "best_of_n", "0").fingerprint

    before = fingerprint()
    assert fingerprint() == before
    others = [fingerprint(num_samples=4), fingerprint(sizes=(1,)), fingerprint(rewards={"b": {"type": "length"}})]
    others.append(fingerprint(rewards={"learned": {"type": "model", "path": str(models / "policy")}}))
    assert len({before, *others}) == 5
    config = config_of(models, policy=str(models / "policy"))
    inputs = resolve_inputs(config, RunFolder(tmp_path), "best_of_n")
    assert inputs == {"policy": str(models / "policy"), "rewards.learned.path": str(models / "reward_model")}
