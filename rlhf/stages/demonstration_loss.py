"""The cross-entropy of demonstrations under a policy: what SFT lowers, and what PPO costs of it (the alignment tax)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from rlhf import statistics
from rlhf.data import load_demonstrations
from rlhf.data.tokenization import EncodedPair, encode_pair, fit_lengths
from rlhf.errors import DataError
from rlhf.models.positions import check_positions
from rlhf.models.seq2seq import is_encoder_decoder
from rlhf.ops.logprobs import token_logprobs
from rlhf.ops.sequences import position_ids, right_pad
from rlhf.stages.seq2seq_training import DemonstrationCollator

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.stages.context import StageContext

IGNORED = -100


def held_out_loss(
    context: StageContext, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> statistics.Interval:
    """Nats a response token, EOS included, over the first `evaluate.num_demonstrations` held-out demonstrations.

    They are those of the test split, or of the validation split where that has none. Of all tokens together, as
    in stage sft; the interval is a bootstrap over the demonstrations. Every rank reads its share and gets the result.
    Raises `DataError` when the data holds no demonstration out.
    """
    config, runtime, section = context.config, context.runtime, context.config.evaluate
    splits = fit_lengths(load_demonstrations(config.data), tokenizer, config.data)
    rows = (splits.test or splits.validation)[: section.num_demonstrations]
    if not rows:
        raise DataError(
            f"evaluate.num_demonstrations={section.num_demonstrations}, and the data has no held-out demonstration: "
            "set it to 0, or give data whose test or validation split has responses"
        )
    pairs = [encode_pair(tokenizer, row.prompt, row.response) for row in rows]
    check_positions(model, max(len(ids) + len(response) for ids, response in pairs))
    size, mine = section.sampling.batch_size, pairs[runtime.rank :: runtime.world_size]
    found = [
        row_sums(model, mine[start : start + size], int(tokenizer.pad_token_id), runtime.device)
        for start in range(0, len(mine), size)
    ]
    sums = torch.cat(found).cpu().tolist() if found else []
    # By place, so that the number of ranks changes nothing but rounding.
    parts = runtime.gather_objects(sums)
    ordered = [parts[place % runtime.world_size][place // runtime.world_size] for place in range(len(pairs))]
    nats, tokens = [row[0] for row in ordered], [row[2] for row in ordered]
    ratio, mean_tokens = sum(nats) / sum(tokens), sum(tokens) / len(tokens)
    # Their mean is the ratio of the sums, and their spread that of the ratio to first order.
    influence = [ratio + (loss - ratio * count) / mean_tokens for loss, count in zip(nats, tokens, strict=True)]
    return statistics.bootstrap_mean(
        influence, confidence=section.confidence, num_resamples=section.bootstrap_resamples, seed=config.seed
    )


def loss_and_correct(
    model: PreTrainedModel, pairs: Sequence[EncodedPair], pad_id: int, device: torch.device
) -> torch.Tensor:
    """Sums over the response tokens: cross-entropy in nats, tokens predicted right, tokens. (3,) float64."""
    return row_sums(model, pairs, pad_id, device).sum(dim=0)


@torch.inference_mode()
def row_sums(model: PreTrainedModel, pairs: Sequence[EncodedPair], pad_id: int, device: torch.device) -> torch.Tensor:
    """The sums of `loss_and_correct` of each demonstration by itself. (B, 3) float64."""
    if is_encoder_decoder(model):
        batch = DemonstrationCollator(model)([pair._asdict() for pair in pairs])
        batch = {name: value.to(device) for name, value in batch.items()}
        targets = batch.pop("labels")
        counted, logits = targets != IGNORED, model(**batch, use_cache=False).logits
        return _sums(logits, targets.clamp(min=0), counted)
    ids, mask = right_pad([pair.prompt_ids + pair.response_ids for pair in pairs], pad_id=pad_id)
    counts, _ = right_pad(
        [[0] * len(pair.prompt_ids) + [1] * len(pair.response_ids) for pair in pairs], pad_id=0, width=ids.shape[1]
    )
    ids, mask, counted = ids.to(device), mask.to(device), counts.bool().to(device)[:, 1:]
    output = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False)
    return _sums(output.logits[:, :-1], ids[:, 1:], counted)


def _sums(logits: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    logprobs = token_logprobs(logits=logits, tokens=targets, temperature=1.0)
    zero = torch.zeros((), device=logits.device)
    loss = -torch.where(counted, logprobs, zero).double().sum(dim=1)
    correct = ((logits.argmax(-1) == targets) & counted).sum(dim=1)
    return torch.stack([loss, correct.double(), counted.sum(dim=1).double()], dim=1)
