"""Losses of reward models beyond the plain pair (`losses.pairwise_loss`): soft labels, ties, rankings, ratings.

Each returns `(loss_sum, count, metrics)` as in `rlhf.ops.losses`: sums, to be divided once by the count of the whole
optimiser step. Rows may carry weights, which multiply their losses and nothing else.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from rlhf.ops._checks import check_bool, check_floating, check_rank, check_same_shape, kept, working_dtype
from rlhf.ops.losses import LossSum

TieModel = Literal["davidson", "rao_kupper"]
RatingForm = Literal["squared", "logistic"]


def comparison_loss(
    *,
    chosen: Float[Tensor, " N"],
    rejected: Float[Tensor, " N"],
    probability: Float[Tensor, " N"],
    margin: Float[Tensor, " N"] | None = None,
    weights: Float[Tensor, " N"] | None = None,
    label_smoothing: float = 0.0,
    tie_model: TieModel | None = None,
    tie_parameter: float = 1.0,
) -> LossSum:
    """Sum over comparisons of -p log P(chosen wins) - (1 - p) log P(rejected wins); the count is of comparisons.

    With d = chosen - rejected - margin and p the label `probability` in [0, 1], moved by `label_smoothing` s to
    (1 - s) p + s (1 - p). Without a tie model P(chosen wins) = sigmoid(d) (Bradley and Terry 1952), so a tie, p = 0.5,
    pulls the scores together. With one, the loss of a tie is -log P(tie) and its margin does not count:

    * `rao_kupper` (Rao and Kupper 1967), theta = exp(tie_parameter): P(win) = sigmoid(d - log theta),
      P(tie) = (theta^2 - 1) P(win) P(loss).
    * `davidson` (Davidson 1970), nu = tie_parameter: wins, losses and ties are as exp(d / 2) to exp(-d / 2) to nu.

    Metrics, over comparisons that are no ties: `decided`, how many; `accuracy`, those with chosen > rejected, equal
    scores counting half; `score_difference`, chosen - rejected. Raises `ValueError` for a tie parameter that is not
    above 0 and a smoothing outside [0, 0.5).
    """
    tensors = {"chosen": chosen, "rejected": rejected, "probability": probability}
    tensors |= {} if margin is None else {"margin": margin}
    tensors |= {} if weights is None else {"weights": weights}
    check_floating(**tensors)
    check_rank(1, **tensors)
    check_same_shape(**tensors)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be at least 0 and below 0.5, but is {label_smoothing}")
    if not 0 < tie_parameter < math.inf:
        raise ValueError(f"tie_parameter must be above 0, but is {tie_parameter}")
    dtype = working_dtype(chosen.dtype)
    plain = chosen.to(dtype) - rejected.to(dtype)
    tie = probability == 0.5
    lead = plain if margin is None else plain - margin.to(dtype)
    target = probability.to(dtype)
    target = (1 - label_smoothing) * target + label_smoothing * (1 - target)
    if tie_model is None:
        losses = -target * F.logsigmoid(lead) - (1 - target) * F.logsigmoid(-lead)
    else:
        win, loss, drawn = _outcomes(torch.where(tie, plain, lead), tie_model, tie_parameter)
        losses = torch.where(tie, -drawn, -target * win - (1 - target) * loss)
    loss_sum = losses.sum() if weights is None else (losses * weights.to(dtype)).sum()
    with torch.no_grad():
        zero = torch.zeros_like(plain)
        metrics = {
            "decided": (~tie).sum().to(dtype),
            "accuracy": torch.where(tie, zero, 0.5 + 0.5 * plain.sign()).sum(),
            "score_difference": torch.where(tie, zero, plain).sum(),
        }
    return loss_sum, torch.tensor(chosen.shape[0], device=chosen.device), metrics


def _outcomes(lead: Tensor, tie_model: TieModel, tie_parameter: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (N,) of win, loss and tie."""
    if tie_model == "rao_kupper":
        win, loss = F.logsigmoid(lead - tie_parameter), F.logsigmoid(-lead - tie_parameter)
        return win, loss, math.log(math.expm1(2 * tie_parameter)) + win + loss
    if tie_model != "davidson":
        raise ValueError(f"tie_model must be davidson, rao_kupper or None, but is {tie_model!r}")
    parts = torch.stack([lead / 2, -lead / 2, torch.full_like(lead, math.log(tie_parameter))])
    win, loss, drawn = parts - parts.logsumexp(0)
    return win, loss, drawn


def ranking_loss(
    *,
    scores: Float[Tensor, "B K"],
    mask: Bool[Tensor, "B K"],
    weights: Float[Tensor, " B"] | None = None,
    first_only: bool = False,
) -> LossSum:
    """Sum over rankings of -log P(order); row b holds the scores of its responses, the best first; count of rankings.

    P is the probability of drawing the responses one after the other, each in proportion to exp(score) among those that
    are left: Plackett 1975 and Luce 1959. With two responses it is that of Bradley and Terry. With `first_only` P is
    that of drawing the first response first, whatever follows: the loss of Ziegler et al. 2019, equation 1. `mask` says
    how many responses a row has. Metrics: those of `comparison_loss`, over the pairs that the loss knows the order of.
    """
    check_floating(scores=scores)
    check_bool(mask=mask)
    check_rank(2, scores=scores, mask=mask)
    check_same_shape(scores=scores, mask=mask)
    values = kept(scores, mask).to(working_dtype(scores.dtype))
    # Is response j (last axis) still there when i is drawn? The lowest number adds nothing to a sum of exponentials.
    remaining = (mask.unsqueeze(2) & mask.unsqueeze(1)).triu()
    lowest = torch.finfo(values.dtype).min
    left = torch.where(remaining, values.unsqueeze(1), lowest).logsumexp(2)
    losses = torch.where(mask, left - values, 0.0)
    losses = losses[:, 0] if first_only else losses.sum(1)
    if weights is not None:
        check_floating(weights=weights)
        check_rank(1, weights=weights)
        if weights.shape[0] != scores.shape[0]:
            raise ValueError(f"expected {scores.shape[0]} weights, one for each ranking, but got {weights.shape[0]}")
        losses = losses * weights.to(losses.dtype)
    with torch.no_grad():
        difference = values.unsqueeze(2) - values.unsqueeze(1)
        pairs = remaining.triu(1)
        if first_only:
            pairs[:, 1:] = False
        zero = torch.zeros_like(difference)
        metrics = {
            "decided": pairs.sum().to(values.dtype),
            "accuracy": torch.where(pairs, 0.5 + 0.5 * difference.sign(), zero).sum(),
            "score_difference": torch.where(pairs, difference, zero).sum(),
        }
    return losses.sum(), torch.tensor(scores.shape[0], device=scores.device), metrics


def rating_loss(
    *,
    scores: Float[Tensor, " N"],
    targets: Float[Tensor, " N"],
    form: RatingForm,
    weights: Float[Tensor, " N"] | None = None,
) -> LossSum:
    """Sum over rated responses of the misfit of their scores; the count is of responses.

    `squared`: (score - target)^2 / 2. `logistic`: the cross-entropy -t log sigmoid(score) - (1 - t) log sigmoid(-score)
    with targets t in [0, 1]; its least is at sigmoid(score) = t. Metric: `squared_error`, of the score, or of its
    sigmoid for `logistic`. Raises `ValueError` for another form and for logistic targets outside [0, 1].
    """
    tensors = {"scores": scores, "targets": targets} | ({} if weights is None else {"weights": weights})
    check_floating(**tensors)
    check_rank(1, **tensors)
    check_same_shape(**tensors)
    dtype = working_dtype(scores.dtype)
    values, wanted = scores.to(dtype), targets.to(dtype)
    if form == "squared":
        losses = 0.5 * (values - wanted).square()
    elif form == "logistic":
        if bool(((targets < 0) | (targets > 1)).any()):
            raise ValueError("the targets of a logistic fit lie in [0, 1]")
        losses = -wanted * F.logsigmoid(values) - (1 - wanted) * F.logsigmoid(-values)
    else:
        raise ValueError(f"form must be squared or logistic, but is {form!r}")
    loss_sum = losses.sum() if weights is None else (losses * weights.to(dtype)).sum()
    with torch.no_grad():
        fitted = values if form == "squared" else values.sigmoid()
        metrics = {"squared_error": (fitted - wanted).square().sum()}
    return loss_sum, torch.tensor(scores.shape[0], device=scores.device), metrics
