"""`tracking`: where metrics go besides `metrics.jsonl`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.config.base import Section


class TrackingConfig(Section):
    """Weights & Biases and TensorBoard. `auto` logs online when logged in and offline otherwise."""

    wandb: Literal["auto", "online", "offline", "disabled"] = Field("auto", description="W&B mode")
    project: str = Field("rlhf", description="W&B project")
    entity: str | None = Field(None, description="W&B team or user; null is your default")
    name: str | None = Field(None, description="the run's name at W&B; null is the run folder's")
    tags: tuple[str, ...] = Field((), description="W&B tags")
    artifacts: Literal["none", "references", "files"] = Field(
        "references", description="W&B artifacts: none, names and hashes of data, models and comparisons, or the files"
    )
    tensorboard: bool = Field(False, description="write TensorBoard event files to <run>/tensorboard/<stage>")
