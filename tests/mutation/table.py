"""What a mutation is, and those of the losses and of the shared checks; `table_rest.py` has the other modules."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One wrong line: `old`, which occurs once in the module, becomes `new`."""

    operation: str
    what: str
    old: str
    new: str


@dataclass(frozen=True)
class Module:
    """A module, the test files that must notice what happens to it (most telling first), and its mutations."""

    path: str
    tests: tuple[str, ...]
    mutations: tuple[Mutation, ...]


M = Mutation

LOSSES = Module(
    "rlhf/ops/losses.py",
    ("test_ops_losses", "test_ops_aggregation", "test_ops_kl_loss", "test_ops_padding"),
    (
        M(
            "ppo_policy_loss",
            "the larger of the two terms instead of the smaller",
            "objective = torch.minimum(plain, clipped)",
            "objective = torch.maximum(plain, clipped)",
        ),
        M("ppo_policy_loss", "sign of the loss", "loss_sum = -weighted_sum(", "loss_sum = weighted_sum("),
        M(
            "ppo_policy_loss",
            "lower and upper clip swapped",
            "ratio.clamp(1.0 - clip_low, 1.0 + clip_high)",
            "ratio.clamp(1.0 - clip_high, 1.0 + clip_low)",
        ),
        M(
            "ppo_policy_loss",
            "a gradient through the old log-probs",
            "kept(logprobs, mask) - kept(old_logprobs, mask).detach()",
            "kept(logprobs, mask) - kept(old_logprobs, mask)",
        ),
        M(
            "ppo_policy_loss",
            "a gradient through the advantages",
            "advantages = kept(advantages, mask).detach()",
            "advantages = kept(advantages, mask)",
        ),
        M("ppo_policy_loss", "ratio of old to new", "ratio = log_ratio.exp()", "ratio = (-log_ratio).exp()"),
        M(
            "ppo_policy_loss",
            "padding masked after the exponential only",
            "kept(logprobs, mask) - kept(old_logprobs, mask).detach()",
            "logprobs - old_logprobs.detach()",
        ),
        M(
            "ppo_policy_loss",
            "the count includes padding",
            "return loss_sum, mask.sum(), metrics",
            "return loss_sum, torch.tensor(mask.numel()), metrics",
        ),
        M(
            "ppo_policy_loss",
            "tokens inside the clip counted as clipped",
            "(clipped < plain).to(",
            "(clipped <= plain).to(",
        ),
        M(
            "ppo_policy_loss",
            "approximate KL with k3's sign wrong",
            "(torch.expm1(log_ratio) - log_ratio).sum()",
            "(torch.expm1(log_ratio) + log_ratio).sum()",
        ),
        M("ppo_policy_loss", "smallest ratio as the largest", "kept(ratio, mask).amax()", "kept(ratio, mask).amin()"),
        M(
            "ppo_policy_loss",
            "dual clip on positive advantages too",
            "held = (advantages < 0) & (objective",
            "held = (advantages != 0) & (objective",
        ),
        M(
            "ppo_policy_loss",
            "dual clip holds what is above the bound",
            "(objective < dual_clip * advantages)",
            "(objective > dual_clip * advantages)",
        ),
        M(
            "ppo_policy_loss",
            "dual clip bound with the wrong sign",
            "torch.where(held, dual_clip * advantages, objective)",
            "torch.where(held, -dual_clip * advantages, objective)",
        ),
        M(
            "ppo_policy_loss",
            "dual clip of 1 or less accepted",
            "not (1.0 < dual_clip < math.inf)",
            "not (-math.inf < dual_clip < math.inf)",
        ),
        M(
            "weighted_sum",
            "a gradient through the weights",
            "kept(weights, mask).detach().to(inside.dtype)",
            "kept(weights, mask).to(inside.dtype)",
        ),
        M(
            "weighted_sum",
            "weights of padded slots multiplied in",
            "kept(weights, mask).detach().to(inside.dtype)",
            "weights.detach().to(inside.dtype)",
        ),
        M(
            "aggregation_weights",
            "a row's mean over its padded width",
            "return ones / ones.sum(1, keepdim=True).clamp(min=1.0)",
            "return ones / ones.shape[1]",
        ),
        M(
            "aggregation_weights",
            "fixed length of the batch at hand",
            "return ones / length",
            "return ones / ones.shape[1]",
        ),
        M(
            "aggregation_weights",
            "padded slots weigh 1",
            "ones = mask.to(torch.float32)",
            "ones = torch.ones(mask.shape)",
        ),
        M(
            "aggregation_count",
            "excluded rows counted",
            'if aggregation == "token_mean" else mask.any(1).sum()',
            'if aggregation == "token_mean" else torch.tensor(len(mask))',
        ),
        M(
            "aggregation_count",
            "tokens counted for every aggregation",
            'return mask.sum() if aggregation == "token_mean" else mask.any(1).sum()',
            "return mask.sum()",
        ),
        M(
            "kl_loss",
            "k1 differentiated as it stands: no expected gradient",
            "values = (values - values.detach()) + kl.k1(**pair).detach()",
            "values = kl.k1(**pair)",
        ),
        M(
            "kl_loss",
            "k1's value lost to k2's",
            "values = (values - values.detach()) + kl.k1(**pair).detach()",
            "values = values + 0.0",
        ),
        M(
            "kl_loss",
            "a gradient through the reference",
            "kept(reference_logprobs, mask).detach()}",
            "kept(reference_logprobs, mask)}",
        ),
        M(
            "kl_loss",
            "padding of the reference kept",
            "kept(reference_logprobs, mask).detach()}",
            "reference_logprobs.detach()}",
        ),
        M("kl_loss", "k2 where k3 was asked for", "values = kl.k3(**pair) if", "values = kl.k2(**pair) if"),
        M(
            "kl_loss",
            "sign: the term pushes away from the reference",
            "return weighted_sum(values=values, mask=mask, weights=weights), mask.sum(), metrics",
            "return -weighted_sum(values=values, mask=mask, weights=weights), mask.sum(), metrics",
        ),
        M(
            "ppo_value_loss",
            "the smaller of the two errors",
            "0.5 * torch.maximum(errors, clipped_errors)",
            "0.5 * torch.minimum(errors, clipped_errors)",
        ),
        M(
            "ppo_value_loss",
            "the factor 1/2 dropped with a clip",
            "return 0.5 * torch.maximum(errors",
            "return torch.maximum(errors",
        ),
        M(
            "ppo_value_loss",
            "the factor 1/2 dropped without a clip",
            "return 0.5 * errors.sum()",
            "return errors.sum()",
        ),
        M(
            "ppo_value_loss",
            "clipped from above only",
            "torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)",
            "torch.minimum(values, old_values + clip)",
        ),
        M(
            "ppo_value_loss",
            "a gradient through the returns",
            "kept(returns, mask).detach()",
            "kept(returns, mask)",
        ),
        M(
            "ppo_value_loss",
            "a gradient through the old values",
            "kept(old_values, mask).detach()",
            "kept(old_values, mask)",
        ),
        M("ppo_value_loss", "clipped share inverted", "(clipped_errors > errors)", "(clipped_errors < errors)"),
        M("pairwise_loss", "rejected preferred", "difference = chosen - rejected", "difference = rejected - chosen"),
        M("pairwise_loss", "sign of the margin", "difference - margin.to(dtype)", "difference + margin.to(dtype)"),
        M(
            "pairwise_loss",
            "a tie counts as wrong",
            "(0.5 + 0.5 * difference.sign()).sum()",
            "(difference > 0).to(dtype).sum()",
        ),
        M(
            "merge_metrics",
            "maxima added up",
            'torch.maximum(value, second[name]) if name.endswith("_max") else value + second[name]',
            "value + second[name]",
        ),
    ),
)

CHECKS = Module(
    "rlhf/ops/_checks.py",
    ("test_ops_masked", "test_ops_losses", "test_ops_sequences", "test_ops_advantages", "test_ops_padding"),
    (
        M("check_same_shape", "shapes may differ", "tensors.values()}) > 1:", "tensors.values()}) > 9:"),
        M("check_bool", "integer masks accepted", "if tensor.dtype != torch.bool:", "if tensor.is_floating_point():"),
        M("check_rank", "any number of axes accepted", "if tensor.ndim != num_axes:", "if tensor.ndim > num_axes + 9:"),
        M("check_floating", "integers accepted", "if not tensor.is_floating_point():", "if tensor.is_complex():"),
        M(
            "check_integer",
            "floats accepted",
            "if tensor.is_floating_point() or tensor.is_complex()",
            "if tensor.is_complex()",
        ),
        M("check_prefix", "holes accepted in some rows", "& ~mask[:, :-1]).any())", "& ~mask[:, :-1]).all())"),
        M(
            "kept",
            "padding multiplied by zero instead of replaced",
            "torch.where(mask, values.to(working_dtype(values.dtype)), 0.0)",
            "values.to(working_dtype(values.dtype)) * mask",
        ),
        M(
            "working_dtype",
            "sums in bf16",
            "return torch.float64 if dtype == torch.float64 else torch.float32",
            "return dtype",
        ),
    ),
)
