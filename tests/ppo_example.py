"""Tiny models and configs for tests of stage ppo."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from rlhf.config import RLHFConfig
from rlhf.config.model import ScratchConfig
from rlhf.models.saving import save_model
from rlhf.models.scalar import ScalarModel, ensure_distinct_pad
from rlhf.models.scratch import build_from_scratch
from rlhf.rewards.learned import STATISTICS_FILE
from rlhf.stages.context import StageContext
from tests.stage_example import make_context

WORDS = ("good", "fine", "great", "bad", "poor", "film", "book", "was", "the", "and")


@functools.cache
def _texts() -> tuple[str, ...]:
    return tuple(f"the {WORDS[i % 10]} {WORDS[(3 * i + 1) % 10]} was {WORDS[(7 * i + 2) % 10]}" for i in range(200))


def write_models(folder: Path, *, score_scale: float = 20.0) -> dict[str, str]:
    """A policy and a reward model of two layers of 32 in `folder`; the inputs of stage ppo that name them."""
    scratch = ScratchConfig(num_layers=2, hidden_size=32, num_heads=2, vocab_size=270, max_positions=128)
    policy, tokenizer = build_from_scratch(scratch, _texts(), seed=3)
    # A new model hardly ever draws one certain token. With a larger row for EOS some states draw it often.
    policy.get_output_embeddings().weight.data[tokenizer.eos_token_id] *= 60.0
    save_model(policy, tokenizer, folder / "policy")
    reward = ScalarModel.from_policy(folder / "policy", seed=5)
    # A new head gives all texts nearly the same score; a larger one gives the policy something to go for.
    reward.head.weight.data *= score_scale
    padded = ensure_distinct_pad(tokenizer, reward.model)
    reward.save(folder / "reward_model", padded)
    (folder / "reward_model" / STATISTICS_FILE).write_text(json.dumps({"score_mean": 0.5, "score_std": 2.0}))
    policy_path, reward_path = str(folder / "policy"), str(folder / "reward_model")
    return {
        "policy": policy_path,
        "reference": policy_path,
        "reward_model": reward_path,
        "value_model": reward_path,
    }


def ppo_config(**ppo: Any) -> RLHFConfig:
    """Two updates of eight responses of at most eight tokens."""
    section: dict[str, Any] = {
        "num_updates": 2,
        "batch_size": 8,
        "num_epochs": 2,
        "num_minibatches": 2,
        "rollout_batch_size": 8,
        "max_response_tokens": 8,
        "learning_rate": 1e-3,
        "samples_every": 1,
        "num_samples_shown": 2,
        "save_every": 1,
        **ppo,
    }
    return RLHFConfig.model_validate(
        {
            "tracking": {"wandb": "disabled"},
            "distributed": {"device": "cpu"},
            "data": {
                "type": "embedded",
                "num_demonstrations": 20,
                "num_prompts": 20,
                "num_test_prompts": 4,
                "num_validation_prompts": 4,
                "max_prompt_tokens": 100,
                # So small a vocabulary cuts the demonstrations into many pieces.
                "max_response_tokens": 150,
            },
            "ppo": section,
        }
    )


def ppo_context(config: RLHFConfig, run: Path, inputs: dict[str, str]) -> StageContext:
    """The context of stage ppo in run folder `run`."""
    return make_context(config, run, "ppo", inputs)
