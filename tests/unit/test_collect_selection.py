"""Stage collect: what the strategies of choosing ask of a real pool, and the states that diversity looks at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.errors import ConfigError
from rlhf.models.loading import load_policy
from rlhf.models.scalar import ScalarModel
from rlhf.ops.sequences import left_pad, right_pad
from rlhf.stages.pool_choice import KEY, mean_response_states
from tests.collect_example import (
    SIZES,
    asked_of,
    collect_config,
    comparisons_of,
    run_collect,
    write_policy,
    write_reward_model,
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_policy(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def reward_model(policy: str) -> str:
    return write_reward_model(Path(policy).parent, policy)


def chosen_by(selection: Mapping[str, Any], run: Path, policy: str, reward_model: str, **more: Any) -> dict[str, Any]:
    """Strategy and score of the training tasks, by their responses' numbers."""
    config = collect_config({"selection": {"reward_model": reward_model, **selection}, **more})
    run_collect(config, run, policy, **{KEY: reward_model})
    asked, store = asked_of(run)
    plans = [task.plan for task in store.tasks(asked.tasks["train"]).values()]
    return {
        "strategies": [plan.strategy for plan in plans],
        "scores": [plan.score for plan in plans],
        "sources": {one.source for one in comparisons_of(run)["train"]},
        "responses": [store.responses(plan.responses) for plan in plans],
    }


def test_near_ties_are_the_smallest_gaps_of_the_pool(policy: str, reward_model: str, tmp_path: Path) -> None:
    near = {"type": "near_tie", "pool_factor": 2.0}
    few = chosen_by(near, tmp_path / "few", policy, reward_model)
    everything = chosen_by({**near, "pool_factor": 1.0}, tmp_path / "all", policy, reward_model)
    assert set(few["strategies"]) == {"near_tie"} == few["sources"]
    assert len(few["scores"]) == SIZES["num_comparisons"]
    assert all(score <= 0 for score in few["scores"])
    assert sum(few["scores"]) > sum(everything["scores"])
    share = chosen_by({**near, "random_share": 0.5}, tmp_path / "half", policy, reward_model)
    assert share["strategies"].count("random") == 12
    assert share["strategies"].count("near_tie") == 12


def test_best_against_worst_has_the_largest_gap_of_its_prompt(policy: str, reward_model: str, tmp_path: Path) -> None:
    section = {"type": "best_worst"}
    found = chosen_by(section, tmp_path, policy, reward_model, num_responses=4)
    assert set(found["strategies"]) == {"best_worst"}
    assert min(found["scores"]) > 0
    prompts = [next(iter(texts.values())) for texts in found["responses"]]
    # One pair of each draw: of 24 draws over 10 prompts none has two.
    assert len({(one.prompt, (one.number or 0) // 4) for one in prompts}) == len(prompts)


def test_diversity_takes_what_lies_apart(policy: str, reward_model: str, tmp_path: Path) -> None:
    sections: dict[str, dict[str, Any]] = {
        "policy": {"type": "diversity", "reward_model": None, "pool_factor": 2.0},
        "reward_model": {"type": "diversity", "embeddings": "reward_model", "pool_factor": 2.0},
    }
    for name, section in sections.items():
        found = chosen_by(section, tmp_path / name, policy, reward_model)
        assert set(found["strategies"]) == {"diversity"}
        assert found["scores"].count(None) == 1
        assert len(found["scores"]) == SIZES["num_comparisons"]


class _TwoMembers:
    """An ensemble whose members agree on responses of even length and differ by the length on others."""

    def member_scores(self, prompts: Sequence[Any], responses: Sequence[str]) -> Any:
        lengths = np.array([len(text) * (len(text) % 2) for text in responses], dtype=float)
        return np.stack([lengths, -lengths])


def test_disagreement_asks_where_the_members_differ_most(
    policy: str, reward_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.stages.pool_choice.LearnedReward.load", lambda *_, **more: _TwoMembers())
    found = chosen_by({"type": "disagreement", "pool_factor": 2.0}, tmp_path, policy, reward_model)
    assert set(found["strategies"]) == {"disagreement"}
    for score, texts in zip(found["scores"], found["responses"], strict=True):
        first, second = (len(one.text) * (len(one.text) % 2) for one in texts.values())
        # P is sigmoid(d) by one member and sigmoid(-d) by the other: their variance is (tanh(d / 2) / 2) ** 2.
        assert score == pytest.approx((math.tanh((first - second) / 2) / 2) ** 2)
    assert found["scores"].count(0.0) < 12


def test_one_reward_model_cannot_disagree(policy: str, reward_model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs an ensemble"):
        chosen_by({"type": "disagreement"}, tmp_path, policy, reward_model)


def test_the_mean_state_of_a_response_sees_no_padding(policy: str, reward_model: str) -> None:
    model, scalar = load_policy(policy, None), ScalarModel.load(reward_model)
    rows = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13, 14])]
    prompts, prompt_mask = left_pad([prompt for prompt, _ in rows], pad_id=1)
    responses, response_mask = right_pad([response for _, response in rows], pad_id=1)
    ids, mask = torch.cat([prompts, responses], dim=1), torch.cat([prompt_mask, response_mask], dim=1)
    found = mean_response_states(model, ids, mask, 3)
    scored = mean_response_states(scalar, ids, mask, 3)
    for row, (prompt, response) in enumerate(rows):
        alone = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            states = model(alone, output_hidden_states=True).hidden_states[-1][0]
            after = scalar.backbone(input_ids=alone).last_hidden_state[0]
        # A language model draws a token from the state before it, a reward model reads the one behind.
        assert torch.allclose(found[row], states[len(prompt) - 1 : -1].mean(dim=0), atol=1e-5)
        assert torch.allclose(scored[row], after[len(prompt) :].mean(dim=0), atol=1e-5)
