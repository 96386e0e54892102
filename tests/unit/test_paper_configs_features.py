"""What the papers' configs need of the stages: choices among K, RMSprop, truncation, a mean that is shifted alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from rlhf.config.dpo import DPOConfig
from rlhf.config.ppo import PPOConfig
from rlhf.config.reward_model import RewardModelConfig
from rlhf.config.stages import SFTConfig
from rlhf.errors import ConfigError, DataError
from rlhf.models.loading import load_tokenizer
from rlhf.records import Comparison
from rlhf.stages.ppo.truncation import Truncation
from rlhf.stages.reward_objectives import comparison_set
from rlhf.stages.trl_arguments import plan_schedule, training_arguments
from tests.ppo_example import ppo_config, write_models
from tests.stage_example import make_context

BEST = RewardModelConfig.model_validate({"loss": {"type": "best_of_k"}})


def test_a_choice_is_one_example_with_the_winner_first() -> None:
    rows = [Comparison("p", "b", other) for other in ("a", "c", "d")]
    found = comparison_set(BEST, [*rows, Comparison("p", "c", "d"), Comparison("q", "x", "y")])
    assert found.objective == "choice"
    assert [example.responses for example in found.examples] == [("b", "a", "c", "d"), ("x", "y")]


@pytest.mark.parametrize(
    "rows",
    [
        # Nobody won against d and a.
        [Comparison("p", "b", "a"), Comparison("p", "c", "d"), Comparison("p", "b", "c")],
        # An uncertain win is none.
        [Comparison("p", "b", "a", probability=0.8), Comparison("p", "b", "c")],
        # The winner has lost as well.
        [Comparison("p", "b", "a"), Comparison("p", "b", "c"), Comparison("p", "a", "b")],
    ],
)
def test_a_prompt_without_a_choice_is_refused(rows: list[Comparison]) -> None:
    with pytest.raises(DataError, match="chosen over each of the others"):
        comparison_set(BEST, rows)


def test_rmsprop_is_torchs(tmp_path: Path) -> None:
    context = make_context(ppo_config(), tmp_path, "dpo")
    schedule = plan_schedule(DPOConfig(), name="dpo", num_examples=40, world_size=1)
    assert training_arguments("dpo", DPOConfig(), context, schedule).optim == "adamw_torch"
    assert training_arguments("dpo", DPOConfig(optimizer="rmsprop"), context, schedule).optim == "rmsprop"
    with pytest.raises(ValidationError, match="adam_beta2 is an option of optimizer=adamw"):
        SFTConfig(optimizer="rmsprop", adam_beta2=0.9)


def test_a_response_is_scored_up_to_the_first_token_that_is_late_enough() -> None:
    ids = torch.tensor([[7, 1, 7, 2, 7], [7, 7, 1, 2, 3], [1, 2, 3, 7, 7]])
    mask = torch.tensor([[True] * 5, [True] * 5, [True, True, True, False, False]])
    scored, found = Truncation(7, 2).scored_part(ids, mask)
    # By hand: the 7 at place 0 is too early; row 1 has none late enough; the third row's are padding.
    assert scored.tolist() == [[True, True, True, False, False], [True] * 5, [True, True, True, False, False]]
    assert found.tolist() == [True, False, False]


def test_truncation_is_a_token_of_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_models(tmp_path)["policy"])
    assert Truncation.of(PPOConfig(), tokenizer) is None
    made = Truncation.of(PPOConfig(truncate_token="e", truncate_after=3), tokenizer)
    assert made == Truncation(tokenizer.get_vocab()["e"], 3)
    with pytest.raises(ConfigError, match=r"ppo.truncate_token names 'e\?'"):
        Truncation.of(PPOConfig(truncate_token="e?"), tokenizer)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"truncate_after": 3}, "belongs to truncate_token"),
        ({"truncate_token": ".", "truncate_after": 32}, "below max_response_tokens"),
        ({"truncate_token": ".", "score_position": "after_eos"}, "score_position=last_token"),
    ],
)
def test_truncation_that_makes_no_sense_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PPOConfig.model_validate(values)
