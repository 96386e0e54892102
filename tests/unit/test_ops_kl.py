"""KL estimators and the exact KL."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.ops import kl as module
from rlhf.ops.kl import full_kl, k1, k2, k3
from rlhf.ops.logprobs import token_logprobs
from tests.unit import oracles
from tests.unit.ragged import backward


def test_estimators_by_hand() -> None:
    # Policy 1/2, reference 1/4: log ratio log 2; k3 = 1/2 - 1 + log 2. And the other way round: k3 = 2 - 1 - log 2.
    policy = torch.tensor([[math.log(0.5), math.log(0.25)]])
    reference = torch.tensor([[math.log(0.25), math.log(0.5)]])
    log2 = math.log(2.0)
    arguments = {"logprobs": policy, "reference_logprobs": reference}
    assert k1(**arguments)[0].tolist() == pytest.approx([log2, -log2])
    assert k2(**arguments)[0].tolist() == pytest.approx([log2**2 / 2, log2**2 / 2])
    assert k3(**arguments)[0].tolist() == pytest.approx([log2 - 0.5, 1 - log2], abs=1e-6)


def test_expected_k1_and_k3_are_the_exact_kl() -> None:
    """Summed over the vocabulary with the policy's probabilities, both are KL(policy || reference), not the reverse."""
    policy, reference = torch.randn(1, 1, 9, dtype=torch.float64), torch.randn(1, 1, 9, dtype=torch.float64)
    expected = oracles.kl(policy[0, 0].tolist(), reference[0, 0].tolist(), 0.7)
    every = torch.arange(9).unsqueeze(0)
    arguments = {
        "logprobs": token_logprobs(logits=policy.expand(1, 9, 9), tokens=every, temperature=0.7),
        "reference_logprobs": token_logprobs(logits=reference.expand(1, 9, 9), tokens=every, temperature=0.7),
    }
    weights = arguments["logprobs"].exp()
    assert (weights * k1(**arguments)).sum().item() == pytest.approx(expected, rel=1e-9)
    assert (weights * k3(**arguments)).sum().item() == pytest.approx(expected, rel=1e-9)
    assert full_kl(logits=policy, reference_logits=reference, temperature=0.7).item() == pytest.approx(expected)
    # k2 is biased, but near equality it is the KL to second order.
    near = policy + 1e-3 * torch.randn_like(policy)
    arguments["reference_logprobs"] = token_logprobs(logits=near.expand(1, 9, 9), tokens=every, temperature=0.7)
    exact = full_kl(logits=policy, reference_logits=near, temperature=0.7).item()
    assert (weights * k2(**arguments)).sum().item() == pytest.approx(exact, rel=1e-2)


def test_k1_is_not_clamped_row_35() -> None:
    """Row 35: log-ratio noise of mean zero gives a penalty of mean zero."""
    noise = torch.randn(16, 8)
    symmetric = torch.cat([noise, -noise])
    penalty = k1(logprobs=symmetric - 2.0, reference_logprobs=torch.full_like(symmetric, -2.0))
    assert penalty.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert (penalty < 0).any()


def test_k3_keeps_its_digits_near_zero() -> None:
    # For a log ratio d, k3 = d^2/2 - d^3/6 + ...; in float32, exp(d) - 1 - d would be rounding noise here.
    difference = 1e-3
    found = k3(logprobs=torch.zeros(1, 1), reference_logprobs=torch.full((1, 1), difference)).item()
    assert found == pytest.approx(difference**2 / 2, rel=1e-3)


def test_full_kl_against_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference = torch.randn(5, 3, 6), torch.randn(5, 3, 6)
    whole = full_kl(logits=policy, reference_logits=reference, temperature=0.7)
    for row in range(5):
        for slot in range(3):
            expected = oracles.kl(policy[row, slot].tolist(), reference[row, slot].tolist(), 0.7)
            assert whole[row, slot].item() == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(module, "MAX_BLOCK_ENTRIES", 40)
    torch.testing.assert_close(full_kl(logits=policy, reference_logits=reference, temperature=0.7), whole)
    assert (full_kl(logits=policy, reference_logits=policy, temperature=0.7) == 0).all()


def test_full_kl_with_excluded_tokens() -> None:
    # Both exclude token 2; the others are 1/2 against 1/4 and 3/4: log 2 / 2 + log(2/3) / 2.
    policy = torch.tensor([[[0.0, 0.0, -math.inf]]], requires_grad=True)
    reference = torch.tensor([[[0.0, math.log(3.0), -math.inf]]])
    found = full_kl(logits=policy, reference_logits=reference, temperature=1.0)
    assert found.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)
    backward(found.sum())
    assert policy.grad is not None
    assert policy.grad.isfinite().all()


@pytest.mark.parametrize("loss", ["full", "k2", "k3"])
def test_a_step_with_the_kl_alone_lowers_it_row_5(loss: str) -> None:
    """Row 5: the sign of a KL loss. Descending it moves the policy towards the reference."""
    reference = torch.randn(1, 1, 6, dtype=torch.float64)
    policy = torch.randn(1, 1, 6, dtype=torch.float64, requires_grad=True)

    def exact() -> torch.Tensor:
        return full_kl(logits=policy, reference_logits=reference, temperature=1.0).sum()

    before = exact()
    if loss == "full":
        backward(before)
    else:
        tokens = torch.multinomial(policy.detach()[0].softmax(-1), 4000, replacement=True)
        mine = token_logprobs(logits=policy.expand(1, 4000, 6), tokens=tokens, temperature=1.0)
        theirs = token_logprobs(logits=reference.expand(1, 4000, 6), tokens=tokens, temperature=1.0)
        estimate = {"k2": k2, "k3": k3}[loss](logprobs=mine, reference_logprobs=theirs)
        backward(estimate.sum() / 4000)
    assert policy.grad is not None
    with torch.no_grad():
        policy -= 0.1 * policy.grad
    assert exact() < before


def test_refusals_row_29() -> None:
    """Row 29: nothing broadcasts."""
    for estimator in (k1, k2, k3):
        with pytest.raises(ValueError, match="reference_logprobs"):
            estimator(logprobs=torch.zeros(2, 3), reference_logprobs=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="reference_logits"):
        full_kl(logits=torch.zeros(2, 3, 4), reference_logits=torch.zeros(1, 3, 4), temperature=1.0)
    with pytest.raises(ValueError, match="temperature"):
        full_kl(logits=torch.zeros(2, 3, 4), reference_logits=torch.zeros(2, 3, 4), temperature=-1.0)
