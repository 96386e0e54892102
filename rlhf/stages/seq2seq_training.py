"""SFT and reward-model training of encoder-decoder models, by transformers' own Trainer: TRL's trainers are causal.

The prompt is the encoder's text and the response the decoder's, so only response tokens are predicted. Both losses are
sums over a micro-batch divided by the count of the whole optimiser step on all ranks: neither micro-batches, nor ranks,
nor uneven lengths change them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf.models.loading import disable_dropout
from rlhf.models.seq2seq import decoder_inputs, decoder_values
from rlhf.ops.logprobs import logprobs_and_entropy
from rlhf.ops.losses import pairwise_loss
from rlhf.ops.sequences import left_pad, right_pad
from rlhf.stages.sum_trainer import Sums, SumTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf.data.tokenization import EncodedPair

IGNORED = -100


def sft_rows(pairs: Sequence[EncodedPair]) -> dict[str, list[list[int]]]:
    """Columns `prompt_ids` and `response_ids` of demonstrations."""
    return {
        "prompt_ids": [pair.prompt_ids for pair in pairs],
        "response_ids": [pair.response_ids for pair in pairs],
    }


def reward_rows(pairs: Sequence[tuple[EncodedPair, EncodedPair]]) -> dict[str, list[list[int]]]:
    """Columns `prompt_ids`, `chosen_ids` and `rejected_ids` of (chosen, rejected) pairs to one prompt."""
    return {
        "prompt_ids": [chosen.prompt_ids for chosen, _ in pairs],
        "chosen_ids": [chosen.response_ids for chosen, _ in pairs],
        "rejected_ids": [rejected.response_ids for _, rejected in pairs],
    }


def model_inputs(model: nn.Module, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> dict[str, Tensor]:
    """What both stacks read: left-padded prompts (B, P), the start token and right-padded responses (B, R + 1).

    Masks come from lengths, so it does not matter which token fills the padding.
    """
    input_ids, attention_mask = left_pad(prompts, pad_id=0)
    decoder_ids, decoder_mask = decoder_inputs(model, *right_pad(responses, pad_id=0))
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": decoder_mask,
    }


@dataclass(frozen=True)
class DemonstrationCollator:
    """Rows of `sft_rows` as a batch; `labels` (B, R) are the response tokens, -100 at padding."""

    model: nn.Module

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """The tensors of some rows."""
        responses = [row["response_ids"] for row in rows]
        inputs = model_inputs(self.model, [row["prompt_ids"] for row in rows], responses)
        # The state behind the last token predicts nothing that is trained on.
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :-1]
        inputs["decoder_attention_mask"] = inputs["decoder_attention_mask"][:, :-1]
        ids, mask = right_pad(responses, pad_id=0)
        return {**inputs, "labels": torch.where(mask, ids, IGNORED)}


@dataclass(frozen=True)
class ComparisonCollator:
    """Rows of `reward_rows` as a batch: all chosen responses, then all rejected ones.

    `labels` (2B,) say in which state of the decoder a score is read: the one behind the whole response.
    """

    model: nn.Module

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """The tensors of some rows."""
        responses = [row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
        inputs = model_inputs(self.model, [row["prompt_ids"] for row in rows] * 2, responses)
        return {**inputs, "labels": torch.tensor([len(response) for response in responses])}


class DemonstrationTrainer(SumTrainer):
    """The loss is the cross-entropy of the response tokens, EOS included: a mean over those of the global batch."""

    def loss_sum(self, model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, int, Sums]:
        """See `SumTrainer.loss_sum`; a label is a term."""
        logits = model(**inputs, use_cache=False).logits
        mask = labels != IGNORED
        tokens = labels.clamp(min=0)
        logprobs, entropy = logprobs_and_entropy(logits=logits, tokens=tokens, temperature=1.0)
        zero = torch.zeros((), device=logits.device)
        correct = (logits.detach().argmax(-1) == tokens) & mask
        sums = {
            "entropy": torch.where(mask, entropy.detach(), zero).sum(),
            "mean_token_accuracy": correct.sum(),
            "count": mask.sum(),
        }
        return -torch.where(mask, logprobs, zero).sum(), 1, sums


class ComparisonTrainer(SumTrainer):
    """The loss is that of Bradley and Terry: -log sigmoid(score(chosen) - score(rejected)), a mean over the pairs.

    The model is called for its values in every state of the decoder, as the classifier's own forward pass does not give
    them; that is what its `forward` is from here on, so that DDP and DeepSpeed see an ordinary call of their module.
    """

    def __init__(self, *, model: PreTrainedModel, center_coefficient: float, **arguments: Any) -> None:
        self.center_coefficient = center_coefficient
        disable_dropout(model)
        if not center_coefficient:
            # A pair's difference does not depend on the last bias: its gradient would be rounding, blown up by Adam.
            model.get_submodule("classification_head.out_proj").bias.requires_grad_(False)
        model.forward = MethodType(decoder_values, model)
        super().__init__(model=model, **arguments)

    def loss_sum(self, model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, int, Sums]:
        """See `SumTrainer.loss_sum`; a term is a pair, which has two labels."""
        scores = model(**inputs).gather(1, labels.unsqueeze(1)).squeeze(1)
        chosen, rejected = scores.chunk(2)
        loss, _, _ = pairwise_loss(chosen=chosen, rejected=rejected)
        if self.center_coefficient:
            loss = loss + self.center_coefficient * (chosen + rejected).square().sum()
        sums = {
            "accuracy": (chosen > rejected).sum(),
            "margin": (chosen - rejected).sum(),
            "mean_reward": (chosen + rejected).sum() / 2,
            "count": torch.tensor(len(chosen), device=scores.device),
        }
        return loss, 2, sums
