"""The formulas of published PPO implementations, written anew as float64 loops over tokens from reading their sources.

One class for each code base; the docstrings name repository, file and function. Where a code base means something else
by a name than we do, the docstring of its formula says so under "Convention". Their masks are 0/1 numbers and their
losses are means; ours are bool, and sums with a count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from tests.unit.ragged import prefix_mask

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """A ragged batch as ours (float64 tensors, bool mask) and as theirs (numpy, padding filled with zeros)."""

    mask: Tensor
    logprobs: Tensor
    old_logprobs: Tensor
    reference_logprobs: Tensor
    rewards: Tensor
    values: Tensor
    old_values: Tensor
    scores: Tensor

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        return [int(length) for length in self.mask.sum(1)]

    @property
    def width(self) -> int:
        """Slots of a row."""
        return int(self.mask.shape[1])

    def theirs(self, tensor: Tensor) -> Array:
        """What their code sees: zeros in the padding, as their masking leaves it."""
        return torch.where(self.mask, tensor, 0.0).numpy().astype(np.float64)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Two to five rows of one to seven tokens; at least two tokens in total, which an unbiased variance needs."""
    width = draw(st.integers(2, 7))
    lengths = draw(st.lists(st.integers(1, width), min_size=2, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = prefix_mask(lengths, width)

    def random(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(mask.shape, generator=generator, dtype=torch.float64)

    old = random() - 2.0
    scores = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    return Case(mask, old + random(0.7), old, old + random(0.5), random(), random(), random(), scores)


def mean_over(losses: Array, lengths: list[int]) -> float:
    """The mean over all real tokens."""
    tokens = [losses[row, slot] for row, length in enumerate(lengths) for slot in range(length)]
    return float(sum(tokens) / len(tokens))


class Verl:
    """volcengine/verl: verl/trainer/ppo/core_algos.py and verl/utils/torch_functional.py."""

    @staticmethod
    def gae(case: Case, gamma: float, lam: float) -> tuple[Array, Array]:
        """`compute_gae_advantage_return` before its whitening.

        Convention: masked slots are stepped over, so they repeat the advantage of the next real one; past the end of a
        response that is the start value 0. Holes inside a response (tool output) are allowed there and refused here.
        """
        rewards, values = case.theirs(case.rewards), case.theirs(case.values)
        advantages = np.zeros(values.shape)
        for row, length in enumerate(case.lengths):
            next_value, next_advantage = 0.0, 0.0
            for slot in range(case.width - 1, -1, -1):
                if slot < length:
                    error = rewards[row, slot] - values[row, slot] + gamma * next_value
                    next_advantage = error + gamma * lam * next_advantage
                    next_value = values[row, slot]
                advantages[row, slot] = next_advantage
        return advantages, advantages + values

    @staticmethod
    def whiten(numbers: list[float], shift_mean: bool = True) -> list[float]:
        """`masked_whiten`.

        Convention: the variance is unbiased (Bessel's correction), ours is biased as in lm-human-preferences; so theirs
        is ours times sqrt((n - 1) / n), up to the 1e-8 that both add to the variance.
        """
        mean = sum(numbers) / len(numbers)
        variance = sum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1)
        return [(number - mean) / math.sqrt(variance + 1e-8) + (0.0 if shift_mean else mean) for number in numbers]

    @staticmethod
    def aggregate(losses: Array, lengths: list[int], mode: str) -> float:
        """`agg_loss`.

        Convention: `token-mean` is our token_mean and `seq-mean-token-mean` our sequence_mean. The norm of
        `seq-mean-token-sum-norm` is the width of the batch at hand, and responses are summed (newer versions take the
        norm from the config); ours is the longest allowed response and the number of responses, whatever the batch.
        """
        if mode == "token-mean":
            return mean_over(losses, lengths)
        sums = [float(losses[row, :length].sum()) for row, length in enumerate(lengths)]
        if mode == "seq-mean-token-mean":
            return sum(total / length for total, length in zip(sums, lengths, strict=True)) / len(lengths)
        return sum(sums) / int(losses.shape[1])

    @staticmethod
    def policy_loss(case: Case, advantages: Array, low: float, high: float, dual: float) -> tuple[Array, float, float]:
        """`compute_policy_loss` (vanilla): losses of tokens, clipped share, share held by the dual clip.

        Convention: it thinks in losses, so its minima are our maxima. The dual clip is always on (`clip_ratio_c`, 3 by
        default); ours is off unless given. Newer versions clamp the log-ratio to +-20, which these ratios never reach.
        """
        losses = np.zeros(advantages.shape)
        clipped = held = 0
        for row, length in enumerate(case.lengths):
            for slot in range(length):
                advantage = advantages[row, slot]
                ratio = math.exp(float(case.logprobs[row, slot] - case.old_logprobs[row, slot]))
                plain, bounded = -advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high)
                loss = max(plain, bounded)
                clipped += bounded > plain
                if advantage < 0:
                    held += loss > -advantage * dual
                    loss = min(loss, -advantage * dual)
                losses[row, slot] = loss
        num_tokens = sum(case.lengths)
        return losses, clipped / num_tokens, held / num_tokens

    @staticmethod
    def value_loss(case: Case, returns: Array, clip: float) -> tuple[float, float]:
        """`compute_value_loss`: loss and clipped share.

        Convention: the factor 0.5 is in the loss in newer versions and absent in older ones; this is the newer.
        """
        losses, clipped = np.zeros(returns.shape), np.zeros(returns.shape)
        for row, length in enumerate(case.lengths):
            for slot in range(length):
                value, old = float(case.values[row, slot]), float(case.old_values[row, slot])
                near = min(max(value, old - clip), old + clip)
                errors = (value - returns[row, slot]) ** 2, (near - returns[row, slot]) ** 2
                losses[row, slot], clipped[row, slot] = max(errors), errors[1] > errors[0]
        return 0.5 * mean_over(losses, case.lengths), mean_over(clipped, case.lengths)

    @staticmethod
    def kl_penalty(logprob: float, reference: float, name: str) -> float:
        """`kl_penalty_forward`.

        Convention: k3 is clamped to [-10, 10] there and not here, so the test stays inside.
        """
        difference = logprob - reference
        if name == "k1":
            return difference
        if name == "k2":
            return 0.5 * difference * difference
        return min(max(math.exp(-difference) + difference - 1.0, -10.0), 10.0)

    @staticmethod
    def kl_slope(logprob: float, reference: float, name: str) -> float:
        """The derivative of `kl_penalty` in the log-prob; `k1+` and `k3+` take the one of k2 (straight-through).

        Convention: our loss k1 is their `k1+`, our k2 and k3 are theirs without a plus. A plain k1, whose derivative is
        the constant 1, does not exist here: its expected gradient is zero.
        """
        difference = logprob - reference
        return 1.0 - math.exp(-difference) if name == "k3" else difference


class OpenRLHF:
    """OpenRLHF/OpenRLHF: openrlhf/models/loss.py and openrlhf/models/utils.py."""

    @staticmethod
    def rewards(case: Case, coefficient: float) -> Array:
        """`compute_reward`: the score lands on the last token of the action mask, the penalty on every token.

        Convention: a negative coefficient counts as 0 there; ours is refused by the config.
        """
        rewards = np.zeros(case.mask.shape)
        for row, length in enumerate(case.lengths):
            for slot in range(length):
                rewards[row, slot] = -coefficient * float(case.logprobs[row, slot] - case.reference_logprobs[row, slot])
            rewards[row, length - 1] += float(case.scores[row])
        return rewards

    @staticmethod
    def policy_loss(case: Case, advantages: Array, low: float, high: float, token_level: bool) -> tuple[float, float]:
        """`PolicyLoss`: token_level_loss is our token_mean, without it our sequence_mean; and the clipped share.

        Convention: the clipped share is the mean over tokens in both, as ours.
        """
        losses, clipped = np.zeros(advantages.shape), np.zeros(advantages.shape)
        for row, length in enumerate(case.lengths):
            for slot in range(length):
                ratio = math.exp(float(case.logprobs[row, slot] - case.old_logprobs[row, slot]))
                first = ratio * advantages[row, slot]
                second = min(max(ratio, 1 - low), 1 + high) * advantages[row, slot]
                losses[row, slot], clipped[row, slot] = -min(first, second), second < first
        mode = "token-mean" if token_level else "seq-mean-token-mean"
        return Verl.aggregate(losses, case.lengths, mode), mean_over(clipped, case.lengths)

    @staticmethod
    def value_loss(case: Case, returns: Array, clip: float | None) -> float:
        """`ValueLoss` with token_level_loss: half the mean, where without a clip the plain squared error counts."""
        losses = np.zeros(returns.shape)
        for row, length in enumerate(case.lengths):
            for slot in range(length):
                value, old, target = (
                    float(case.values[row, slot]),
                    float(case.old_values[row, slot]),
                    returns[row, slot],
                )
                losses[row, slot] = (value - target) ** 2
                if clip is not None:
                    step = min(max(value - old, -clip), clip)
                    losses[row, slot] = max(losses[row, slot], (old + step - target) ** 2)
        return 0.5 * mean_over(losses, case.lengths)


class TLDR:
    """vwxyzjn/summarize_from_feedback_details: summarize_from_feedback_details/ppo.py, the main loop.

    Convention: its `sequence_lengths` is the *index* of the last real token. The score is added one slot later, on the
    first padded one, where there is one (our `after_eos`); that slot has a value, which is bootstrapped from and
    trained. Advantages are whitened over real tokens, the value loss counts the extra slot. Biased variance.
    """

    @staticmethod
    def rewards(case: Case, coefficient: float) -> Array:
        """Token rewards before any whitening (B, R)."""
        rewards = np.zeros(case.mask.shape)
        for row, length in enumerate(case.lengths):
            last = length - 1
            end = last + 1 if last + 1 < case.width else last
            for slot in range(case.width):
                # Both log-probs hold the same number in padded slots, so the penalty is zero there.
                if slot <= last:
                    difference = float(case.logprobs[row, slot] - case.reference_logprobs[row, slot])
                    rewards[row, slot] = -coefficient * difference
            rewards[row, end] += float(case.scores[row])
        return rewards

    @staticmethod
    def advantages(case: Case, rewards: Array, gamma: float, lam: float) -> tuple[Array, Array]:
        """Whitened advantages and returns (B, R)."""
        advantages, returns = np.zeros(case.mask.shape), np.zeros(case.mask.shape)
        for row, length in enumerate(case.lengths):
            values = [float(case.values[row, slot]) if slot <= length else 0.0 for slot in range(case.width)]
            running = 0.0
            for slot in range(case.width - 1, -1, -1):
                following = values[slot + 1] if slot < case.width - 1 else 0.0
                running = rewards[row, slot] + gamma * following - values[slot] + gamma * lam * running
                advantages[row, slot], returns[row, slot] = running, running + values[slot]
        tokens = [advantages[row, slot] for row, length in enumerate(case.lengths) for slot in range(length)]
        mean = sum(tokens) / len(tokens)
        deviation = math.sqrt(sum((number - mean) ** 2 for number in tokens) / len(tokens) + 1e-8)
        whitened = np.zeros(advantages.shape)
        for row, length in enumerate(case.lengths):
            whitened[row, :length] = (advantages[row, :length] - mean) / deviation
        return whitened, returns

    @staticmethod
    def whitened_rewards(case: Case, rewards: Array) -> Array:
        """`whiten_rewards`: unit variance over real tokens and the slot after them, the mean kept."""
        slots = [(row, slot) for row, length in enumerate(case.lengths) for slot in range(min(length + 1, case.width))]
        numbers = [rewards[place] for place in slots]
        mean = sum(numbers) / len(numbers)
        deviation = math.sqrt(sum((number - mean) ** 2 for number in numbers) / len(numbers) + 1e-8)
        whitened = np.zeros(rewards.shape)
        for place in slots:
            whitened[place] = (rewards[place] - mean) / deviation + mean
        return whitened
