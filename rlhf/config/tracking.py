"""`tracking`: where metrics go besides `metrics.jsonl`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.config.base import Section


class TrackingConfig(Section):
    """Weights & Biases. `auto` logs online when logged in and offline otherwise."""

    wandb: Literal["auto", "online", "offline", "disabled"] = Field("auto", description="W&B mode")
    project: str = Field("rlhf", description="W&B project")
    entity: str | None = Field(None, description="W&B team or user; null is your default")
    tags: tuple[str, ...] = Field((), description="W&B tags")
