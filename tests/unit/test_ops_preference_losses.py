"""Soft labels, ties, rankings and ratings: numbers by hand, loops over probabilities, gradients, refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.ops.losses import pairwise_loss
from rlhf.ops.preference_losses import comparison_loss, ranking_loss, rating_loss
from tests.unit.ragged import backward

LOG3 = math.log(3.0)
ZERO = torch.zeros(1, dtype=torch.float64)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one(lead: float, probability: float, **options: Any) -> float:
    """The loss of one comparison."""
    return comparison_loss(chosen=doubles(lead), rejected=ZERO, probability=doubles(probability), **options)[0].item()


def test_certain_labels_give_the_plain_loss() -> None:
    chosen, rejected, margin = (torch.randn(7, dtype=torch.float64) for _ in range(3))
    expected = pairwise_loss(chosen=chosen, rejected=rejected, margin=margin)[0]
    found, count, metrics = comparison_loss(
        chosen=chosen, rejected=rejected, probability=torch.ones(7, dtype=torch.float64), margin=margin
    )
    torch.testing.assert_close(found, expected)
    assert count.item() == metrics["decided"].item() == 7


def test_soft_labels_smoothing_margins_and_weights_by_hand() -> None:
    # sigmoid(log 3) = 3/4. p = 0.8: -.8 log 3/4 - .2 log 1/4. A tie: the mean of both logarithms.
    assert one(LOG3, 0.8) == pytest.approx(0.8 * math.log(4 / 3) + 0.2 * math.log(4))
    assert one(LOG3, 0.5) == pytest.approx(0.5 * math.log(4 / 3) + 0.5 * math.log(4))
    # Smoothing .1 makes 1 to .9, and .8 to .74; a margin of log 3 makes the pair even.
    assert one(LOG3, 1.0, label_smoothing=0.1) == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4))
    assert one(LOG3, 0.8, label_smoothing=0.1) == pytest.approx(0.74 * math.log(4 / 3) + 0.26 * math.log(4))
    assert one(LOG3, 1.0, margin=doubles(LOG3)) == pytest.approx(math.log(2))
    assert one(LOG3, 1.0, weights=doubles(2.5)) == pytest.approx(2.5 * math.log(4 / 3))
    # The least of a soft label's loss is where sigmoid(lead) = p.
    lead = doubles(math.log(4)).requires_grad_()
    backward(comparison_loss(chosen=lead, rejected=ZERO, probability=doubles(0.8))[0])
    assert lead.grad is not None
    assert lead.grad.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("model", "parameter"), [("rao_kupper", math.log(2)), ("davidson", 0.5)])
def test_outcomes_of_tie_models_are_those_of_their_papers(model: Any, parameter: float) -> None:
    """With strengths 3 and 1. Rao-Kupper, theta = 2: 3/5, 1/7. Davidson, nu = .5: to 4 + sqrt(3) / 2."""
    win, loss, tie = (
        one(*case, tie_model=model, tie_parameter=parameter) for case in ((LOG3, 1), (-LOG3, 1), (LOG3, 0.5))
    )
    if model == "rao_kupper":
        expected = (3 / 5, 1 / 7, 1 - 3 / 5 - 1 / 7)
    else:
        whole = 4 + 0.5 * math.sqrt(3)
        expected = (3 / whole, 1 / whole, 0.5 * math.sqrt(3) / whole)
    assert [math.exp(-value) for value in (win, loss, tie)] == pytest.approx(expected)
    # A vote that is no tie is of wins and losses; a tie has no margin and no smoothing.
    assert one(LOG3, 0.9, tie_model=model, tie_parameter=parameter) == pytest.approx(0.9 * win + 0.1 * loss)
    options: dict[str, Any] = {"tie_model": model, "tie_parameter": parameter, "margin": doubles(1.0)}
    assert one(LOG3, 0.5, label_smoothing=0.2, **options) == pytest.approx(tie)
    assert one(LOG3 + 1, 1.0, **options) == pytest.approx(win)


def test_metrics_leave_ties_out() -> None:
    _, _, metrics = comparison_loss(
        chosen=doubles(2, 1, 1, 9), rejected=doubles(1, 3, 1, 0), probability=doubles(1, 0.9, 1, 0.5)
    )
    assert metrics["decided"].item() == 3
    assert metrics["accuracy"].item() == 1.5
    assert metrics["score_difference"].item() == -1.0


def test_far_scores_stay_finite() -> None:
    for model in (None, "rao_kupper", "davidson"):
        for lead, probability in itertools.product((-900.0, 900.0), (0.5, 0.7, 1.0)):
            scores = torch.tensor([lead], requires_grad=True)
            loss = comparison_loss(
                chosen=scores,
                rejected=torch.zeros(1),
                probability=torch.tensor([probability]),
                tie_model=model,
            )[0]
            backward(loss)
            assert loss.isfinite()
            assert scores.grad is not None
            assert scores.grad.isfinite().all()


@pytest.mark.parametrize("model", [None, "rao_kupper", "davidson"])
def test_gradients_are_those_of_finite_differences(model: Any) -> None:
    probability, margin, weights = doubles(1, 0.5, 0.7), doubles(0.3, 9, -0.2), doubles(1, 0.5, 2)

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return comparison_loss(
            chosen=chosen, rejected=rejected, probability=probability, margin=margin, weights=weights, tie_model=model
        )[0]

    scores = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(loss, scores)


def test_ranking_by_drawing_one_after_the_other() -> None:
    # exp(score) 3, 2, 1: 3/6, then 2/3, then 1. A row of two: 1/4. A row of one says nothing.
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 7.0], [5.0, 7.0, 7.0]], dtype=torch.float64).log()
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    loss, count, metrics = ranking_loss(scores=scores, mask=mask)
    assert loss.item() == pytest.approx(math.log(6 / 3 * 3 / 2) + math.log(4))
    assert count.item() == 3
    assert metrics["decided"].item() == 4
    assert metrics["accuracy"].item() == 3
    assert metrics["score_difference"].item() == pytest.approx(math.log(3 / 2) + LOG3 + math.log(2) - LOG3)
    weighted = ranking_loss(scores=scores, mask=mask, weights=doubles(2, 3, 4))[0]
    assert weighted.item() == pytest.approx(2 * LOG3 + 3 * math.log(4))
    # Two responses: Bradley and Terry.
    pair = pairwise_loss(chosen=scores[1:2, 0], rejected=scores[1:2, 1])[0]
    assert ranking_loss(scores=scores[1:2], mask=mask[1:2])[0].item() == pytest.approx(pair.item())


def test_a_choice_is_the_first_draw_alone() -> None:
    # exp(score) 3, 2, 1: 3/6, whatever the order of the others. A row of two: 1/4.
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 7.0]], dtype=torch.float64).log()
    mask = torch.tensor([[True, True, True], [True, True, False]])
    loss, count, metrics = ranking_loss(scores=scores, mask=mask, first_only=True)
    assert loss.item() == pytest.approx(math.log(2) + math.log(4))
    assert count.item() == 2
    # The first against each of the others: 3 > 2, 3 > 1, and 1 < 3.
    assert (metrics["decided"].item(), metrics["accuracy"].item()) == (3, 2)
    assert metrics["score_difference"].item() == pytest.approx(math.log(3 / 2) + LOG3 - LOG3)
    weighted = ranking_loss(scores=scores, mask=mask, weights=doubles(2, 3), first_only=True)[0]
    assert weighted.item() == pytest.approx(2 * math.log(2) + 3 * math.log(4))


def test_orders_of_four_have_probability_one_together() -> None:
    scores = torch.randn(4, dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    total = sum(
        math.exp(-ranking_loss(scores=scores[list(order)].unsqueeze(0), mask=mask)[0].item())
        for order in itertools.permutations(range(4))
    )
    assert total == pytest.approx(1.0)


def test_padding_of_a_ranking_changes_nothing() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    values = torch.randn(2, 3, dtype=torch.float64)
    found = []
    for fill in (0.0, 1e4, math.nan):
        scores = torch.where(mask, values, fill).requires_grad_()
        loss, _, metrics = ranking_loss(scores=scores, mask=mask)
        backward(loss)
        assert scores.grad is not None
        found.append([loss.detach(), *metrics.values(), scores.grad])
    for other in found[1:]:
        for value, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(value, expected)
    assert float(found[0][-1][0, 2]) == 0.0
    assert torch.autograd.gradcheck(
        lambda scores: ranking_loss(scores=scores, mask=mask)[0], values.clone().requires_grad_()
    )


def test_ratings_by_hand() -> None:
    scores, targets, weights = doubles(1, -2), doubles(0, 1), doubles(2, 1)
    loss, count, metrics = rating_loss(scores=scores, targets=targets, form="squared", weights=weights)
    assert loss.item() == pytest.approx(2 * 0.5 + 0.5 * 9)
    assert count.item() == 2
    assert metrics["squared_error"].item() == pytest.approx(10.0)
    loss, _, metrics = rating_loss(scores=doubles(LOG3), targets=doubles(0.8), form="logistic")
    assert loss.item() == pytest.approx(0.8 * math.log(4 / 3) + 0.2 * math.log(4))
    assert metrics["squared_error"].item() == pytest.approx(0.05**2)


def test_losses_of_bf16_scores_are_float32() -> None:
    scores = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    ones = torch.ones(2, dtype=torch.float64)
    assert comparison_loss(chosen=scores, rejected=scores, probability=ones)[0].dtype == torch.float32
    assert rating_loss(scores=scores, targets=ones, form="squared")[0].dtype == torch.float32
    assert ranking_loss(scores=scores.unsqueeze(0), mask=torch.ones(1, 2, dtype=torch.bool))[0].dtype == torch.float32


def test_refusals() -> None:
    two, ones = torch.ones(2), torch.ones(2)
    with pytest.raises(ValueError, match="one shape"):
        comparison_loss(chosen=two, rejected=torch.ones(3), probability=ones)
    with pytest.raises(ValueError, match="label_smoothing"):
        comparison_loss(chosen=two, rejected=two, probability=ones, label_smoothing=0.5)
    for parameter in (0.0, math.inf):
        with pytest.raises(ValueError, match="tie_parameter"):
            comparison_loss(chosen=two, rejected=two, probability=ones, tie_parameter=parameter)
    with pytest.raises(ValueError, match="tie_model"):
        comparison_loss(chosen=two, rejected=two, probability=ones, tie_model="luck")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights"):
        ranking_loss(scores=torch.ones(2, 3), mask=torch.ones(2, 3, dtype=torch.bool), weights=torch.ones(3))
    with pytest.raises(TypeError, match="bool"):
        ranking_loss(scores=torch.ones(2, 3), mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        rating_loss(scores=two, targets=2 * ones, form="logistic")
    with pytest.raises(ValueError, match="form"):
        rating_loss(scores=two, targets=ones, form="cubic")  # type: ignore[arg-type]
