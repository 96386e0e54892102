"""Reward models of the study `active_selection`: trained in memory, many of them, each from the same first policy.

What is trained is what stage reward_model trains on the same comparisons: its examples, their order, its loss, its
optimiser and schedule. What is left out is the trainer around them, which would take longer than the training.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, get_scheduler

from rlhf.config.reward_model import BradleyTerryLoss
from rlhf.data.tokenization import EncodedPair, encode_pair
from rlhf.models.loading import check_vocabulary, disable_dropout, load_tokenizer
from rlhf.models.scalar import ScalarModel, ensure_distinct_pad
from rlhf.models.seq2seq import decoder_values
from rlhf.ops.preference_losses import comparison_loss
from rlhf.preferences.selection import Floats
from rlhf.records import Comparison, PromptContent
from rlhf.stages.reward_measures import score_sequences
from rlhf.stages.reward_objectives import bootstrap_order, comparison_set, encoded_rows
from rlhf.stages.reward_trainer import ExampleCollator, causal_values
from rlhf.stages.sampling import in_batches
from rlhf.stages.trl_adapter import example_order, plan_schedule, training_arguments

if TYPE_CHECKING:
    from rlhf.stages.context import StageContext

# Responses that are scored at a time.
_SCORED = 256


class RewardLearner:
    """One reward model in memory that is trained again and again, every time from the weights of `base`."""

    def __init__(self, context: StageContext, base: str) -> None:
        self.context = context
        self._section, self._runtime = context.config.reward_model, context.runtime
        key, model_config = "reward_model.base", context.config.model
        self.scalar = ScalarModel.from_policy(base, seed=context.config.seed, config=model_config, key=key)
        tokenizer = load_tokenizer(base, model_config, key)
        check_vocabulary(self.scalar.model, tokenizer, base)
        self.tokenizer = ensure_distinct_pad(tokenizer, self.scalar.model)
        disable_dropout(self.scalar.model)
        self.scalar.to(self._runtime.device)
        if self.scalar.encoder_decoder and not self._section.center_coefficient:
            # As in the stage: a difference of scores does not depend on it.
            assert self.scalar.head.bias is not None
            self.scalar.head.bias.requires_grad_(False)
        self._first = {name: value.clone() for name, value in self.scalar.state_dict().items()}
        self._collate = ExampleCollator(self.scalar.model)

    def train(self, comparisons: Sequence[Comparison], *, seed: int, bootstrap: bool = False) -> None:
        """Trains anew on the comparisons as section `reward_model` says; `seed` decides the head and all orders."""
        section, training = self._section, comparison_set(self._section, comparisons)
        self.scalar.load_state_dict(self._first)
        self.scalar.reset_head(seed=seed, zero=False)
        examples = training.examples
        if bootstrap:
            examples = [examples[number] for number in bootstrap_order(len(examples), seed)]
        schedule = plan_schedule(section, name="reward_model", num_examples=len(examples), world_size=1)
        columns = encoded_rows(self.tokenizer, examples)
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        order = example_order(schedule, seed=seed, purpose="reward_model")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = training_arguments("reward_model", section, self.context, schedule)
        optimizer = self._optimizer(arguments)
        scheduler = get_scheduler(
            arguments.lr_scheduler_type, optimizer, section.warmup_steps, num_training_steps=schedule.num_steps
        )
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.scalar.train()
        for numbers in in_batches(order, schedule.batch_size):
            for part in in_batches(numbers, schedule.micro_batch_size):
                loss = self._loss_sum([rows[number] for number in part]) / len(numbers)
                loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            torch.nn.utils.clip_grad_norm_(parameters, section.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        self.scalar.eval()

    def encode(self, texts: Sequence[tuple[PromptContent, str]]) -> list[EncodedPair]:
        """Prompts with their responses as this model's tokens."""
        return [encode_pair(self.tokenizer, prompt, response) for prompt, response in texts]

    def scores(self, texts: Sequence[EncodedPair]) -> Floats:
        """The raw scores (N,) of N prompts with their responses; those of a length are read together."""
        order = sorted(range(len(texts)), key=lambda number: len(texts[number][0]) + len(texts[number][1]))
        found = np.empty(len(texts))
        for numbers in in_batches(order, _SCORED):
            with self._precision():
                batch = score_sequences(self.scalar, [texts[number] for number in numbers], self._runtime.device)
            found[list(numbers)] = batch
        return found

    def _precision(self) -> torch.autocast:
        runtime = self._runtime
        return torch.autocast(runtime.device.type, torch.bfloat16, enabled=runtime.dtype == torch.bfloat16)

    def _optimizer(self, arguments: Any) -> torch.optim.AdamW:
        """The trainer's: norms and biases do not decay."""
        model = self.scalar.model
        # It looks at the model alone.
        decaying = set(cast(Any, Trainer).get_decay_parameter_names(None, model))
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        groups = [
            {"params": [parameter for name, parameter in named if name in decaying], "weight_decay": decay}
            if decay is not None
            else {"params": [parameter for name, parameter in named if name not in decaying], "weight_decay": 0.0}
            for decay in (arguments.weight_decay, None)
        ]
        betas = (arguments.adam_beta1, arguments.adam_beta2)
        return torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=betas, eps=arguments.adam_epsilon)

    def _loss_sum(self, rows: Sequence[dict[str, Any]]) -> Tensor:
        """The summed loss of some examples; see `ObjectiveTrainer`."""
        batch = {name: value.to(self._runtime.device) for name, value in self._collate(rows).items()}
        chosen, rejected, score_at = batch.pop("chosen"), batch.pop("rejected"), batch.pop("score_at")
        weights, probabilities, margins, _ = (
            batch.pop(name).view(torch.float64) for name in ("weights", "probabilities", "margins", "targets")
        )
        del batch["lengths"], batch["labels"]
        read = decoder_values if self.scalar.encoder_decoder else causal_values
        with self._precision():
            values = read(self.scalar.model, **batch).float()
        scores = values.gather(1, score_at.unsqueeze(1)).squeeze(1)
        options = self._section.loss
        assert isinstance(options, BradleyTerryLoss)
        loss, _, _ = comparison_loss(
            chosen=scores[chosen],
            rejected=scores[rejected],
            probability=probabilities,
            margin=margins if options.use_margin else None,
            weights=weights,
            label_smoothing=options.label_smoothing,
            tie_model=options.ties if options.ties in ("davidson", "rao_kupper") else None,
            tie_parameter=options.tie_parameter or 1.0,
        )
        if self._section.center_coefficient:
            charge = (weights.to(scores.dtype) * (scores[chosen] + scores[rejected]).square()).sum()
            loss = loss + self._section.center_coefficient * charge
        return loss
