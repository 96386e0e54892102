"""A tiny policy on the embedded corpus, and stage collect run on it in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.config import RLHFConfig
from rlhf.config.model import ScratchConfig
from rlhf.data import load_demonstrations
from rlhf.models.saving import save_model
from rlhf.models.scalar import ScalarModel, ensure_distinct_pad
from rlhf.models.scratch import build_from_scratch
from rlhf.preferences.asked import FILE, AskedTasks
from rlhf.preferences.store import PreferenceStore
from rlhf.records import Comparison, read_records
from rlhf.runs.folder import RunFolder
from rlhf.stages import collect
from rlhf.stages.context import StageContext, StageOutput
from tests.stage_example import make_context

SPLITS = ("train", "validation", "test")
SIZES = {"num_comparisons": 24, "num_validation_comparisons": 6, "num_test_comparisons": 12}


def collect_config(preferences: dict[str, Any] | None = None, **sections: Any) -> RLHFConfig:
    """24 tasks about the 10 training prompts, 6 for validation and 12 for the test."""
    body: dict[str, Any] = {
        "tracking": {"wandb": "disabled"},
        "distributed": {"device": "cpu"},
        "data": {
            "type": "embedded",
            "num_demonstrations": 200,
            "num_prompts": 10,
            "num_test_prompts": 8,
            "num_validation_prompts": 6,
            "max_prompt_tokens": 100,
            "max_response_tokens": 150,
        },
        "collect": {**SIZES, "sampling": {"max_response_tokens": 8, "batch_size": 16}},
        "preferences": preferences or {},
    }
    return RLHFConfig.model_validate(body | sections)


def write_policy(folder: Path) -> str:
    """A random model whose tokens are whole words of the corpus, so that its responses differ in gold reward."""
    texts = [one.response for one in load_demonstrations(collect_config().data).train]
    scratch = ScratchConfig(num_layers=1, hidden_size=16, num_heads=2, vocab_size=600, max_positions=160)
    policy, tokenizer = build_from_scratch(scratch, texts, seed=3)
    policy.get_output_embeddings().weight.data[tokenizer.eos_token_id] *= 40.0
    save_model(policy, tokenizer, folder / "policy")
    return str(folder / "policy")


def write_reward_model(folder: Path, policy: str) -> str:
    """A reward model with a random head."""
    from rlhf.models.loading import load_tokenizer

    reward = ScalarModel.from_policy(policy, seed=5)
    reward.head.weight.data *= 20.0
    reward.save(folder / "reward_model", ensure_distinct_pad(load_tokenizer(policy, None, key="policy"), reward.model))
    return str(folder / "reward_model")


def collect_context(config: RLHFConfig, run: Path, policy: str, **inputs: str) -> StageContext:
    """The context of stage collect in run folder `run`."""
    return make_context(config, run, "collect", {"policy": policy, **inputs})


def run_collect(config: RLHFConfig, run: Path, policy: str, **inputs: str) -> StageOutput:
    """What the stage hands back."""
    return collect.run(collect_context(config, run, policy, **inputs))


def comparisons_of(run: Path) -> dict[str, list[Comparison]]:
    """What the stage wrote, by split."""
    folder = RunFolder(run).stage("collect").path / "comparisons"
    return {split: read_records(folder / f"{split}.jsonl", Comparison) for split in SPLITS}


def asked_of(run: Path) -> tuple[AskedTasks, PreferenceStore]:
    """What the stage asked, and its own store."""
    asked = AskedTasks.read(RunFolder(run).stage("collect").path / FILE)
    assert asked is not None
    return asked, PreferenceStore.open(run / "stages/collect/preferences.sqlite")
