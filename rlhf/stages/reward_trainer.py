"""Reward-model training on the examples of `reward_objectives`, causal or encoder-decoder, whole or with adapters.

Every response is read once, however many pairs it is in. Scores are read by the mask, losses are float32, and the
division is by the number of examples of the whole optimiser step on all ranks: see `SumTrainer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf.config.reward_model import BradleyTerryLoss, KwiseLoss, RatingLoss, RewardModelConfig
from rlhf.models.loading import disable_dropout
from rlhf.models.seq2seq import decoder_values, is_encoder_decoder
from rlhf.ops.preference_losses import comparison_loss, ranking_loss, rating_loss
from rlhf.ops.sequences import last_token_index, position_ids, right_pad
from rlhf.stages.seq2seq_training import model_inputs
from rlhf.stages.sum_trainer import Sums, SumTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf.stages.reward_objectives import Objective

Row = dict[str, Any]
_NUMBERS = ("weights", "probabilities", "margins", "targets")


@dataclass(frozen=True)
class ExampleCollator:
    """Rows of `encoded_rows` as a batch: what the model reads of all S responses of the E examples, and their labels.

    `score_at` (S,) is where a response's score is read. `chosen` and `rejected` (N,) are the pairs' places among the
    responses, `lengths` (E,) how many responses an example has, `labels` (E,) one zero for each example to be counted.
    Real numbers are float64 seen as int64: DeepSpeed would turn them into bf16 on their way to the device.
    """

    model: nn.Module

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The tensors of some rows."""
        responses = [response for row in rows for response in row["responses"]]
        prompts = [row["prompt_ids"] for row in rows for _ in row["responses"]]
        if is_encoder_decoder(self.model):
            batch = model_inputs(self.model, prompts, responses)
            batch["score_at"] = torch.tensor([len(response) for response in responses])
        else:
            ids, mask = right_pad(
                [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)], pad_id=0
            )
            batch = {"input_ids": ids, "attention_mask": mask, "score_at": last_token_index(mask)}
        lengths = [len(row["responses"]) for row in rows]
        starts = [sum(lengths[:place]) for place in range(len(rows))]
        for side in ("chosen", "rejected"):
            places = [start + place for start, row in zip(starts, rows, strict=True) for place in row[side]]
            batch[side] = torch.tensor(places, dtype=torch.long)
        for name in _NUMBERS:
            values = torch.tensor([value for row in rows for value in row[name]], dtype=torch.float64)
            batch[name] = values.view(torch.int64)
        return {**batch, "lengths": torch.tensor(lengths), "labels": torch.zeros(len(rows), dtype=torch.long)}


def causal_values(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The numbers (B, T) float32 that a causal classifier's head, with or without PEFT's wrapper, gives each token."""
    wrapped: Any = model
    classifier: Any = wrapped.get_base_model() if hasattr(wrapped, "peft_config") else wrapped
    backbone = getattr(classifier, classifier.base_model_prefix)
    states = backbone(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        use_cache=False,
    ).last_hidden_state
    values: Tensor = classifier.score(states)
    return values.squeeze(-1).float()


class ObjectiveTrainer(SumTrainer):
    """Trains on `reward_model.loss`; the terms of the sum are examples.

    The model is called for its values in all states, which is what its `forward` is from here on, so that DDP and
    DeepSpeed see an ordinary call of their module.
    """

    def __init__(
        self, *, model: PreTrainedModel, section: RewardModelConfig, objective: Objective, **arguments: Any
    ) -> None:
        self.section = section
        self.objective: Objective = objective
        disable_dropout(model)
        if is_encoder_decoder(model):
            if objective != "rating" and not section.center_coefficient:
                # A difference does not depend on the last bias: its gradient would be rounding, blown up by Adam.
                model.get_submodule("classification_head.out_proj").bias.requires_grad_(False)
            model.forward = MethodType(decoder_values, model)
        else:
            model.forward = MethodType(causal_values, model)
        super().__init__(model=model, **arguments)

    def loss_sum(self, model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, int, Sums]:
        """See `SumTrainer.loss_sum`; a label is an example, and an example is a term."""
        score_at, lengths, chosen, rejected = (
            inputs.pop(name) for name in ("score_at", "lengths", "chosen", "rejected")
        )
        numbers = {name: inputs.pop(name).view(torch.float64) for name in _NUMBERS}
        scores = model(**inputs).gather(1, score_at.unsqueeze(1)).squeeze(1)
        if self.objective == "pairs":
            loss, metrics = self._pairs(scores[chosen], scores[rejected], numbers)
        elif self.objective in ("ranking", "choice"):
            first_only = self.objective == "choice"
            loss, metrics = _rankings(scores, lengths, numbers["weights"], first_only=first_only)
        else:
            loss, metrics = self._ratings(scores, numbers)
        sums = {
            "score_sum": scores.detach().double().sum(),
            "num_scores": torch.tensor(len(scores), device=scores.device),
            **metrics,
        }
        return loss, 1, sums

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """Accuracy and margin are means over pairs but ties, the mean score and squared error over responses."""
        found = {"mean_reward": sums["score_sum"] / sums["num_scores"]}
        if "squared_error" in sums:
            found["squared_error"] = sums["squared_error"] / sums["num_scores"]
        elif sums["decided"]:
            found["accuracy"] = sums["accuracy"] / sums["decided"]
            found["margin"] = sums["score_difference"] / sums["decided"]
        return found

    def _pairs(self, chosen: Tensor, rejected: Tensor, numbers: dict[str, Tensor]) -> tuple[Tensor, Sums]:
        options = self.section.loss
        assert isinstance(options, BradleyTerryLoss | KwiseLoss)
        loss, _, metrics = comparison_loss(
            chosen=chosen,
            rejected=rejected,
            probability=numbers["probabilities"],
            margin=numbers["margins"] if options.use_margin else None,
            weights=numbers["weights"],
            label_smoothing=options.label_smoothing,
            tie_model=options.ties if options.ties in ("davidson", "rao_kupper") else None,
            tie_parameter=options.tie_parameter or 1.0,
        )
        if self.section.center_coefficient:
            charge = (numbers["weights"].to(chosen.dtype) * (chosen + rejected).square()).sum()
            loss = loss + self.section.center_coefficient * charge
        return loss, metrics

    def _ratings(self, scores: Tensor, numbers: dict[str, Tensor]) -> tuple[Tensor, Sums]:
        assert isinstance(self.section.loss, RatingLoss)
        loss, _, metrics = rating_loss(
            scores=scores, targets=numbers["targets"], form=self.section.loss.form, weights=numbers["weights"]
        )
        return loss, metrics


def _rankings(scores: Tensor, lengths: Tensor, weights: Tensor, *, first_only: bool) -> tuple[Tensor, Sums]:
    """Scores (S,) of responses that stand ranking by ranking, `lengths` (E,) of them in each."""
    places = torch.arange(int(lengths.max()), device=scores.device)
    starts = lengths.cumsum(0) - lengths
    rows = scores[(starts.unsqueeze(1) + places).clamp(max=len(scores) - 1)]
    mask = places < lengths.unsqueeze(1)
    loss, _, metrics = ranking_loss(scores=rows, mask=mask, weights=weights, first_only=first_only)
    return loss, metrics
