"""Ensembles of reward models: trained, killed and resumed, loaded on one base or whole, aggregated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification

from rlhf.config.model import ModelConfig, ScratchConfig
from rlhf.config.rewards import ModelReward
from rlhf.data.tokenization import encode_pair
from rlhf.errors import ArtifactError, ConfigError
from rlhf.models import ScalarModel, build_from_scratch, load_tokenizer
from rlhf.models.ensemble import AdapterEnsemble, ModelEnsemble, ScalarEnsemble
from rlhf.models.paths import check_model_path, is_ensemble, member_folders
from rlhf.models.scalar import pad_pairs, response_scores
from rlhf.pipeline import _content
from rlhf.planning.sources import find_sources
from rlhf.records import Comparison
from rlhf.rewards.build import LoadedModel, build_rewards
from rlhf.rewards.composition import ScoreStatistics
from rlhf.rewards.ensemble import EnsembleReward
from rlhf.rewards.learned import LearnedReward
from rlhf.stages import reward_model, trl_adapter
from rlhf.stages.reward_measures import scored_comparisons
from rlhf.stages.reward_members import member_seed
from rlhf.trainer.models import ModelArguments, load_reward_model
from tests.reward_example import make_batch
from tests.stage_example import make_context, metrics_of, one_process, tiny_config, write_comparisons

STEPS = {"batch_size": 8, "max_steps": 4, "learning_rate": 1e-3, "log_every": 2, "save_every": 2}
TEXTS = [("the film", " was good"), ("a film", " was bad and poor"), ("the film", " fine fine")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Comparisons, a policy, and runs of the stage: `single`, `whole` (two members), `lora` (two adapters)."""
    folder = tmp_path_factory.mktemp("ensemble")
    write_comparisons(folder / "comparisons")
    config = ScratchConfig.model_validate({"num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": 300})
    policy, tokenizer = build_from_scratch(config, ["the film was good and bad"] * 9, seed=3)
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    train(folder, "single")
    train(folder, "whole", num_members=2)
    train(folder, "lora", peft={"type": "lora", "rank": 2}, num_members=2)
    return folder


def context_of(folder: Path, name: str, peft: dict[str, Any] | None = None, **values: Any) -> Any:
    sections = {} if peft is None else {"peft": peft}
    config = tiny_config(folder, reward_model={**STEPS, **values}, **sections)
    inputs = {"base": str(folder / "policy"), "comparisons": str(folder / "comparisons")}
    return make_context(config, folder / name, "reward_model", inputs)


def train(folder: Path, name: str, peft: dict[str, Any] | None = None, **values: Any) -> dict[str, Any]:
    output = reward_model.run(context_of(folder, name, peft, **values))
    (folder / name / "summary.json").write_text(json.dumps(output.summary))
    return output.summary


def model_of(folder: Path, name: str) -> Path:
    return folder / name / "stages/reward_model/model"


def scores_alone(path: str | Path) -> list[float]:
    """The texts' raw scores by one model, one text at a time."""
    scalar, tokenizer = ScalarModel.load(path), load_tokenizer(path)
    encoded = [encode_pair(tokenizer, prompt, response) for prompt, response in TEXTS]
    return [response_scores(scalar, *pad_pairs(scalar, [text], pad_id=0)).item() for text in encoded]


def loaded(files: Path, name: str) -> EnsembleReward:
    path = str(model_of(files, name))
    reward = LearnedReward.load(
        path,
        ModelConfig(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        policy_tokenizer=load_tokenizer(files / "policy"),
    )
    assert isinstance(reward, EnsembleReward)
    return reward


def test_the_first_member_is_the_model_that_a_single_run_has(files: Path) -> None:
    weights = [(Path(folder) / "model.safetensors").read_bytes() for folder in member_folders(model_of(files, "whole"))]
    assert weights[0] == (model_of(files, "single") / "model.safetensors").read_bytes()
    assert weights[1] != weights[0]
    seeds = [
        json.loads((Path(f) / "rlhf_member.json").read_text())["seed"] for f in member_folders(model_of(files, "whole"))
    ]
    assert seeds == [1, member_seed(1, 1)]
    first = metrics_of(files / "single", "reward_model")
    lines = metrics_of(files / "whole", "reward_model")
    assert lines[: len(first)] == first
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert not list((files / "whole/stages/reward_model").glob("member-*"))


def test_the_summary_has_the_names_of_a_single_models(files: Path) -> None:
    single, whole = (json.loads((files / name / "summary.json").read_text()) for name in ("single", "whole"))
    assert set(single) <= set(whole)
    assert whole["member_0_accuracy"] == single["accuracy"]
    assert whole["num_members"] == 2
    rows = [
        json.loads(line)
        for line in (files / "whole/stages/reward_model/held_out_scores.jsonl").read_text().splitlines()
    ]
    test = [row for row in rows if row["split"] == "test"]
    assert len(test) == 7
    margins = [sum(row["chosen_scores"]) / 2 - sum(row["rejected_scores"]) / 2 for row in test]
    assert whole["margin"] == pytest.approx(sum(margins) / 7)
    assert whole["accuracy"]["value"] == pytest.approx(sum(margin > 0 for margin in margins) / 7)


def test_members_load_by_themselves_and_score_the_same_together(files: Path) -> None:
    """Whole models with plain transformers, adapters merged into their base and side by side on it."""
    for name, kind, tolerance in (("whole", ModelEnsemble, 0.0), ("lora", AdapterEnsemble, 1e-5)):
        path = model_of(files, name)
        alone = torch.tensor([scores_alone(folder) for folder in member_folders(path)])
        ensemble = ScalarEnsemble.load(path)
        assert isinstance(ensemble, kind)
        tokenizer = load_tokenizer(path)
        encoded = [encode_pair(tokenizer, prompt, response) for prompt, response in TEXTS]
        rows = [ensemble.member_scores(*pad_pairs(ensemble, [text], pad_id=0)) for text in encoded]
        torch.testing.assert_close(torch.cat(rows, dim=1), alone, atol=tolerance, rtol=0)
        padded = ensemble.member_scores(*pad_pairs(ensemble, encoded, pad_id=0))
        torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)
        assert float((alone[0] - alone[1]).abs().min()) > 1e-3
    plain: Any = AutoModelForSequenceClassification.from_pretrained(member_folders(model_of(files, "whole"))[1])
    ids = torch.tensor([[*encoded[0].prompt_ids, *encoded[0].response_ids]])
    whole = scores_alone(member_folders(model_of(files, "whole"))[1])
    assert plain(input_ids=ids).logits.item() == pytest.approx(whole[0], abs=1e-5)


def test_one_base_is_in_memory_once(files: Path) -> None:
    ensemble, single = ScalarEnsemble.load(model_of(files, "lora")), ScalarModel.load(model_of(files, "single"))
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (ensemble, single)]
    assert sizes[0] < 1.3 * sizes[1]


def test_members_are_normalised_each_by_its_own_statistics_and_aggregated(files: Path) -> None:
    reward = loaded(files, "whole")
    path = model_of(files, "whole")
    expected = []
    for folder in member_folders(path):
        known = ScoreStatistics.read(folder)
        assert known is not None
        expected.append([(score - known.mean) / known.std for score in scores_alone(folder)])
    members = torch.tensor(expected, dtype=torch.float64)
    prompts, responses = [prompt for prompt, _ in TEXTS], [response for _, response in TEXTS]
    found = torch.from_numpy(reward.member_scores(prompts, responses, batch_size=2))
    torch.testing.assert_close(found, members, atol=1e-4, rtol=0)
    mean, variance = members.mean(0), members.var(0, correction=0)
    for aggregation, coefficient, wanted in (
        ("mean", None, mean),
        ("worst", None, members.min(0).values),
        ("mean_minus_variance", None, mean - 0.1 * variance),
        ("mean_minus_variance", 2.0, mean - 2.0 * variance),
    ):
        config = ModelReward(aggregation=aggregation, variance_coefficient=coefficient)  # type: ignore[arg-type]
        rewards = build_rewards({"model": config}, load_model=lambda path, key: LoadedModel(reward))
        entry: Any = rewards.rewards[0].reward
        scores = entry.score_texts(prompts, responses, batch_size=3)
        assert scores == pytest.approx(wanted.tolist(), abs=1e-4)
    raw = build_rewards({"model": ModelReward(normalize=False)}, load_model=lambda path, key: LoadedModel(reward))
    entry = raw.rewards[0].reward
    plain = torch.tensor([scores_alone(folder) for folder in member_folders(path)])
    assert entry.score_texts(prompts, responses, batch_size=3) == pytest.approx(plain.mean(0).tolist(), abs=1e-5)


def test_a_reward_set_logs_how_far_the_members_are_apart(files: Path) -> None:
    reward = loaded(files, "lora")
    rewards = build_rewards(
        {"quality": ModelReward(aggregation="worst")}, load_model=lambda path, key: LoadedModel(reward)
    )
    batch = make_batch(["x", "y"], tokens=[[7, 9, 2], [8, 2]])
    scored = rewards.score(batch)
    members = reward.member_scores_of_batch(batch)
    torch.testing.assert_close(scored.total, members.min(0).values)
    torch.testing.assert_close(scored.details["quality_spread"], members.std(0, correction=0))
    assert set(scored.parts) == {"quality"}


def test_an_aggregation_of_one_model_is_refused(files: Path) -> None:
    single = LearnedReward.load(
        str(model_of(files, "single")),
        ModelConfig(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        policy_tokenizer=load_tokenizer(files / "policy"),
    )
    assert single.member_scores(["p"], [" was good"]).shape == (1, 1)
    with pytest.raises(ConfigError, match=r"aggregation=worst is for an ensemble"):
        build_rewards({"model": ModelReward(aggregation="worst")}, load_model=lambda path, key: LoadedModel(single))
    with pytest.raises(ValidationError, match="variance_coefficient"):
        ModelReward(variance_coefficient=1.0)


def test_an_ensemble_passes_for_a_model_folder(files: Path, tmp_path: Path) -> None:
    path = str(model_of(files, "whole"))
    assert is_ensemble(path)
    check_model_path(path, "ppo.reward_model")
    # A critic starts from the first member.
    assert scores_alone(path) == scores_alone(member_folders(path)[0])
    config = tiny_config(files, ppo={"reward_model": path})
    assert len(find_sources(config).rewards) == 2
    assert len(find_sources(tiny_config(files, reward_model={"num_members": 4})).rewards) == 4
    adapters = tiny_config(files, ppo={"reward_model": str(model_of(files, "lora"))})
    assert len(find_sources(adapters).rewards) == 1
    arguments = ModelArguments(str(files / "policy"), reward_model=path)
    for_trainer = load_reward_model(arguments, load_tokenizer(files / "policy"), one_process())
    assert for_trainer is not None
    assert isinstance(for_trainer.reward, EnsembleReward)
    # What identifies it is the content of all members, and of the base below adapters.
    assert _content(path, None) != _content(str(model_of(files, "single")), None)
    assert " on " in _content(str(model_of(files, "lora")), None)
    (tmp_path / "rlhf_ensemble.json").write_text('{"members": ["members/0"]}')
    with pytest.raises(ArtifactError, match="two or more"):
        check_model_path(str(tmp_path), "ppo.reward_model")
    (tmp_path / "rlhf_ensemble.json").write_text('{"members": ["members/0", "members/1"]}')
    with pytest.raises(ConfigError, match="no model folder"):
        check_model_path(str(tmp_path), "ppo.reward_model")


def test_scored_comparisons_hold_every_members_scores(files: Path) -> None:
    rows = [Comparison(TEXTS[0][0], TEXTS[0][1], TEXTS[2][1])]
    path = model_of(files, "whole")
    [found] = scored_comparisons(context_of(files, "scored"), path, rows)
    alone = [scores_alone(folder) for folder in member_folders(path)]
    assert found.chosen_scores == pytest.approx([scores[0] for scores in alone], abs=1e-5)
    assert found.rejected_score == pytest.approx(sum(scores[2] for scores in alone) / 2, abs=1e-5)


class _Killed(BaseException):
    """Ends a stage in the middle."""


def test_a_killed_ensemble_goes_on_to_the_same_bytes_and_bootstrap_draws_others(files: Path) -> None:
    """Killed in its second member, and again between the last member and the published folder."""
    train(files, "sure", num_members=2, bootstrap=True)
    values: dict[str, Any] = {"num_members": 2, "bootstrap": True}
    whole = trl_adapter._TrackingCallback.on_step_end
    seen: list[int] = []

    def dying(self: Any, args: object, state: Any, control: Any, **kwargs: Any) -> Any:
        seen.append(state.global_step)
        if len(seen) == 4 + 3:
            raise _Killed
        return whole(self, args, state, control, **kwargs)

    with mock.patch.object(trl_adapter._TrackingCallback, "on_step_end", dying):
        with pytest.raises(_Killed):
            train(files, "killed", **values)
        with mock.patch.object(reward_model, "publish_ensemble", side_effect=_Killed), pytest.raises(_Killed):
            train(files, "killed", **values)
        # The first member whole, the second up to its third step, then on from the checkpoint of its second.
        assert seen == [1, 2, 3, 4, 1, 2, 3, 3, 4]
        train(files, "killed", **values)
    assert len(seen) == 9
    for number in (0, 1):
        weights = [
            (model_of(files, name) / f"members/{number}/model.safetensors").read_bytes() for name in ("sure", "killed")
        ]
        assert weights[0] == weights[1]
    assert metrics_of(files / "killed", "reward_model") == metrics_of(files / "sure", "reward_model")
    assert (files / "killed/summary.json").read_text() == (files / "sure/summary.json").read_text()
    drawn = (model_of(files, "sure") / "members/0/model.safetensors").read_bytes()
    assert drawn != (model_of(files, "single") / "model.safetensors").read_bytes()
