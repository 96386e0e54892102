"""A second pass over recomputed logits takes what the first one found, and its gradient takes their memory."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.ops.logprobs import Memo, logprobs_and_entropy
from tests.unit.ragged import backward


def _gradient(logits: Tensor, tokens: Tensor, memo: Memo | None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and the gradient of a loss that looks at every second token, through a copy of the leaf."""
    leaf = logits.clone().requires_grad_()
    found = logprobs_and_entropy(logits=leaf, tokens=tokens, temperature=0.7, memo=memo)
    backward((found[0] * 1.5 - found[1] * 0.3)[:, ::2].sum())
    assert leaf.grad is not None
    return found[0].detach(), found[1].detach(), leaf.grad


def test_a_memo_changes_no_number() -> None:
    logits, tokens = torch.randn(2, 3, 5, dtype=torch.float64), torch.randint(0, 5, (2, 3))
    expected = _gradient(logits, tokens, None)
    memo = Memo()
    for _ in ("filled by the first", "read by the second"):
        for found, right in zip(_gradient(logits, tokens, memo), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=0)
        assert memo.found is not None


def test_only_recomputed_logits_are_written_over() -> None:
    logits, tokens = torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))
    memo = Memo()
    for recomputed in (False, True):
        leaf = logits.clone().requires_grad_()
        inside = leaf * 1.0
        before = inside.detach().clone()
        logprobs, _ = logprobs_and_entropy(logits=inside, tokens=tokens, temperature=1.0, memo=memo)
        backward(logprobs.sum())
        assert torch.equal(inside.detach(), before) != recomputed
