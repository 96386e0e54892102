"""The values of the papers' configs that are easily got wrong, as the authors' code has them.

Each row was read in the file that it names; arithmetic on it stands in the row. What the code does without naming it
(no clipping, a default of a library, a step that counts differently) is what went wrong before it was looked up.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from rlhf.config import RLHFConfig
from rlhf.config.compose import load_config

# Clipping at this norm never happens.
NOT_CLIPPED = 1000.0
TLDR = "vwxyzjn/summarize_from_feedback_"
VALUES: dict[str, dict[str, Any]] = {
    # openai/lm-human-preferences: launch.py, train_policy.py, train_reward.py, utils/core.py.
    "lm_human_preferences": {
        "ppo.num_updates": -(-1_000_000 // 512),  # nupdates is ceil_div
        "ppo.max_grad_norm": NOT_CLIPPED,  # minimize
        "reward_model.max_grad_norm": NOT_CLIPPED,
        "reward_model.max_steps": 4_992 // 32,  # labels.num_train of a longer file
        "ppo.kl_coefficient": 0.15,
        "ppo.kl_target_nats_per_sequence": 6.0,
        "ppo.kl_horizon_episodes": 10_000,
        "ppo.whiten_rewards": True,
        "ppo.lam": 0.95,
        "ppo.value_coefficient": 0.1,
        "ppo.truncate_after": 16,
        "ppo.temperature": 0.7,
    },
    # vwxyzjn/summarize_from_feedback_details: README.md, sbatches/, ppo.py.
    "tldr_1b": {
        "data.demonstrations.path": f"{TLDR}tldr_3_filtered_oai_preprocessing_1706381144",
        "data.comparisons.path": f"{TLDR}oai_preprocessing_1706381144",
        "sft.batch_size": 8 * 16,
        "reward_model.batch_size": 8 * 8,
        "ppo.batch_size": 8 * 16 * 4,
        "ppo.num_updates": 1_000_000 // 512,  # there it is rounded down
        "ppo.score_position": "after_eos",  # ppo.py: sequence_lengths_p1
        "ppo.whiten_rewards": False,  # ppo_left_padding_nowhiten_reward.sbatch
        "ppo.weight_decay": 0.01,  # torch's AdamW
        "ppo.kl_coefficient": 0.05,
        "ppo.missing_eos_penalty": 1.0,
    },
    # The same, reference_output/ppo.txt, printed by an older ppo_left_padding.py.
    "tldr_golden_log": {
        "ppo.score_position": "last_token",  # actual_end = sequence_lengths
        "ppo.whiten_rewards": True,
        "ppo.learning_rate": 1e-5,
        "ppo.batch_size": 512,
    },
    # tatsu-lab/alpaca_farm: examples/scripts/rlhf_ppo.sh, src/alpaca_farm/rl/ppo_utils.py and ppo_trainer.py.
    "alpacafarm": {
        "ppo.missing_eos_penalty": None,  # post_reward returns at once without truncate_tokens, which no script sets
        "ppo.learning_rate": 1e-5,
        "ppo.num_updates": 10 * 20_001 // 512,
        "ppo.num_minibatches": 512 // 256,
        "ppo.num_epochs": 2,
        "ppo.lam": 1.0,
        "ppo.kl_coefficient": 0.02,
    },
    # tlc4418/llm_optimization: configs/config_rm.yaml, configs/ppo_config.yaml, trainer_rm.py, the trainers of trlX.
    "overoptimisation_coste": {
        "reward_model.schedule": "linear",  # TrainingArguments without lr_scheduler_type
        "reward_model.batch_size": 4 * 8,
        "reward_model.num_epochs": 5.0,
        "ppo.num_updates": 3_000 // 4,  # total_steps counts optimiser steps, of which ppo_epochs make four
        "ppo.num_epochs": 4,
        "ppo.score_clip": 10.0,
        "ppo.value_coefficient": 1.0,
    },
    # OpenLMLab/MOSS-RLHF: run_en.sh, train_rm.sh, ppo_trainer.py.
    "secrets": {
        "ppo.num_updates": 1_000 // 4 + 50,  # train_steps are optimiser steps; the critic's 50 updates come before
        "ppo.warmup_updates": 100 // 4,
        "ppo.whiten_advantages": False,  # without --use_advantage_norm
        "ppo.kl_coefficient": 0.01,
        "ppo.learning_rate": 5e-7,
        "ppo.value_learning_rate": 1.5e-6,
        "reward_model.batch_size": 8 * 4,
        "reward_model.max_steps": 1_000,
        "reward_model.warmup_steps": 100,
        "reward_model.learning_rate": 5e-6,
    },
    # eric-mitchell/direct-preference-optimization: config/config.yaml, trainers.py.
    "imdb_sentiment": {
        "dpo.optimizer": "rmsprop",
        "dpo.schedule": "constant",
        "dpo.warmup_steps": 150,
        "dpo.max_grad_norm": 10.0,
        "sft.learning_rate": 5e-7,
        "sft.max_grad_norm": 10.0,
        "dpo.batch_size": 64,
    },
}


@cache
def paper(name: str) -> RLHFConfig:
    return load_config([f"experiment=paper/{name}"]).config


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, values in VALUES.items() for key in values])
def test_a_value_is_the_authors(name: str, key: str) -> None:
    found: Any = paper(name)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == VALUES[name][key]


def test_an_optimiser_step_of_secrets_and_coste_has_the_size_that_the_steps_are_counted_in() -> None:
    secrets, coste = paper("secrets").ppo, paper("overoptimisation_coste").ppo
    moving = secrets.num_updates - secrets.critic_warmup_updates
    assert moving * secrets.num_epochs * secrets.num_minibatches == 1_000
    assert coste.num_updates * coste.num_epochs * coste.num_minibatches == 3_000
