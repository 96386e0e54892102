"""Batches of responses, and a file with a reward function, for tests of rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.records import PromptContent
from rlhf.rewards.protocol import RewardBatch

SOURCE = """
from dataclasses import dataclass

@dataclass
class Weight:
    value: float = 2.0

def inner(text):
    return 1 / len(text)

def reward(prompts, completions, answer, scale=Weight().value, **columns):
    return [scale * inner(text) for text in completions]

def _wrapped(*arguments): ...
"""


def write_rewards(folder: Path, source: str = SOURCE) -> str:
    path = folder / "rewards.py"
    path.write_text(source)
    return str(path)


def make_batch(
    responses: Sequence[str],
    prompts: Sequence[PromptContent] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    tokens: Sequence[Sequence[int]] | None = None,
) -> RewardBatch:
    """A batch with prompts of two columns; without `tokens` every response has one."""
    tokens = [[7]] * len(responses) if tokens is None else tokens
    width = max(len(row) for row in tokens)
    ids = torch.tensor([[1, 2, *row, *[0] * (width - len(row))] for row in tokens])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in tokens])
    return RewardBatch(
        prompts=["p"] * len(responses) if prompts is None else prompts,
        responses=responses,
        columns=columns or {},
        input_ids=ids,
        attention_mask=torch.cat([torch.ones(len(tokens), 2, dtype=torch.bool), mask], dim=1),
        num_prompt=2,
        response_mask=mask,
        stopped=torch.ones(len(tokens), dtype=torch.bool),
    )
