"""PPO in the study `closed_form`: the very loop of stage ppo, with its settings, on the enumerable problem."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhf.config.closed_form import ClosedFormConfig
from rlhf.config.ppo import PPOConfig
from rlhf.errors import ConfigError
from rlhf.models.scalar import ScalarModel
from rlhf.rewards.composition import RewardSet, WeightedReward
from rlhf.rewards.functions import FunctionScorer
from rlhf.runs.tracking import Tracker
from rlhf.stages.ppo.job import Callback, PPOJob, TrainingView
from rlhf.stages.ppo.loop import train
from rlhf.stages.ppo.models import ActorCritic, FrozenModel, SeparateActorCritic, SharedTrunkActorCritic
from rlhf.stages.ppo.prepare import assemble
from rlhf.stages.sampling import encode_one
from rlhf.studies.closed_form_curve import Recorder
from rlhf.studies.closed_form_problem import Problem

if TYPE_CHECKING:
    from rlhf.distributed.runtime import Runtime

# Settings of `ppo` that change which responses there are, or need what the problem lacks.
_FIXED: tuple[tuple[str, object, str], ...] = (
    ("temperature", 1.0, "the objective is that of the policy at temperature 1"),
    ("stop_tokens", (), "the responses that end with EOS are enumerated"),
    ("min_response_tokens", 0, "responses of every length are enumerated"),
    ("ptx_coefficient", 0.0, "there are no demonstrations"),
    ("reference_refresh_every", None, "the optimum is that of one reference"),
    ("kl_target_nats_per_sequence", None, "the optimum is that of one beta"),
    ("missing_eos_penalty", None, "the rewards are the table's"),
    ("length_penalty", 0.0, "the rewards are the table's"),
    ("score_clip", None, "the rewards are the table's"),
    ("rewards", {}, "the rewards are the table's"),
    ("policy", None, "the model is the problem's"),
    ("reference", None, "the reference is the problem's model"),
    ("reward_model", None, "the rewards are the table's"),
    ("value_model", None, "the critic starts from the problem's model"),
)


def check_section(section: PPOConfig) -> None:
    """Raises `ConfigError` for settings of section `ppo` with which the study would measure something else."""
    for name, value, reason in _FIXED:
        if getattr(section, name) != value:
            raise ConfigError(
                f"ppo.{name} must be {value} in stage closed_form, not {getattr(section, name)}: {reason}. Leave it "
                "out."
            )


def ppo_section(section: PPOConfig, study: ClosedFormConfig, beta: float) -> PPOConfig:
    """The settings with what the study decides: beta, the longest response, and as many updates as fit."""
    settings = section.model_dump()
    settings |= {
        "kl_coefficient": beta,
        "max_response_tokens": study.max_response_tokens,
        "num_updates": num_updates(section, study),
    }
    return PPOConfig.model_validate(settings)


def num_updates(section: PPOConfig, study: ClosedFormConfig) -> int:
    """Updates within the study's budget of responses. Raises `ConfigError` when the batches do not fill it."""
    updates, rest = divmod(study.num_responses, section.batch_size)
    if rest:
        raise ConfigError(
            f"closed_form.num_responses ({study.num_responses}) must be a multiple of ppo.batch_size "
            f"({section.batch_size})"
        )
    return updates


class _Measure(Callback):
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_start(self, view: TrainingView, update: int) -> None:
        with view.policy() as policy:
            self.recorder.observe(update, policy)

    def on_update(self, view: TrainingView, step: int, metrics: Mapping[str, float]) -> None:
        with view.policy() as policy:
            self.recorder.observe(step, policy)


def train_ppo(problem: Problem, section: PPOConfig, recorder: Recorder, runtime: Runtime) -> None:
    """Trains from the problem's model. The critic starts as its copy with a zero head; nothing is saved."""
    settings = ppo_section(section, problem.config, recorder.beta)
    policy, reference = problem.new_model(), problem.new_model()
    if settings.value_network == "shared_trunk":
        actor_critic: ActorCritic = SharedTrunkActorCritic(policy)
    else:
        actor_critic = SeparateActorCritic(
            policy, ScalarModel.from_policy(problem.new_model(), seed=problem.seed, zero_head=True)
        )
    rewards = RewardSet((WeightedReward("table", FunctionScorer(problem.score, "table")),))
    models = assemble(
        settings,
        runtime,
        problem.tokenizer,
        actor_critic,
        FrozenModel(reference),
        rewards,
        critic_tokenizer=None,
        same_artifact=True,
    )
    train(
        PPOJob(
            section=settings,
            models=models,
            prompts=[encode_one(problem.tokenizer, prompt) for prompt in problem.prompts],
            runtime=runtime,
            # What PPO says of itself is not kept: the study has its own numbers, and one run has several trainings.
            open_tracker=lambda done: Tracker("ppo"),
            seed=problem.seed,
            callbacks=[_Measure(recorder)],
        )
    )
