"""Slow, independent implementations in float64 with plain loops, written from the papers. Nothing here uses torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def log_softmax(logits: Sequence[float], temperature: float) -> list[float]:
    """Log-probabilities of softmax(logits / temperature)."""
    scaled = [logit / temperature for logit in logits]
    top = max(scaled)
    normalizer = top + math.log(sum(math.exp(value - top) for value in scaled))
    return [value - normalizer for value in scaled]


def entropy(logits: Sequence[float], temperature: float) -> float:
    """-sum p log p."""
    return -sum(math.exp(value) * value for value in log_softmax(logits, temperature))


def kl(logits: Sequence[float], reference_logits: Sequence[float], temperature: float) -> float:
    """sum p log(p / q)."""
    pairs = zip(log_softmax(logits, temperature), log_softmax(reference_logits, temperature), strict=True)
    return sum(math.exp(policy) * (policy - reference) for policy, reference in pairs)


def gae_row(
    rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """Advantages and returns of one episode that ends after its last reward.

    The exponentially weighted average of the k-step advantages (Schulman et al. 2016, equations 11 to 16), in its form
    for a finite episode: all the weight that is left falls on the longest estimate. No recursion.
    """
    length = len(rewards)
    advantages = []
    for start in range(length):
        horizon = length - start
        estimates = []
        for num_steps in range(1, horizon + 1):
            reward_sum = sum(gamma**step * rewards[start + step] for step in range(num_steps))
            end = start + num_steps
            bootstrap = gamma**num_steps * values[end] if end < length else 0.0
            estimates.append(reward_sum + bootstrap - values[start])
        weights = [(1 - lam) * lam**step for step in range(horizon - 1)] + [lam ** (horizon - 1)]
        advantages.append(sum(weight * estimate for weight, estimate in zip(weights, estimates, strict=True)))
    return advantages, [advantage + value for advantage, value in zip(advantages, values, strict=True)]


def ppo_advantages(
    scores: Array, log_ratios: Array, values: Array, lengths: Sequence[int], beta: float, gamma: float, lam: float
) -> tuple[Array, Array, Array]:
    """Rewards, unwhitened advantages and returns (B, R), zero past each row's length, score on its last token."""
    rewards, advantages, returns = (np.zeros(values.shape) for _ in range(3))
    for row, length in enumerate(lengths):
        if length == 0:
            continue
        for slot in range(length):
            rewards[row, slot] = -beta * log_ratios[row, slot]
        rewards[row, length - 1] += scores[row]
        found = gae_row(list(rewards[row, :length]), list(values[row, :length]), gamma, lam)
        advantages[row, :length], returns[row, :length] = found
    return rewards, advantages, returns


def whiten(numbers: Sequence[float], shift_mean: bool) -> list[float]:
    """Unit variance with ddof = 0; mean zero or as before."""
    mean = sum(numbers) / len(numbers)
    variance = sum((number - mean) ** 2 for number in numbers) / len(numbers)
    deviation = math.sqrt(variance + 1e-8)
    return [(number - mean) / deviation + (0.0 if shift_mean else mean) for number in numbers]


def clipped_objective(ratio: float, advantage: float, clip_low: float, clip_high: float) -> float:
    """L^CLIP of one token by the cases of figure 1 of Schulman et al. 2017."""
    if advantage >= 0:
        return (1 + clip_high if ratio > 1 + clip_high else ratio) * advantage
    return (1 - clip_low if ratio < 1 - clip_low else ratio) * advantage


def dual_clipped_objective(ratio: float, advantage: float, clip_low: float, clip_high: float, bound: float) -> float:
    """`clipped_objective`, and for a negative advantage never below bound * advantage (Ye et al. 2020)."""
    objective = clipped_objective(ratio, advantage, clip_low, clip_high)
    return bound * advantage if advantage < 0 and objective < bound * advantage else objective


def aggregate(rows: Sequence[Sequence[float]], aggregation: str, longest: int) -> float:
    """One number of the token losses of each response; a response without tokens does not exist."""
    responses = [row for row in rows if len(row) > 0]
    if aggregation == "token_mean":
        tokens = [loss for row in responses for loss in row]
        return sum(tokens) / len(tokens)
    divisors = [len(row) if aggregation == "sequence_mean" else longest for row in responses]
    parts = [sum(row) / divisor for row, divisor in zip(responses, divisors, strict=True)]
    return sum(parts) / len(parts)


def kl_estimate(policy: float, reference: float, estimator: str) -> float:
    """Estimator k1, k2 or k3 of KL(policy || reference) for a token with these probabilities (Schulman 2020)."""
    if estimator == "k1":
        return math.log(policy / reference)
    if estimator == "k2":
        return math.log(reference / policy) ** 2 / 2
    return reference / policy - 1 - math.log(reference / policy)


def clipped_value_error(value: float, old_value: float, target: float, clip: float) -> float:
    """Half the larger squared error of the value and of the value moved at most `clip` away from the old one."""
    step = value - old_value
    limited = old_value + (math.copysign(clip, step) if abs(step) > clip else step)
    return 0.5 * max((value - target) ** 2, (limited - target) ** 2)


def tensorflow_adam(
    start: float, gradients: Sequence[float], rate: float, beta1: float, beta2: float, epsilon: float, decay: float
) -> list[float]:
    """The parameter after each step. The averages are sums over all gradients so far, not recursive."""
    parameter, path = start, []
    for count in range(1, len(gradients) + 1):
        ages = [count - 1 - index for index in range(count)]
        first = sum((1 - beta1) * beta1**age * gradients[index] for index, age in enumerate(ages))
        second = sum((1 - beta2) * beta2**age * gradients[index] ** 2 for index, age in enumerate(ages))
        size = rate * math.sqrt(1 - beta2**count) / (1 - beta1**count)
        parameter = parameter - rate * decay * parameter - size * first / (math.sqrt(second) + epsilon)
        path.append(parameter)
    return path


def logistic_pair_loss(chosen: float, rejected: float, margin: float = 0.0) -> float:
    """log(1 + exp(-(chosen - rejected - margin)))."""
    return math.log1p(math.exp(-(chosen - rejected - margin)))
