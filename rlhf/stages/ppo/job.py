"""What a PPO training is given, and who may look on: the stage and the Python trainer both fill in a `PPOJob`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config.ppo import PPOConfig
from rlhf.config.zero import ZeroConfig
from rlhf.data.tokenization import EncodedPair
from rlhf.runs.tracking import Tracker
from rlhf.stages.sampling import EncodedPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf.distributed.engine import TrainingEngine
    from rlhf.distributed.runtime import Runtime
    from rlhf.stages.ppo.models import PPOModels


@dataclass
class TrainingView:
    """The training as a callback sees it. Setting `stop` ends it after this update, and a resume does not go on."""

    engine: TrainingEngine
    models: PPOModels
    runtime: Runtime
    stop: bool = False

    @contextmanager
    def policy(self) -> Iterator[PreTrainedModel]:
        """The policy with whole weights, to generate or score with. All ranks enter and leave together."""
        with self.engine.gathered(), self.models.actor_critic.policy_role() as model:
            yield model


class Callback:
    """Looks on; every rank calls every method. Override what is needed."""

    def on_start(self, view: TrainingView, update: int) -> None:
        """Before the first update of this process: `update` is 0, or the number of updates done before a resume."""

    def on_update(self, view: TrainingView, step: int, metrics: Mapping[str, float]) -> Mapping[str, float] | None:
        """After update number `step`; what it returns is written into the step's line of metrics as well."""

    def on_end(self, view: TrainingView, step: int) -> None:
        """After the last update, before the policy is published."""

    def state_dict(self) -> dict[str, Any]:
        """What every checkpoint keeps for this callback: plain values and tensors. Rank 0's is written."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave, on every rank and before `on_start`; not called where it gave nothing."""


def callback_states(callbacks: Sequence[Callback]) -> dict[str, dict[str, Any]]:
    """What the callbacks want to be kept, by name; those that keep nothing are left out."""
    states = {name: dict(callback.state_dict()) for name, callback in _by_name(callbacks).items()}
    return {name: state for name, state in states.items() if state}


def load_callback_states(callbacks: Sequence[Callback], states: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Gives the callbacks what `callback_states` gave. Returns notes for the user on states that are nobody's."""
    named = _by_name(callbacks)
    for name, callback in named.items():
        if name in states:
            callback.load_state_dict(states[name])
    return [
        f"the checkpoint keeps the state of callback {name}, and this training has no such callback: it is left out"
        for name in sorted(states.keys() - named.keys())
    ]


def _by_name(callbacks: Sequence[Callback]) -> dict[str, Callback]:
    """By class, numbered where a class comes again: callbacks without a state may come and go."""
    seen: Counter[str] = Counter()
    named = {}
    for callback in callbacks:
        kind = type(callback).__name__
        seen[kind] += 1
        named[kind if seen[kind] == 1 else f"{kind} {seen[kind]}"] = callback
    return named


@dataclass(frozen=True)
class PPOJob:
    """One training.

    `open_tracker` gets the number of updates that an earlier attempt has done. `checkpoints=None` neither saves nor
    resumes; a checkpoint carries `provenance`. `demonstrations` are needed where `section.ptx_coefficient` is above
    zero. `notes` are printed before the first update.
    """

    section: PPOConfig
    models: PPOModels
    prompts: Sequence[EncodedPrompt]
    runtime: Runtime
    open_tracker: Callable[[int], Tracker]
    checkpoints: Path | None = None
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    seed: int = 1
    demonstrations: Sequence[EncodedPair] = ()
    callbacks: Sequence[Callback] = ()
    notes: Sequence[str] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
