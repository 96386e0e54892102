"""The mutations of the losses of reward models."""

from __future__ import annotations

from tests.mutation.table import Module, Mutation

M = Mutation

PREFERENCE_LOSSES = Module(
    "rlhf/ops/preference_losses.py",
    ("test_ops_preference_losses",),
    (
        M("comparison_loss", "sign of the margin", "plain - margin.to(dtype)", "plain + margin.to(dtype)"),
        M(
            "comparison_loss",
            "both sides of a soft label pull one way",
            "(1 - target) * F.logsigmoid(-lead)",
            "(1 - target) * F.logsigmoid(lead)",
        ),
        M(
            "comparison_loss",
            "smoothing towards 0.5 twice as far",
            "(1 - label_smoothing) * target + label_smoothing * (1 - target)",
            "(1 - 2 * label_smoothing) * target + 2 * label_smoothing * (1 - target)",
        ),
        M("comparison_loss", "a tie has a margin", "_outcomes(torch.where(tie, plain, lead),", "_outcomes(lead,"),
        M(
            "comparison_loss",
            "a tie is a soft label under a tie model too",
            "torch.where(tie, -drawn, -target * win - (1 - target) * loss)",
            "-target * win - (1 - target) * loss",
        ),
        M(
            "comparison_loss",
            "a tie counts as decided",
            '"decided": (~tie).sum().to(dtype)',
            '"decided": torch.ones_like(tie).sum().to(dtype)',
        ),
        M("comparison_loss", "theta not squared", "math.expm1(2 * tie_parameter)", "math.expm1(tie_parameter)"),
        M("comparison_loss", "theta helps", "F.logsigmoid(lead - tie_parameter)", "F.logsigmoid(lead + tie_parameter)"),
        M("comparison_loss", "strengths not under the root", "[lead / 2, -lead / 2,", "[lead, -lead,"),
        M(
            "ranking_loss",
            "drawn from all at every place",
            "(mask.unsqueeze(2) & mask.unsqueeze(1)).triu()",
            "(mask.unsqueeze(2) & mask.unsqueeze(1))",
        ),
        M("ranking_loss", "first only takes all", "losses[:, 0] if first_only else losses.sum(1)", "losses.sum(1)"),
        M("ranking_loss", "worst first", ".triu()\n", ".tril()\n"),
        M("ranking_loss", "padding drawn too", "torch.where(mask, left - values, 0.0)", "(left - values)"),
        M("ranking_loss", "weights ignored", "losses = losses * weights.to(losses.dtype)", "losses = losses * 1"),
        M("rating_loss", "no half", "0.5 * (values - wanted).square()", "(values - wanted).square()"),
        M(
            "rating_loss",
            "target of the other end",
            "-wanted * F.logsigmoid(values)",
            "-(1 - wanted) * F.logsigmoid(values)",
        ),
        M(
            "rating_loss",
            "error of the score and not of its sigmoid",
            'fitted = values if form == "squared" else values.sigmoid()',
            "fitted = values",
        ),
    ),
)
