"""The algorithm, read top to bottom (`train`), and the stage around it (`run`).

Ziegler et al. 2019 (arXiv 1909.08593) with the details of Huang et al. 2024 (arXiv 2403.17031): the reward of a token
is -beta times the KL estimate to the frozen reference, plus, on the last token, the score.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch.optim.lr_scheduler import LambdaLR

from rlhf.batches import PPOBatch, ScoredRollout, make_ppo_batch
from rlhf.config.ppo import PPOConfig
from rlhf.distributed.checkpoints import checkpoint_folder, prune_checkpoints
from rlhf.distributed.engine import TrainingEngine
from rlhf.distributed.placing import linear_put_back
from rlhf.distributed.plain_state import copied
from rlhf.distributed.stopping import StopPoll, polled
from rlhf.distributed.training_checkpoints import check_provenance
from rlhf.errors import Stopped
from rlhf.ops.adam import TensorFlowAdam
from rlhf.runs.files import disk_errors
from rlhf.runs.tracking import Tracker
from rlhf.stages.context import StageContext, StageOutput
from rlhf.stages.ppo.job import PPOJob, TrainingView, callback_states, load_callback_states
from rlhf.stages.ppo.metrics import Clock, batch_metrics, sample_rows
from rlhf.stages.ppo.prepare import prepare_job
from rlhf.stages.ppo.publish import publish
from rlhf.stages.ppo.rollout import Experience, gather_experience, transform_scores
from rlhf.stages.ppo.self_test import check_first_rollout
from rlhf.stages.ppo.state import TrainingState
from rlhf.stages.ppo.update import Updater, num_micro_batches, training_logprobs

# Responses that the self-test sends through a training forward.
_SELF_TEST_ROWS = 16


@dataclass(frozen=True)
class Trained:
    """A finished training: the engine with the policy in it, the last update's metrics, and the number of updates."""

    engine: TrainingEngine
    state: TrainingState
    metrics: Mapping[str, float]


def run(context: StageContext) -> StageOutput:
    """Stage ppo: trains the policy and publishes it. Resumes from the newest checkpoint of an interrupted attempt."""
    job = prepare_job(context)
    trained = train(job)
    outputs = publish(context, trained.engine, job.models, trained.state.average)
    return StageOutput(
        summary={name: value for name, value in trained.metrics.items() if name.startswith("ppo/")}, outputs=outputs
    )


@linear_put_back()
def train(job: PPOJob) -> Trained:
    """PPO. All ranks call it together.

    Told to stop by a signal, raises `Stopped` with a checkpoint on disk: of the updates before, when responses are
    being sampled or scored, which is given up; else of the update at hand, which cannot be cut short and is finished.
    """
    section, models, runtime = job.section, job.models, job.runtime
    # 1. Policy and critic to train; reference and rewards frozen.
    engine = make_engine(job)
    demonstrations = job.demonstrations if section.ptx_coefficient else ()
    updater = Updater(engine, section, runtime, job.seed, models.scoring, demonstrations, models.pad_id)
    # 2. Where an interrupted attempt stopped.
    state, notes = _start_or_resume(job, engine)
    view = TrainingView(engine, models, runtime, stop=state.stopped)
    with job.open_tracker(state.update) as tracker, _checkpoint_on_stop(job, engine, state) as stop:
        _begin(job, view, state, tracker, notes)
        for update in _updates_left(section, state):
            clock = Clock()
            # 3. Sample responses to the prompts of the batch, and score them.
            experience = gather_experience(engine, models, job.prompts, section, runtime, job.seed, update, stop)
            clock.rollout_ends()
            # 4. Token rewards with the KL penalty, advantages, returns: over the global batch.
            coefficient = state.kl_coefficient
            batch = make_batch(experience, section, state, coefficient)
            if update == 0 and section.self_test:
                _self_test(job, engine, batch, experience)
            # 5. Several epochs of clipped policy and value losses.
            clock.training_begins()
            statistics = updater.optimise(batch, update, coefficient)
            clock.training_ends()
            metrics: dict[str, float] = {
                **batch_metrics(batch, experience, models.rewards.weights, coefficient),
                **statistics.means(runtime, section, coefficient),
                **statistics.pass_means(runtime),
                "ppo/learning_rate": section.learning_rate * learning_rate_factor(section, update),
            }
            # 6. What moves between updates: the learning rates, beta, the average of the policy, the reference.
            engine.scheduler.step()
            state.advance(engine, models, section, metrics["ppo/kl_to_reference"])
            # 7. Write down what happened; keep what is needed to go on.
            for callback in job.callbacks:
                metrics |= callback.on_update(view, state.update, metrics) or {}
            state.metrics = metrics
            speeds = clock.metrics(batch, section, runtime, len(statistics.grad_norms))
            tracker.log(state.update, {**metrics, **speeds})
            if update % section.samples_every == 0 or state.update == section.num_updates:
                tracker.log_samples(state.update, sample_rows(experience, models, section.num_samples_shown))
            for warning in state.guards.check(state.update, metrics):
                tracker.message(warning)
            # Asked before the signals, whose checkpoint says it too.
            state.stopped = _someone_stops(job, view)
            stop.stop_if_agreed()
            # Also after the last one: what follows (publishing) may be interrupted too.
            if state.stopped or state.update % section.save_every == 0 or state.update == section.num_updates:
                _save(job, engine, state)
                state.saved_update = state.update
        for callback in job.callbacks:
            callback.on_end(view, state.update)
    return Trained(engine, state, state.metrics)


def _updates_left(section: PPOConfig, state: TrainingState) -> Iterator[int]:
    """The updates to do, counted from 0; none after the one at which a callback ended the training."""
    while state.update < section.num_updates and not state.stopped:
        yield state.update


@contextmanager
def _checkpoint_on_stop(job: PPOJob, engine: TrainingEngine, state: TrainingState) -> Iterator[StopPoll]:
    """What the loop asks whether it is to stop; when it is, a checkpoint is written unless the newest is as new.

    A training without checkpoints has nothing to gain from going on: there a signal ends it at once.
    """
    if job.checkpoints is None:
        yield StopPoll()
        return
    with polled(job.runtime) as stop:
        try:
            yield stop
            stop.stop_if_agreed()
        except Stopped as stopped:
            if state.update > state.saved_update:
                _save(job, engine, state)
            raise Stopped(stopped.number, state.update) from None


def _someone_stops(job: PPOJob, view: TrainingView) -> bool:
    """Whether a callback asked for the end, on whichever rank: all ranks leave together."""
    if not job.callbacks:
        return False
    wanted = torch.tensor([float(view.stop)], device=job.runtime.device)
    return float(job.runtime.sum_over_ranks(wanted)) > 0


def _begin(job: PPOJob, view: TrainingView, state: TrainingState, tracker: Tracker, notes: Sequence[str]) -> None:
    """What is done once, before the first update of this process."""
    for note in (*notes, *job.notes):
        tracker.message(note)
    if state.stopped:
        tracker.message(
            f"a callback ended this training after update {state.update}, so it does not go on. To train its policy "
            "further, start from model=trainer.model with another output_dir"
        )
    if state.update == 0:
        state.average_policy(view.engine)
    for callback in job.callbacks:
        callback.on_start(view, state.update)


def make_batch(experience: Experience, section: PPOConfig, state: TrainingState, coefficient: float) -> PPOBatch:
    """The experience as what PPO trains on: final scores, token rewards, advantages and returns of the global batch."""
    rollout = experience.scored.rollout
    scores = transform_scores(
        experience.raw_scores, rollout.stopped, rollout.response_lengths, section, state.score_moments
    )
    scored: ScoredRollout = replace(experience.scored, scores=scores)
    return make_ppo_batch(
        scored,
        kl_coefficient=coefficient if section.kl_placement == "reward" else 0.0,
        kl_estimator=section.kl_estimator,
        gamma=section.gamma,
        lam=section.lam,
        whiten_rewards=section.whiten_rewards,
        whiten_advantages=section.whiten_advantages,
        score_position=section.score_position,
    )


def learning_rate_factor(section: PPOConfig, update: int) -> float:
    """What the policy's learning rate is multiplied with in an update: as the critic's, but 0 while that warms up.

    The optimiser sees the policy's gradients all the while, so its moments are true when the policy begins to move.
    """
    return 0.0 if update < section.critic_warmup_updates else value_learning_rate_factor(section, update)


def value_learning_rate_factor(section: PPOConfig, update: int) -> float:
    """What the critic's learning rate is multiplied with: linear warm-up, then constant or linear to 0."""
    factor = min(1.0, (update + 1) / (section.warmup_updates + 1))
    if section.schedule == "linear":
        factor *= 1.0 - update / section.num_updates
    return factor


def make_engine(job: PPOJob) -> TrainingEngine:
    """The engine around policy and critic. Its schedule advances once an update, whatever steps the update took."""
    section, module = job.section, job.models.actor_critic
    if section.gradient_checkpointing:
        module.enable_gradient_checkpointing()
    kind = torch.optim.AdamW if section.adam_epsilon_placement == "torch" else TensorFlowAdam
    optimizer = kind(
        [
            {"params": module.policy_parameters(), "lr": section.learning_rate},
            {"params": module.value_parameters(), "lr": section.value_learning_rate or section.learning_rate},
        ],
        betas=(section.adam_beta1, section.adam_beta2),
        eps=section.adam_epsilon,
        weight_decay=section.weight_decay,
    )
    accumulation = num_micro_batches(section, job.runtime.world_size)
    rows = section.batch_size // section.num_minibatches // job.runtime.world_size
    factors = [
        lambda update: learning_rate_factor(section, update),
        lambda update: value_learning_rate_factor(section, update),
    ]
    return TrainingEngine.prepare(
        module,
        optimizer,
        LambdaLR(optimizer, factors),
        runtime=job.runtime,
        zero=job.zero,
        micro_batch_size=-(-rows // accumulation),
        accumulation_steps=accumulation,
        max_grad_norm=section.max_grad_norm,
    )


def _start_or_resume(job: PPOJob, engine: TrainingEngine) -> tuple[TrainingState, list[str]]:
    """The state of the newest checkpoint, whose weights the engine then has, or that before the first update.

    With it come notes for the user on a checkpoint that is damaged, or of another number of ranks or ZeRO stage, and
    on the one that is taken.
    """
    state = TrainingState.start(job.section)
    if job.checkpoints is None:
        return state, []
    checkpoint, notes = engine.find_checkpoint(job.checkpoints)
    if checkpoint is not None:
        saved = engine.load_checkpoint(checkpoint, verified=True)
        check_provenance(checkpoint, saved["provenance"], job.provenance)
        state.from_checkpoint(saved, job.models, is_main=job.runtime.is_main)
        notes += load_callback_states(job.callbacks, copied(saved["callbacks"]))
        notes.append(f"the training goes on from {checkpoint.name}")
    return state, notes


def _save(job: PPOJob, engine: TrainingEngine, state: TrainingState) -> None:
    if job.checkpoints is None:
        return
    shared = {
        **state.to_checkpoint(job.models, is_main=job.runtime.is_main),
        "callbacks": callback_states(job.callbacks),
        "provenance": dict(job.provenance),
    }
    folder = checkpoint_folder(job.checkpoints, state.update)
    with disk_errors(folder):
        engine.save_checkpoint(folder, shared=shared)
        if job.runtime.is_main:
            prune_checkpoints(job.checkpoints, job.section.keep_checkpoints)


def _self_test(job: PPOJob, engine: TrainingEngine, batch: PPOBatch, experience: Experience) -> None:
    """Before the first step, on the first rollout. Every rank runs the same rows and comes to the same verdict."""
    # No more than fits: the limits of a training forward hold here too.
    size = job.section.micro_batch_size or job.section.rollout_batch_size
    some = batch.rollout.select(torch.arange(min(_SELF_TEST_ROWS, size, len(batch))))
    check_first_rollout(
        job.models.facts,
        scored=batch.scored,
        training_logprobs=training_logprobs(engine, some, job.models.scoring, job.runtime.device),
        raw_scores=experience.raw_scores,
        parts=experience.parts,
    )
