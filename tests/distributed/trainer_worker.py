"""A user's script: `python trainer_worker.py FOLDER OUT ZERO_STAGE`, alone or under a launcher."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rlhf import DistributedConfig, PPOConfig, PPOTrainer, ZeroConfig

PROMPTS = [f"the {word} film was" for word in ("good", "fine", "bad", "poor", "great")]


def letters(completions: list[str]) -> list[float]:
    """The share of the letter e."""
    return [text.count("e") + 0.1 * len(text) for text in completions]


def main(folder: str, out: str, stage: str) -> None:
    """Two updates; numbers and weights go to `out`."""
    section = PPOConfig(
        num_updates=2,
        batch_size=8,
        num_minibatches=2,
        num_epochs=2,
        max_response_tokens=8,
        learning_rate=1e-3,
        micro_batch_size=2,
    )
    trainer = PPOTrainer(
        f"{folder}/policy",
        reward_model=f"{folder}/reward_model",
        reward_funcs=letters,
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS,
        eval_every=1,
        args=section,
        output_dir=out,
        zero=ZeroConfig.model_validate({"stage": int(stage)}),
        distributed=DistributedConfig(device="cpu"),
    )
    result = trainer.train()
    trainer.save_model()
    texts = trainer.generate(PROMPTS)
    if trainer.runtime.is_main:
        body = {"history": result.history, "texts": texts, "world_size": trainer.runtime.world_size}
        (Path(out) / "seen.json").write_text(json.dumps(body))


if __name__ == "__main__":
    main(*sys.argv[1:])
