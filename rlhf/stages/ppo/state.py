"""What a training carries from update to update besides weights and optimiser; all of it is in every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf.config.ppo import PPOConfig
from rlhf.distributed.plain_state import copied
from rlhf.ops.adaptive_kl import AdaptiveKL
from rlhf.ops.moments import RunningMoments
from rlhf.stages.ppo.guards import Guards

if TYPE_CHECKING:
    from rlhf.distributed.engine import TrainingEngine
    from rlhf.stages.ppo.models import PPOModels


class MovingAverage:
    """Exponential moving average of the policy's trained weights, float32 on the CPU of rank 0.

    average = decay * average + (1 - decay) * weights after each update, starting from the weights before the first
    (Polyak and Juditsky 1992; without a bias correction, since it does not start from zero).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Takes in the weights after an update; the first call sets the average. No weights: another rank's affair."""
        for name, value in weights.items():
            new = value.detach().to("cpu", torch.float32, copy=True)
            old = self.weights.get(name)
            self.weights[name] = new if old is None else old.lerp_(new, 1.0 - self.decay)


@dataclass
class TrainingState:
    """Controllers and statistics. The same on every rank, but for the average, which rank 0 has.

    `metrics` are those of the last update; `saved_update` is the update of the newest checkpoint, 0 when there is none.
    `stopped`: a callback ended the training after this update.
    """

    update: int
    guards: Guards
    adaptive_kl: AdaptiveKL | None = None
    score_moments: RunningMoments | None = None
    average: MovingAverage | None = None
    reference_changed: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    saved_update: int = 0
    stopped: bool = False
    _fixed_coefficient: float = field(default=0.0)

    @classmethod
    def start(cls, section: PPOConfig) -> TrainingState:
        """The state before the first update."""
        adaptive = None
        if section.kl_target_nats_per_sequence is not None:
            adaptive = AdaptiveKL(
                coefficient=section.kl_coefficient,
                target_nats_per_sequence=section.kl_target_nats_per_sequence,
                horizon_episodes=section.kl_horizon_episodes,
            )
        return cls(
            update=0,
            guards=Guards(section),
            adaptive_kl=adaptive,
            score_moments=RunningMoments() if section.score_normalization == "running" else None,
            average=None if section.ema_decay is None else MovingAverage(section.ema_decay),
            _fixed_coefficient=section.kl_coefficient,
        )

    @property
    def kl_coefficient(self) -> float:
        """Beta of the update at hand."""
        return self._fixed_coefficient if self.adaptive_kl is None else self.adaptive_kl.coefficient

    def advance(
        self, engine: TrainingEngine, models: PPOModels, section: PPOConfig, kl_nats_per_sequence: float
    ) -> None:
        """To the next update: beta by the KL that was seen, the average, and the reference when it is time."""
        self.update += 1
        # What is not finite is the guards' affair.
        if self.adaptive_kl is not None and math.isfinite(kl_nats_per_sequence):
            self.adaptive_kl.update(kl_nats_per_sequence, section.batch_size)
        self.average_policy(engine)
        every = section.reference_refresh_every
        if every is not None and self.update % every == 0:
            self.refresh_reference(engine, models)

    def average_policy(self, engine: TrainingEngine) -> None:
        """Takes the policy's present weights into the average. All ranks call it."""
        if self.average is not None:
            self.average.update(engine.state_dict_for_saving(names=trained_names(engine)))

    def refresh_reference(self, engine: TrainingEngine, models: PPOModels) -> None:
        """The reference becomes the policy. All ranks call it."""
        with engine.modified():
            models.reference.become(models.actor_critic)
        self.reference_changed = True

    def to_checkpoint(self, models: PPOModels, *, is_main: bool = True) -> dict[str, Any]:
        """Tensors and plain values, to be written once for all ranks by the main one; all ranks call it.

        The others copy no reference, unless it takes all of them to gather it.
        """
        reference: dict[str, Tensor] | None = None
        if self.reference_changed:
            reference = models.reference.state_dict() if is_main or models.ranks_score_together else {}
        return {
            "update": self.update,
            "stopped": self.stopped,
            "metrics": {name: float(value) for name, value in self.metrics.items()},
            "guards": self.guards.state_dict(),
            "adaptive_kl": None if self.adaptive_kl is None else self.adaptive_kl.state_dict(),
            "score_moments": None if self.score_moments is None else self.score_moments.state_dict(),
            "average": None if self.average is None else self.average.weights,
            "reference": reference,
        }

    def from_checkpoint(self, saved: Mapping[str, Any], models: PPOModels, *, is_main: bool) -> None:
        """Takes back what `to_checkpoint` gave; the average belongs to the main rank alone. Keeps no tensor of it."""
        self.update = self.saved_update = int(saved["update"])
        self.stopped = bool(saved["stopped"])
        self.metrics = dict(saved["metrics"])
        self.guards.load_state_dict(saved["guards"])
        if self.adaptive_kl is not None:
            self.adaptive_kl.load_state_dict(saved["adaptive_kl"])
        if self.score_moments is not None:
            self.score_moments.load_state_dict(saved["score_moments"])
        if self.average is not None and is_main:
            self.average.weights = copied(saved["average"])
        if saved["reference"] is not None:
            models.reference.load_state_dict(saved["reference"])
            self.reference_changed = True


def trained_names(engine: TrainingEngine) -> set[str]:
    """Names in the engine's state dict of the policy's trained weights."""
    module: Any = engine.unwrapped
    policy = {id(parameter) for parameter in module.policy_parameters()}
    return {name for name, parameter in module.named_parameters(remove_duplicate=False) if id(parameter) in policy}
