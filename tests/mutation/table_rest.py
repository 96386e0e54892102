"""The mutations of the other modules of `rlhf/ops`, and of how a scored rollout becomes a batch."""

from __future__ import annotations

from tests.mutation.table import CHECKS, LOSSES, M, Module
from tests.mutation.table_preferences import PREFERENCE_LOSSES

MASKED = Module(
    "rlhf/ops/masked.py",
    ("test_ops_masked", "test_ops_padding"),
    (
        M("masked_sum", "mask dropped", "total = kept(values, mask)", "total = values.float()"),
        M(
            "masked_mean",
            "divided by the padded size",
            "count = mask.sum() if dim is None else mask.sum(dim)",
            "count = mask.numel() if dim is None else mask.shape[dim]",
        ),
        M("masked_var", "not centred", "(kept(values, mask) - mean).square()", "kept(values, mask).square()"),
        M(
            "masked_var",
            "ddof = 1",
            "return masked_mean(values=(kept(values, mask) - mean).square(), mask=mask)",
            "return masked_sum(values=(kept(values, mask) - mean).square(), mask=mask) / (mask.sum() - 1)",
        ),
        M(
            "masked_whiten",
            "ddof = 1",
            "variance = centred.square().sum() / count",
            "variance = centred.square().sum() / (count - 1)",
        ),
        M("masked_whiten", "shift_mean inverted", "if not shift_mean:", "if shift_mean:"),
        M(
            "masked_whiten",
            "statistics over padding",
            "count = mask.sum().clamp(min=1)",
            "count = torch.tensor(mask.numel())",
        ),
        M("masked_whiten", "padding not zero", "return torch.where(mask, whitened, 0.0)", "return whitened"),
        M("masked_whiten", "divided by the variance", "torch.rsqrt(variance + WHITEN_EPSILON)", "1.0 / variance"),
        M("explained_variance", "the unexplained share", "1.0 - residual / total", "residual / total"),
        M("explained_variance", "residual of the sum", "values=targets - predictions", "values=targets + predictions"),
    ),
)

KL = Module(
    "rlhf/ops/kl.py",
    ("test_ops_kl",),
    (
        M(
            "k1",
            "sign",
            "return logprobs.to(dtype) - reference_logprobs.to(dtype)",
            "return reference_logprobs.to(dtype) - logprobs.to(dtype)",
        ),
        M(
            "k1",
            "clamped at zero",
            'either sign."""\n    return _log_ratio(logprobs, reference_logprobs)',
            'either sign."""\n    return _log_ratio(logprobs, reference_logprobs).clamp(min=0)',
        ),
        M("k2", "the factor 1/2 dropped", "return 0.5 * _log_ratio", "return _log_ratio"),
        M("k3", "ratio of policy to reference", "log_ratio = -_log_ratio(", "log_ratio = _log_ratio("),
        M(
            "k3",
            "digits lost near zero",
            "torch.expm1(log_ratio) - log_ratio",
            "torch.exp(log_ratio) - 1 - log_ratio",
        ),
        M(
            "full_kl",
            "the other direction",
            "probabilities = logprobs.exp()",
            "probabilities = reference_logprobs.exp()",
        ),
        M(
            "full_kl",
            "reference without temperature",
            "(reference_logits.to(dtype) / temperature)",
            "(reference_logits.to(dtype))",
        ),
        M(
            "full_kl",
            "zero times infinity at excluded tokens",
            "torch.where(probabilities > 0, logprobs - reference_logprobs, 0.0)",
            "logprobs - reference_logprobs",
        ),
        M("full_kl", "one block only", "range(0, max(1, logits.shape[0]), rows)", "range(0, 1, rows)"),
    ),
)

ADVANTAGES = Module(
    "rlhf/ops/advantages.py",
    ("test_ops_advantages", "test_ops_padding"),
    (
        M(
            "value_mask",
            "no slot after the last token",
            "extended[:, 1:] |= mask[:, :-1]",
            "extended[:, 1:] &= mask[:, :-1]",
        ),
        M(
            "token_rewards",
            "the KL is a reward",
            "penalties = -kl_coefficient * kept",
            "penalties = kl_coefficient * kept",
        ),
        M("token_rewards", "the KL of padding counts", "kl_coefficient * kept(kl, mask)", "kl_coefficient * kl"),
        M(
            "token_rewards",
            "the score one token early",
            "slot = last_token_index(value_mask(mask=mask, score_position=score_position))",
            "slot = last_token_index(value_mask(mask=mask, score_position=score_position)) - 1",
        ),
        M(
            "token_rewards",
            "score_position ignored",
            "last_token_index(value_mask(mask=mask, score_position=score_position))",
            "last_token_index(mask)",
        ),
        M(
            "gae",
            "mask dropped",
            "rewards, values = kept(rewards, mask), kept(values, mask)",
            "rewards, values = rewards.clone(), values.clone()",
        ),
        M("gae", "sign of the next value", "+ gamma * following_value -", "- gamma * following_value -"),
        M("gae", "next value not discounted", "+ gamma * following_value -", "+ following_value -"),
        M("gae", "gamma missing in the recursion", "delta + gamma * lam * following", "delta + lam * following"),
        M("gae", "lambda missing in the recursion", "delta + gamma * lam * following", "delta + gamma * following"),
        M("gae", "first token left out", "range(mask.shape[1] - 1, -1, -1)", "range(mask.shape[1] - 1, 0, -1)"),
        M(
            "gae",
            "returns are the advantages",
            "return advantages, advantages + values",
            "return advantages, advantages",
        ),
        M("gae", "a token's own value as the next", "following_value = values[:, slot]", "following_value = delta"),
        M("gae", "advantages carry a gradient", "@torch.no_grad()\ndef gae(", "def gae("),
    ),
)

LOGPROBS = Module(
    "rlhf/ops/logprobs.py",
    ("test_ops_logprobs", "test_ops_memo"),
    (
        M(
            "token_logprobs",
            "temperature forgotten",
            "scaled = logits[block].to(dtype) / temperature",
            "scaled = logits[block].to(dtype)",
        ),
        M(
            "token_logprobs",
            "gradient without the temperature",
            "result[block] = total.div_(ctx.temperature).masked_fill_(",
            "result[block] = total.masked_fill_(",
        ),
        M(
            "row_blocks",
            "one block of rows only",
            "for row in range(0, num_rows, rows):",
            "for row in range(0, 1, rows):",
        ),
        M("check_temperature", "a temperature of zero accepted", "if not temperature > 0", "if not temperature >= 0"),
        M(
            "Excluded",
            "excluded tokens left in",
            "masked_fill_(slots, value)",
            "masked_fill_(slots & False, value)",
        ),
        M(
            "logprobs_and_entropy",
            "slope of the entropy without its value",
            "total.sub_(probabilities * entropies[block].unsqueeze(-1)).mul_(gradient)",
            "total.mul_(gradient)",
        ),
        M(
            "token_logprobs",
            "gradient without the softmax",
            "weighted = probabilities.mul_(gradient)",
            "weighted = probabilities.mul_(0.0)",
        ),
        M(
            "Memo",
            "the gradient written over logits that others hold",
            "ctx.overwrite = memo is not None and memo.found is not None",
            "ctx.overwrite = memo is not None",
        ),
        M(
            "entropy",
            "sign",
            "entropies[block] = torch.special.entr(",
            "entropies[block] = -torch.special.entr(",
        ),
    ),
)

SEQUENCES = Module(
    "rlhf/ops/sequences.py",
    ("test_ops_sequences", "test_ops_padding"),
    (
        M(
            "last_token_index",
            "right padding assumed",
            "return torch.where(mask, positions, -1).amax(1)",
            "return mask.sum(1) - 1",
        ),
        M(
            "gather_last",
            "one token early",
            "positions == last_token_index(mask).unsqueeze(1)",
            "positions == last_token_index(mask).unsqueeze(1) - 1",
        ),
        M("position_ids", "counted from one", "cumsum(1) - 1).clamp(min=0)", "cumsum(1)).clamp(min=0)"),
        M(
            "left_pad",
            "on the other side",
            "slice(width - len(sequence), width) if left else",
            "slice(width - len(sequence), width) if not left else",
        ),
        M(
            "right_pad",
            "on the other side",
            "else slice(0, len(sequence))",
            "else slice(width - len(sequence), width)",
        ),
        M(
            "response_mask",
            "the stop token left out",
            "stops_before = stops.long().cumsum(1) - stops.long()",
            "stops_before = stops.long().cumsum(1)",
        ),
        M(
            "response_mask",
            "stopped only at full length",
            "stops_before == 0, stops.any(1)",
            "stops_before == 0, stops[:, -1]",
        ),
    ),
)

MOMENTS = Module(
    "rlhf/ops/moments.py",
    ("test_ops_moments",),
    (
        M(
            "RunningMoments",
            "ddof = 1",
            "math.sqrt(self._squares / self._count)",
            "math.sqrt(self._squares / max(1, self._count - 1))",
        ),
        M(
            "RunningMoments",
            "deviation between batches left out",
            "self._squares += squares + step * step * self._count * count / total",
            "self._squares += squares",
        ),
        M(
            "RunningMoments",
            "a batch counts as one number in the mean",
            "self._mean += step * count / total",
            "self._mean += step / total",
        ),
        M(
            "RunningMoments",
            "infinite numbers taken",
            "if not bool(numbers.isfinite().all()):",
            "if bool(numbers.isnan().any()):",
        ),
        M("RunningMoments", "float32", "values.detach().to(torch.float64)", "values.detach().to(torch.float32)"),
        M(
            "RunningMoments",
            "state without the count",
            "self._count, self._mean, self._squares = count, mean, squares",
            "self._mean, self._squares = mean, squares",
        ),
    ),
)

ADAPTIVE_KL = Module(
    "rlhf/ops/adaptive_kl.py",
    ("test_ops_adaptive_kl",),
    (
        M("AdaptiveKL", "sign", "self._coefficient *= 1.0 + error", "self._coefficient *= 1.0 - error"),
        M(
            "AdaptiveKL",
            "error not clipped from above",
            "max(-MAX_ERROR, min(MAX_ERROR, kl_nats_per_sequence / self._target - 1.0))",
            "max(-MAX_ERROR, kl_nats_per_sequence / self._target - 1.0)",
        ),
        M(
            "AdaptiveKL",
            "error not clipped from below",
            "max(-MAX_ERROR, min(MAX_ERROR, kl_nats_per_sequence / self._target - 1.0))",
            "min(MAX_ERROR, kl_nats_per_sequence / self._target - 1.0)",
        ),
        M(
            "AdaptiveKL",
            "difference instead of proportion",
            "kl_nats_per_sequence / self._target - 1.0))",
            "kl_nats_per_sequence - self._target))",
        ),
        M("AdaptiveKL", "a step for each batch", "error * num_episodes / self._horizon", "error / self._horizon"),
    ),
)

ADAM = Module(
    "rlhf/ops/adam.py",
    ("test_ops_adam",),
    (
        M(
            "TensorFlowAdam",
            "epsilon inside the square root",
            'second.sqrt().add_(group["eps"])',
            'second.add(group["eps"]).sqrt()',
        ),
        M(
            "TensorFlowAdam",
            "epsilon where torch has it",
            'second.sqrt().add_(group["eps"])',
            'second.sqrt().add_(group["eps"] * math.sqrt(1.0 - beta2**count))',
        ),
        M("TensorFlowAdam", "second moment not corrected", "rate * math.sqrt(1.0 - beta2**count)", "rate"),
        M("TensorFlowAdam", "first moment not corrected", "/ (1.0 - beta1**count)", "/ 1.0"),
        M("TensorFlowAdam", "sign", "value=-step_size)", "value=step_size)"),
        M(
            "TensorFlowAdam",
            "decay without the rate",
            '1.0 - rate * group["weight_decay"]',
            '1.0 - group["weight_decay"]',
        ),
        M("TensorFlowAdam", "the count of steps stands still", 'state["step"] += 1', 'state["step"].fill_(1.0)'),
        M(
            "TensorFlowAdam",
            "the rate of the first group for all",
            'float(group["lr"])',
            'float(self.param_groups[0]["lr"])',
        ),
    ),
)

BATCHES = Module(
    "rlhf/batches.py",
    ("test_batches", "test_published_implementations"),
    (
        M(
            "make_ppo_batch",
            "KL of reference to policy",
            "(logprobs=scored.old_logprobs, reference_logprobs=scored.reference_logprobs)",
            "(logprobs=scored.reference_logprobs, reference_logprobs=scored.old_logprobs)",
        ),
        M("make_ppo_batch", "estimator ignored", "kl = _ESTIMATORS[kl_estimator](", 'kl = _ESTIMATORS["k1"]('),
        M("make_ppo_batch", "KL of padding kept", "kl = torch.where(mask, kl, 0.0)", "kl = kl * 1.0"),
        M("make_ppo_batch", "coefficient ignored", "kl_coefficient=kl_coefficient", "kl_coefficient=1.0"),
        M(
            "make_ppo_batch",
            "score position ignored",
            "of_values = value_mask(mask=mask, score_position=score_position)",
            "of_values = mask",
        ),
        M(
            "make_ppo_batch",
            "values after the end left out",
            "values=scored.old_values, mask=of_values",
            "values=scored.old_values, mask=mask",
        ),
        M(
            "make_ppo_batch",
            "whitening counts the slot after the end",
            "masked_whiten(values=advantages, mask=mask)",
            "masked_whiten(values=advantages, mask=of_values)",
        ),
        M("make_ppo_batch", "whitening switched off", "if whiten_advantages:", "if not whiten_advantages:"),
        M(
            "make_ppo_batch",
            "advantages after the end kept",
            "advantages=torch.where(mask, advantages, 0.0)",
            "advantages=advantages",
        ),
        M("make_ppo_batch", "gamma and lambda swapped", "gamma=gamma, lam=lam", "gamma=lam, lam=gamma"),
        M(
            "make_ppo_batch",
            "whitened rewards lose their mean",
            "mask=of_values, shift_mean=False)",
            "mask=of_values, shift_mean=True)",
        ),
        M(
            "make_ppo_batch",
            "reward whitening misses the slot of the score",
            "mask=of_values, shift_mean=False)",
            "mask=mask, shift_mean=False)",
        ),
    ),
)

MODULES: tuple[Module, ...] = (LOSSES, PREFERENCE_LOSSES, CHECKS, MASKED, KL, ADVANTAGES, LOGPROBS, SEQUENCES)
MODULES += (MOMENTS, ADAPTIVE_KL, ADAM, BATCHES)
