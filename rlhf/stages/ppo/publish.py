"""What a finished training leaves in its folder: the policy in `model/`, the critic in `value_model/`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from rlhf.models.saving import save_model
from rlhf.stages import context as stage
from rlhf.stages.ppo.models import AdapterActorCritic, SeparateActorCritic

if TYPE_CHECKING:
    from rlhf.distributed.engine import TrainingEngine
    from rlhf.stages.ppo.models import PPOModels
    from rlhf.stages.ppo.state import MovingAverage

Writer = Callable[[Path], None]


def publish(
    context: stage.StageContext, engine: TrainingEngine, models: PPOModels, average: MovingAverage | None
) -> list[str]:
    """Publishes the parts and returns their names; a half-written folder never has those names. All ranks call it."""
    writers = part_writers(engine, models, average)
    for name, write in writers.items():
        if context.runtime.is_main:
            with stage.writing_partial(context, name) as folder:
                write(folder)
        stage.publish(context, name)
    return list(writers)


def part_writers(engine: TrainingEngine, models: PPOModels, average: MovingAverage | None) -> dict[str, Writer]:
    """What writes each part into a folder, by the part's name; the weights in them are complete on rank 0.

    With an `average` the policy is its moving average. A value head on the policy's trunk is not published: it means
    nothing without the states of the policy it was trained on. All ranks call it.
    """
    state = engine.state_dict_for_saving()
    if average is not None and state:
        state |= {name: value.to(state[name].dtype) for name, value in average.weights.items()}
    module, tokenizer = models.actor_critic, models.tokenizer
    critic_tokenizer = models.critic_tokenizer or tokenizer
    if isinstance(module, AdapterActorCritic):
        base, weights = module.base, _without_prefix(state, "base.")
        writers: dict[str, Writer] = {"model": lambda folder: base.save_role("policy", folder, tokenizer, weights)}
        if module.value_head is None:
            writers["value_model"] = lambda folder: base.save_role("value", folder, critic_tokenizer, weights)
        return writers
    policy = models.policy
    writers = {"model": lambda folder: save_model(policy, tokenizer, folder, _without_prefix(state, "policy."))}
    if isinstance(module, SeparateActorCritic):
        critic = module.critic.model
        writers["value_model"] = lambda folder: save_model(
            critic, critic_tokenizer, folder, _without_prefix(state, "critic.model.")
        )
    return writers


def _without_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
