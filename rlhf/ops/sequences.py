"""Positions and padding of token sequences. Indices come from masks, never from comparing ids with a pad token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.ops._checks import check_bool, check_floating, check_integer, check_rank, check_same_shape, kept


def last_token_index(mask: Bool[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """Index of the last True of each row, wherever the padding is; -1 for an empty row."""
    check_bool(mask=mask)
    check_rank(2, mask=mask)
    if mask.shape[1] == 0:
        return torch.full((mask.shape[0],), -1, dtype=torch.long, device=mask.device)
    positions = torch.arange(mask.shape[1], device=mask.device).unsqueeze(0)
    return torch.where(mask, positions, -1).amax(1)


def gather_last(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    """The value at the last True of each row, in float32 (float64 stays); 0, without a gradient, for an empty row."""
    check_floating(values=values)
    check_same_shape(values=values, mask=mask)
    positions = torch.arange(mask.shape[1], device=mask.device).unsqueeze(0)
    return kept(values, positions == last_token_index(mask).unsqueeze(1)).sum(1)


def position_ids(attention_mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Position of each token counted from the first real one, so that left padding shifts nothing; 0 before it."""
    check_bool(attention_mask=attention_mask)
    check_rank(2, attention_mask=attention_mask)
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def _pad(
    sequences: Sequence[Sequence[int]], pad_id: int, width: int | None, left: bool
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    longest = max((len(sequence) for sequence in sequences), default=0)
    width = longest if width is None else width
    if longest > width:
        raise ValueError(f"width {width} is too small for a sequence of {longest} tokens")
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        slots = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[row, slots] = torch.tensor(list(sequence), dtype=torch.long)
        mask[row, slots] = True
    return ids, mask


def left_pad(
    sequences: Sequence[Sequence[int]], *, pad_id: int, width: int | None = None
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Ids and mask with the padding on the left, as prompts have it; `width=None` is the longest sequence.

    Raises `ValueError` when a sequence is longer than `width`.
    """
    return _pad(sequences, pad_id, width, left=True)


def right_pad(
    sequences: Sequence[Sequence[int]], *, pad_id: int, width: int | None = None
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Ids and mask with the padding on the right, as responses have it; `width=None` is the longest sequence.

    Raises `ValueError` when a sequence is longer than `width`.
    """
    return _pad(sequences, pad_id, width, left=False)


def response_mask(
    response_ids: Int[Tensor, "B R"], *, stop_ids: Sequence[int]
) -> tuple[Bool[Tensor, "B R"], Bool[Tensor, " B"]]:
    """`(mask, stopped)` of freshly sampled responses: True up to and including the first stop token of each row.

    `stopped` says whether a row has one. Takes response ids only: a stop token inside a prompt means nothing. This is
    the one place where a mask is made from ids, since a sampler knows no more; afterwards the mask is carried along.
    """
    check_integer(response_ids=response_ids)
    check_rank(2, response_ids=response_ids)
    stops = torch.isin(response_ids, torch.tensor(list(stop_ids), dtype=response_ids.dtype, device=response_ids.device))
    stops_before = stops.long().cumsum(1) - stops.long()
    return stops_before == 0, stops.any(1)
