"""Tokens that cannot be drawn in the first slots: in draws, in logits, and in the exact KL of two such models."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.errors import ArtifactError
from rlhf.models.sampling import Suppressed, draw_tokens, suppress_logits
from rlhf.ops.kl import full_kl
from tests.unit.ragged import backward


def test_draws_never_take_a_suppressed_token() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]]).expand(4, -1)
    uniforms = torch.tensor([0.0, 0.49, 0.5, 1.0], dtype=torch.float64)
    tokens, logprobs = draw_tokens(logits, uniforms, 0.7)
    assert tokens.tolist() == [0, 0, 2, 2]
    assert logprobs.tolist() == pytest.approx([math.log(0.5)] * 4)


def test_suppressed_logits_beyond_the_first_slots_are_left_alone() -> None:
    logits = torch.randn(2, 3, 5)
    assert suppress_logits(logits, None) is logits
    assert suppress_logits(logits, Suppressed((1,), 2), first_slot=2) is logits
    found = suppress_logits(logits, Suppressed((1, 4), 2), first_slot=1)
    assert (found[:, 0, [1, 4]] == -math.inf).all()
    assert torch.equal(found[:, 0, [0, 2, 3]], logits[:, 0, [0, 2, 3]])
    assert torch.equal(found[:, 1:], logits[:, 1:])
    with pytest.raises(ValueError, match="must not be negative"):
        Suppressed((1,), -1)


def test_exact_kl_of_suppressed_logits() -> None:
    """Both distributions lack the same tokens: the KL is that of the others, and its gradient is finite."""
    logits, reference = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5)
    suppressed = Suppressed((1, 4), 2)
    found = full_kl(
        logits=suppress_logits(logits, suppressed),
        reference_logits=suppress_logits(reference, suppressed),
        temperature=0.7,
    )
    others = [0, 2, 3]
    expected = full_kl(logits=logits[..., others], reference_logits=reference[..., others], temperature=0.7)
    torch.testing.assert_close(found[:, :2], expected[:, :2])
    full = full_kl(logits=logits, reference_logits=reference, temperature=0.7)
    torch.testing.assert_close(found[:, 2], full[:, 2])
    backward(found.sum())
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, :2, [1, 4]] == 0).all()
    assert (logits.grad[:, :2, others].abs().sum(-1) > 0).all()


def test_logits_that_are_not_finite_are_named() -> None:
    with pytest.raises(ArtifactError, match="not finite"):
        draw_tokens(torch.full((1, 5), torch.nan), torch.tensor([0.5], dtype=torch.float64), 1.0)
