"""Positions, padding and the masks of sampled responses."""

from __future__ import annotations

import pytest
import torch

from rlhf.ops.sequences import gather_last, last_token_index, left_pad, position_ids, response_mask, right_pad
from tests.unit.ragged import backward

PAD = 9


def test_last_token_index_comes_from_the_mask() -> None:
    """Row 21: the last real token wherever the padding sits: right, left, in the middle, everywhere."""
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert last_token_index(mask).tolist() == [1, 3, 2, -1, 3]
    assert last_token_index(torch.zeros(2, 0, dtype=torch.bool)).tolist() == [-1, -1]


def test_gather_last() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1]]).bool()
    values = torch.tensor([[1.0, 2.0, float("nan")], [float("nan")] * 3, [float("nan"), 5.0, 6.0]], requires_grad=True)
    found = gather_last(values, mask)
    assert found.tolist() == [2.0, 0.0, 6.0]
    backward(found.sum())
    assert values.grad is not None
    assert values.grad.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match="mask"):
        gather_last(values, mask[:1])


def test_position_ids_start_at_the_first_real_token() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    found = position_ids(mask)
    assert found.dtype == torch.long
    assert found.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 0, 0, 0]]
    with pytest.raises(TypeError, match="attention_mask must be a bool"):
        position_ids(mask.long())


def test_padding() -> None:
    ids, mask = left_pad([[1, 2, 3], [], [4]], pad_id=PAD)
    assert ids.tolist() == [[1, 2, 3], [PAD, PAD, PAD], [PAD, PAD, 4]]
    assert mask.tolist() == [[True] * 3, [False] * 3, [False, False, True]]
    ids, mask = right_pad([[1, 2, 3], [4]], pad_id=PAD, width=4)
    assert ids.tolist() == [[1, 2, 3, PAD], [4, PAD, PAD, PAD]]
    assert mask.tolist() == [[True, True, True, False], [True, False, False, False]]
    with pytest.raises(ValueError, match="width 2 is too small for a sequence of 3"):
        right_pad([[1, 2, 3]], pad_id=PAD, width=2)


def test_a_real_token_equal_to_the_pad_counts() -> None:
    """Row 22: the mask is from lengths: the pad id inside a sequence is a token like any other."""
    _, mask = right_pad([[PAD, 1, PAD], [PAD]], pad_id=PAD)
    assert last_token_index(mask).tolist() == [2, 0]


def test_response_mask_ends_with_the_first_stop() -> None:
    """Row 20: any of several stop tokens ends a response, EOS or not; the stop itself counts, what follows does not."""
    responses = torch.tensor([[5, 2, 5, 2], [7, 5, 5, 5], [5, 5, 5, 5], [5, 5, 5, 2], [5, 7, 2, 2]])
    mask, stopped = response_mask(responses, stop_ids=[2, 7])
    assert mask.sum(1).tolist() == [2, 1, 4, 4, 2]
    assert mask[0].tolist() == [True, True, False, False]
    assert stopped.tolist() == [True, True, False, True, True]
    # With only token 7 as a stop, token 2 is nothing special.
    mask, stopped = response_mask(responses, stop_ids=[7])
    assert mask.sum(1).tolist() == [4, 1, 4, 4, 2]
    assert stopped.tolist() == [False, True, False, False, True]
    mask, stopped = response_mask(responses, stop_ids=[])
    assert mask.all()
    assert not stopped.any()
    with pytest.raises(TypeError, match="response_ids must be an integer"):
        response_mask(responses.float(), stop_ids=[2])
