"""The KL term of the loss: its values, and which gradient each estimator really has."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.ops.kl import full_kl
from rlhf.ops.logprobs import token_logprobs
from rlhf.ops.losses import KLLossEstimator, kl_loss
from tests.unit import oracles
from tests.unit.ragged import backward, normal, prefix_mask, ragged

ESTIMATORS: tuple[KLLossEstimator, ...] = ("k1", "k2", "k3")
VOCABULARY = 7


def test_by_hand() -> None:
    # Probabilities 1/2 against 1/4, then 1/4 against 1/2; a padded third. d = log 2 and -log 2.
    #   k1: 0 in total.     k2: log^2 2 / 2 twice.      k3: (1/2 - 1 + log 2) + (2 - 1 - log 2) = 1/2.
    # Slopes in the log-prob: k1 and k2 have d itself; k3 has 1 - 1/2 and 1 - 2.
    log2 = math.log(2.0)
    reference = torch.tensor([[-2 * log2, -log2, math.nan]], dtype=torch.float64)
    mask = prefix_mask([2], 3)
    expected: dict[KLLossEstimator, tuple[float, list[float]]] = {
        "k1": (0.0, [log2, -log2, 0.0]),
        "k2": (log2**2, [log2, -log2, 0.0]),
        "k3": (0.5, [0.5, -1.0, 0.0]),
    }
    for estimator, (value, slopes) in expected.items():
        logprobs = torch.tensor([[-log2, -2 * log2, 1e4]], dtype=torch.float64, requires_grad=True)
        loss_sum, count, metrics = kl_loss(
            logprobs=logprobs, reference_logprobs=reference, mask=mask, estimator=estimator
        )
        assert loss_sum.item() == pytest.approx(value, abs=1e-12)
        assert count.item() == 2
        assert metrics["reference_kl"].item() == pytest.approx(value, abs=1e-12)
        backward(loss_sum)
        assert logprobs.grad is not None
        assert logprobs.grad[0].tolist() == pytest.approx(slopes, abs=1e-12)
        # With weights 3 and 1/2, the two tokens count 3 and half; the metric stays what it was.
        weights = torch.tensor([[3.0, 0.5, math.nan]], dtype=torch.float64)
        weighted, _, metrics = kl_loss(
            logprobs=logprobs, reference_logprobs=reference, mask=mask, estimator=estimator, weights=weights
        )
        each = [oracles.kl_estimate(0.5, 0.25, estimator), oracles.kl_estimate(0.25, 0.5, estimator)]
        assert weighted.item() == pytest.approx(3.0 * each[0] + 0.5 * each[1])
        assert metrics["reference_kl"].item() == pytest.approx(value, abs=1e-12)


@given(case=ragged(), estimator=st.sampled_from(ESTIMATORS))
def test_against_oracle_and_split_row_11(case: tuple[Tensor, torch.Generator], estimator: KLLossEstimator) -> None:
    """Row 11: the value is the loop's sum over real tokens, whether rows come together or one at a time."""
    mask, generator = case
    logprobs, reference = normal(mask, generator), normal(mask, generator)
    loss_sum, count, _ = kl_loss(logprobs=logprobs, reference_logprobs=reference, mask=mask, estimator=estimator)
    pairs = zip(logprobs[mask].exp().tolist(), reference[mask].exp().tolist(), strict=True)
    expected = sum(oracles.kl_estimate(policy, other, estimator) for policy, other in pairs)
    assert loss_sum.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert count.item() == int(mask.sum())
    parts = [
        kl_loss(
            logprobs=logprobs[row : row + 1],
            reference_logprobs=reference[row : row + 1],
            mask=mask[row : row + 1],
            estimator=estimator,
        )[0]
        for row in reversed(range(len(mask)))
    ]
    assert float(sum(parts)) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def _every_token(policy: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs (1, V) of every token under both, and the policy's probabilities: an expectation without sampling."""
    tokens = torch.arange(VOCABULARY).unsqueeze(0)
    shape = (1, VOCABULARY, VOCABULARY)
    mine = token_logprobs(logits=policy.expand(shape), tokens=tokens, temperature=1.0)
    theirs = token_logprobs(logits=reference.expand(shape), tokens=tokens, temperature=1.0)
    return mine, theirs, mine.detach().exp()


def _expected_gradient(policy: Tensor, reference: Tensor, estimator: KLLossEstimator) -> tuple[Tensor, Tensor]:
    """The loss and its gradient in the logits, each token weighted by how often the policy draws it."""
    leaf = policy.clone().requires_grad_()
    mine, theirs, probabilities = _every_token(leaf, reference)
    loss_sum, _, _ = kl_loss(
        logprobs=mine,
        reference_logprobs=theirs,
        mask=torch.ones(1, VOCABULARY, dtype=torch.bool),
        estimator=estimator,
        weights=probabilities,
    )
    backward(loss_sum)
    assert leaf.grad is not None
    return loss_sum.detach(), leaf.grad


@pytest.fixture
def distributions() -> tuple[Tensor, Tensor]:
    """Logits (1, 1, V) of a policy and a reference far apart, so that the directions of the KL differ."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(1, 1, VOCABULARY, generator=generator, dtype=torch.float64) for _ in range(2))
    return 1.5 * policy, reference


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_the_expected_gradient_of_k1_and_k2_is_that_of_the_kl(
    estimator: KLLossEstimator, distributions: tuple[Tensor, Tensor]
) -> None:
    """Exact, by enumerating the vocabulary: the gradient of KL(policy || reference), though k2's value is biased."""
    policy, reference = distributions
    exact = policy.clone().requires_grad_()
    divergence = full_kl(logits=exact, reference_logits=reference, temperature=1.0).sum()
    backward(divergence)
    value, gradient = _expected_gradient(policy, reference, estimator)
    torch.testing.assert_close(gradient, exact.grad, rtol=1e-9, atol=1e-12)
    if estimator == "k1":
        assert value.item() == pytest.approx(divergence.item(), rel=1e-9)
    else:
        assert abs(value.item() - divergence.item()) > 0.05 * divergence.item()


def test_the_expected_gradient_of_k3_is_that_of_the_other_direction(distributions: tuple[Tensor, Tensor]) -> None:
    """k3's value is KL(policy || reference), its gradient that of KL(reference || policy)."""
    policy, reference = distributions
    other = policy.clone().requires_grad_()
    backward(full_kl(logits=reference, reference_logits=other, temperature=1.0).sum())
    value, gradient = _expected_gradient(policy, reference, "k3")
    torch.testing.assert_close(gradient, other.grad, rtol=1e-9, atol=1e-12)
    exact = full_kl(logits=policy, reference_logits=reference, temperature=1.0)
    assert value.item() == pytest.approx(exact.item(), rel=1e-9)


def test_differentiating_the_log_ratio_itself_would_do_nothing(distributions: tuple[Tensor, Tensor]) -> None:
    """Why k1 borrows the gradient of k2: the score function alone has the expectation zero."""
    policy, reference = distributions
    leaf = policy.clone().requires_grad_()
    mine, theirs, probabilities = _every_token(leaf, reference)
    backward((probabilities * (mine - theirs)).sum())
    assert leaf.grad is not None
    assert leaf.grad.abs().max().item() < 1e-12


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_step_with_the_term_alone_lowers_the_kl_row_5(
    estimator: KLLossEstimator, distributions: tuple[Tensor, Tensor]
) -> None:
    """Row 5: the sign of the term. One step on sampled tokens moves the policy towards the reference."""
    policy, reference = (tensor.float() for tensor in distributions)
    before = full_kl(logits=policy, reference_logits=reference, temperature=1.0).item()
    tokens = torch.multinomial(
        policy[0].softmax(-1), 2000, replacement=True, generator=torch.Generator().manual_seed(1)
    )
    leaf = policy.clone().requires_grad_()
    shape = (1, tokens.shape[1], VOCABULARY)
    loss_sum, count, _ = kl_loss(
        logprobs=token_logprobs(logits=leaf.expand(shape), tokens=tokens, temperature=1.0),
        reference_logprobs=token_logprobs(logits=reference.expand(shape), tokens=tokens, temperature=1.0),
        mask=torch.ones(1, tokens.shape[1], dtype=torch.bool),
        estimator=estimator,
    )
    backward(loss_sum / count)
    assert leaf.grad is not None
    after = full_kl(logits=policy - 0.2 * leaf.grad, reference_logits=reference, temperature=1.0).item()
    assert after < 0.98 * before


def test_only_the_policy_gets_a_gradient_and_equal_models_none() -> None:
    mine, theirs = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    weights = torch.ones(2, 3, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    for estimator in ESTIMATORS:
        loss_sum, _, metrics = kl_loss(
            logprobs=mine, reference_logprobs=theirs, mask=mask, estimator=estimator, weights=weights
        )
        backward(loss_sum)
        assert not metrics["reference_kl"].requires_grad
        same = mine.detach().clone().requires_grad_()
        zero, _, _ = kl_loss(logprobs=same, reference_logprobs=mine.detach(), mask=mask, estimator=estimator)
        backward(zero)
        assert zero.item() == 0.0
        assert same.grad is not None
        assert (same.grad == 0).all()
    assert mine.grad is not None
    assert theirs.grad is None
    assert weights.grad is None


def test_refusals_rows_4_and_29() -> None:
    """Rows 4, 29: a bool mask, one shape, a known estimator, keywords."""
    ones, mask = torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(TypeError, match="mask must be a bool"):
        kl_loss(logprobs=ones, reference_logprobs=ones, mask=ones, estimator="k2")
    with pytest.raises(ValueError, match=r"reference_logprobs \(1, 2\)"):
        kl_loss(logprobs=ones, reference_logprobs=ones[:1], mask=mask, estimator="k2")
    with pytest.raises(ValueError, match="estimator must be k1, k2 or k3"):
        kl_loss(logprobs=ones, reference_logprobs=ones, mask=mask, estimator="k4")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="positional"):
        kl_loss(ones, ones, mask, "k2")  # type: ignore[call-arg]
