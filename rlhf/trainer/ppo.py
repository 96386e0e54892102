"""`PPOTrainer`: PPO on models, rewards and prompts that a Python script holds, by the very loop of stage ppo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from rlhf.config.base import Section
from rlhf.config.distributed import DistributedConfig
from rlhf.config.ppo import PPOConfig
from rlhf.config.tracking import TrackingConfig
from rlhf.config.zero import ZeroConfig
from rlhf.data.tokenization import EncodedPair
from rlhf.errors import ConfigError, UserError
from rlhf.models.loading import quiet
from rlhf.runs.console import quiet_libraries
from rlhf.runs.files import disk_errors, fingerprint
from rlhf.stages.ppo.job import Callback, PPOJob, TrainingView
from rlhf.stages.ppo.loop import Trained, train
from rlhf.stages.ppo.prepare import check_prompts
from rlhf.stages.ppo.publish import part_writers
from rlhf.stages.sampling import EncodedPrompt, decode_responses, in_batches
from rlhf.trainer.adapters import lora_config
from rlhf.trainer.assembly import Setting, frozen_parts, load_models
from rlhf.trainer.evaluation import Evaluation, evaluate, sample_indices, sample_responses
from rlhf.trainer.inputs import Rows, TokenizerSource, encode_demonstrations, encode_prompts
from rlhf.trainer.models import ModelArguments, ModelSource, ScalarSource, check_arguments
from rlhf.trainer.output import Output
from rlhf.trainer.ranks import check_equal, check_sizes, start_runtime
from rlhf.trainer.rewards import RewardFunctions, named_functions, weights_of
from rlhf.trainer.settings import settings_of

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.config.peft import LoRAConfig
    from rlhf.distributed.runtime import Runtime

SectionT = TypeVar("SectionT", bound=Section)
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class PPOResult:
    """A finished training: the last update's metrics, every update's (`step` among them), and how many there were."""

    metrics: dict[str, float]
    history: list[dict[str, float]]
    num_updates: int


class PPOTrainer:
    """PPO with a KL penalty to a frozen reference. `docs/python.md` shows it at work.

    `model`: the policy, a causal or sequence-to-sequence language model. `processing_class`: its tokenizer; by default
    that of the folder it comes from. `args`: sizes, optimiser, KL, losses.

    `train_dataset`: rows with a column `prompt`, a text or a list of messages; the other columns go to the reward
    functions. `eval_dataset`: the same, for a mean reward every `eval_every` updates. `ptx_dataset`: rows with `prompt`
    and `response`, imitated along the way when `args.ptx_coefficient` is above 0.

    `reward_model`: a sequence classifier with one label. `reward_funcs`: functions
    `f(prompts, completions, **columns) -> list[float | None]`, one, a list, or a dictionary by name. The score is the
    sum of all by `reward_weights`, the reward model's first. `reward_processing_class`: the reward model's tokenizer,
    by default that of the folder it comes from, or the policy's.

    `ref_model`: the frozen reference; by default a copy of the policy. `value_model`: where the critic starts; by
    default as the reward model, or without one as the policy with a head of zeros. `peft_config`: train LoRA adapters
    on one base instead; the reference is then the base.

    `output_dir`: where numbers, samples and checkpoints go; without it nothing is written. `tracking`: W&B, which is
    off by default and needs an `output_dir`. `verbose=False` prints nothing.

    A model is an instance, a folder or a hub id. Instances are used, not copied: `model` is trained in place (as
    float32), a reward model and a reference are frozen.
    """

    def __init__(
        self,
        model: ModelSource,
        *,
        train_dataset: Rows,
        args: PPOConfig | None = None,
        processing_class: TokenizerSource | None = None,
        reward_model: ScalarSource | None = None,
        reward_funcs: RewardFunctions | None = None,
        reward_weights: Sequence[float] | float | None = None,
        reward_processing_class: TokenizerSource | None = None,
        ref_model: ModelSource | None = None,
        value_model: ScalarSource | None = None,
        eval_dataset: Rows | None = None,
        eval_every: int = 10,
        ptx_dataset: Rows | None = None,
        peft_config: LoRAConfig | LoraConfig | None = None,
        callbacks: Sequence[Callback] = (),
        output_dir: str | Path | None = None,
        seed: int = 1,
        zero: ZeroConfig | None = None,
        distributed: DistributedConfig | None = None,
        tracking: TrackingConfig | None = None,
        verbose: bool = True,
    ) -> None:
        """Loads what is not loaded yet, and checks everything that can be checked before the first update.

        Raises subclasses of `UserError` that say what was expected, what came and what to do.
        """
        quiet_libraries()
        self.args = _section("args", args, PPOConfig)
        self.seed = seed
        self.zero = _section("zero", zero, ZeroConfig)
        self._lora = None if peft_config is None else lora_config(peft_config)
        given = ModelArguments(model, ref_model, reward_model, value_model, reward_processing_class)
        check_arguments(self.args, given)
        functions = named_functions(reward_funcs)
        weights = weights_of(reward_weights, functions, reward_model is not None)
        _check_callbacks(callbacks, eval_every)
        self.runtime: Runtime = start_runtime(_section("distributed", distributed, DistributedConfig), self.zero, seed)
        check_sizes(self.args, self.runtime)
        setting = Setting(self.args, self.runtime, self.zero, seed, self._lora)
        self.models = load_models(setting, given, processing_class, functions, weights)
        self.prompts = self._prompts(train_dataset, "train_dataset")
        self.eval_prompts = [] if eval_dataset is None else self._prompts(eval_dataset, "eval_dataset")
        self.demonstrations = self._demonstrations(ptx_dataset)
        check_equal(self.runtime, {"model": self.models.actor_critic, **frozen_parts(self.models)}, self.prompts)
        evaluation = [Evaluation(self.eval_prompts, eval_every, self.args, seed)] if self.eval_prompts else []
        self.callbacks: tuple[Callback, ...] = (*evaluation, *callbacks)
        folder = None if output_dir is None else Path(output_dir).expanduser()
        tracking = TrackingConfig(wandb="disabled") if tracking is None else tracking
        self.output = Output(folder, tracking, verbose, self.runtime)
        self._trained: Trained | None = None

    def _prompts(self, rows: Rows, name: str) -> list[EncodedPrompt]:
        prompts = encode_prompts(rows, self.tokenizer, name)
        check_prompts(prompts, self.models.policy, self.args)
        return prompts

    def _demonstrations(self, rows: Rows | None) -> list[EncodedPair]:
        if rows is not None:
            return encode_demonstrations(rows, self.tokenizer, "ptx_dataset")
        if self.args.ptx_coefficient:
            raise ConfigError("args.ptx_coefficient mixes demonstrations into PPO: pass them as ptx_dataset")
        return []

    @property
    def model(self) -> PreTrainedModel:
        """The policy; with `peft_config` the base with the adapters in it."""
        return self.models.policy

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        return self.models.tokenizer

    def train(self, *, resume: bool = False) -> PPOResult:
        """All updates, once; every rank calls it.

        `resume=True` goes on from the newest checkpoint in `output_dir`, bit for bit, and begins where there is none.
        Raises `UserError` for a second call, for a folder that holds another training, and when the self-test or a
        guard stops the training.
        """
        if self._trained is not None:
            raise UserError(
                "this trainer has trained already. To go on from its policy make another one with "
                "model=trainer.model, and with ref_model= where the reference is to stay"
            )
        output = self.output
        settings = self._settings()
        output.begin(settings, resume=resume)
        with output.lock():
            output.start(settings)
            self._trained = train(
                PPOJob(
                    section=self.args,
                    models=self.models,
                    prompts=self.prompts,
                    runtime=self.runtime,
                    open_tracker=lambda done: output.open(self.args, done),
                    checkpoints=output.checkpoints,
                    zero=self.zero,
                    seed=self.seed,
                    demonstrations=self.demonstrations,
                    callbacks=self.callbacks,
                    provenance={"fingerprint": fingerprint(settings)},
                )
            )
        return PPOResult(dict(self._trained.metrics), list(output.history), self._trained.state.update)

    def _settings(self) -> dict[str, Any]:
        """What a resume compares, as rank 0 has it; without an output folder there is nothing to compare with."""
        settings: dict[str, Any] = {}
        if self.output.folder is not None and self.runtime.is_main:
            settings = settings_of(self.args, self.seed, self._lora, self.models, self.prompts, self.demonstrations)
        return self.runtime.broadcast_object(settings)

    def evaluate(self, dataset: Rows | None = None) -> dict[str, float]:
        """Mean rewards (`eval/...`) of fresh responses to `dataset`, else to the `eval_dataset`. All ranks call it.

        Before and after training the same random numbers are used, so the two differ by the policy alone.
        """
        prompts = self.eval_prompts if dataset is None else encode_prompts(dataset, self.tokenizer, "dataset")
        if not prompts:
            raise ConfigError("there is nothing to evaluate on: pass a dataset, or give the trainer an eval_dataset")
        return self._with_policy(
            lambda policy: evaluate(policy, self.models, prompts, self.runtime, self.args, self.seed)
        )

    def generate(self, prompts: Rows, *, seed: int | None = None) -> list[str]:
        """A response to each prompt, sampled as in training; a prompt that comes again gets another one.

        `seed` (default: the trainer's) decides which. All ranks call it and get the same.
        """
        encoded = encode_prompts([prompts] if isinstance(prompts, str) else prompts, self.tokenizer, "prompts")
        rows = list(zip(encoded, sample_indices(encoded), strict=True))

        def sample(policy: PreTrainedModel) -> list[str]:
            texts: list[str] = []
            for piece in in_batches(rows, self.args.rollout_batch_size):
                batch, indices = [prompt for prompt, _ in piece], [index for _, index in piece]
                chosen = self.seed if seed is None else seed
                sampled = sample_responses(policy, self.models, batch, indices, self.args, chosen, "generate")
                texts += decode_responses(self.tokenizer, sampled.response_ids, sampled.response_mask)
            return texts

        return self._with_policy(sample)

    def save_model(self, folder: str | Path | None = None) -> Path:
        """Writes the trained policy and its tokenizer as plain transformers loads it; returns the folder.

        With `peft_config` it is the adapter's folder, as PEFT loads it. Without `folder` it is `output_dir/model`. With
        `args.ema_decay` the weights are the moving average. All ranks call it.
        """
        return self._save("model", folder)

    def save_value_model(self, folder: str | Path | None = None) -> Path:
        """Writes the trained critic, a sequence classifier with one label; by default to `output_dir/value_model`."""
        return self._save("value_model", folder)

    def _save(self, part: str, folder: str | Path | None) -> Path:
        trained = self._trained
        if trained is None:
            raise UserError("nothing is trained yet: call train() before saving")
        if folder is None and self.output.folder is None:
            raise ConfigError("there is no folder to save to: pass one, or give the trainer an output_dir")
        target = Path(folder).expanduser() if folder is not None else Path(self.output.folder or "") / part
        writers = part_writers(trained.engine, self.models, trained.state.average)
        if part not in writers:
            raise ConfigError(f"this training has no {part} of its own (args.value_network={self.args.value_network})")
        if self.runtime.is_main:
            with disk_errors(target), quiet():
                writers[part](target)
        self.runtime.barrier()
        return target

    def _with_policy(self, use: Callable[[PreTrainedModel], ResultT]) -> ResultT:
        """What `use` makes of the policy with whole weights, in the precision of training."""
        if self._trained is not None:
            with TrainingView(self._trained.engine, self.models, self.runtime).policy() as policy:
                return use(policy)
        lower = self.runtime.precision == "bf16" and self.zero.stage == 0
        with (
            torch.autocast(self.runtime.device.type, dtype=torch.bfloat16, enabled=lower),
            self.models.actor_critic.policy_role() as policy,
        ):
            return use(policy)


def _section(name: str, given: SectionT | None, kind: type[SectionT]) -> SectionT:
    """The section given, or its defaults. Raises `ConfigError` for another type, TRL's config among them."""
    if given is None:
        return kind()
    if not isinstance(given, kind):
        raise ConfigError(
            f"{name} must be a {kind.__name__} of rlhf (from rlhf import {kind.__name__}), not a "
            f"{type(given).__name__} of {type(given).__module__}"
        )
    return given


def _check_callbacks(callbacks: Sequence[Callback], eval_every: int) -> None:
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"callbacks holds a {getattr(callback, '__name__', type(callback).__name__)}; expected instances of "
                "rlhf.PPOCallback, whose methods are on_start, on_update and on_end"
            )
    if eval_every < 1:
        raise ConfigError(f"eval_every must be at least 1, not {eval_every}")
