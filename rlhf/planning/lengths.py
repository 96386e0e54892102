"""The stages that are planned, and how long their rows may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from rlhf.config import RLHFConfig
from rlhf.config.data import Kind, source_of
from rlhf.planning.architecture import Architecture

TrainedStage = Literal["sft", "reward_model", "ppo"]
PLANNED_STAGES: tuple[TrainedStage, ...] = get_args(TrainedStage)


@dataclass(frozen=True)
class Lengths:
    """Longest prompt, response and sequence in tokens, as the config allows them."""

    prompt: int
    response: int

    @property
    def whole(self) -> int:
        """Prompt and response."""
        return self.prompt + self.response


def lengths_of(config: RLHFConfig, stage: TrainedStage, architecture: Architecture) -> Lengths:
    """The longest row of the stage: the data's limits, and of PPO its own limit on responses; within the positions."""
    kinds: dict[TrainedStage, Kind] = {"sft": "demonstrations", "reward_model": "comparisons", "ppo": "prompts"}
    # Without comparisons of its own the run collects them: answers to its prompts.
    source = source_of(config.data, kinds[stage]) or source_of(config.data, "prompts")
    assert source is not None
    response = config.ppo.max_response_tokens if stage == "ppo" else source.max_response_tokens
    prompt = source.max_prompt_tokens
    limit = getattr(architecture.config, "max_position_embeddings", None)
    if limit is not None and not architecture.encoder_decoder and prompt + response > limit:
        prompt = max(1, limit - response)
        response = min(response, limit - prompt)
    return Lengths(prompt, response)
