"""The difference between two methods, each run with some seeds on some prompts: intervals and tests.

Scores of a method are a matrix (S, P): a row a seed (a trained model), a column a prompt. Both are samples: another
seed would have trained another model, another prompt would have been answered differently. An interval over prompts
alone speaks of these very models, not of the methods.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.statistics.student import student_p_value, student_quantile

Array = NDArray[np.float64]
NUM_RESAMPLES = 2000
NUM_FLIPS = 9999
# As many arrangements are all gone through; of more, a random part is drawn.
MOST_ARRANGEMENTS = 1 << 14
_BLOCK = 2_000_000


@dataclass(frozen=True)
class Difference:
    """A difference of means with its interval and the p-value of "there is none", two-sided.

    `low` and `high` are Student's, of the same standard error as the p-value: it is below 1 - confidence just where the
    interval leaves 0 out. `bootstrap_low` and `bootstrap_high` are the percentiles of resampled seeds and prompts.
    `effect_size` is Cohen's d: the difference over the standard deviation of the prompts' differences (of their
    scores, where prompts are not paired), the seeds' mean taken first; None where nothing varies.
    """

    value: float
    low: float
    high: float
    p_value: float
    standard_error: float
    degrees_of_freedom: float
    bootstrap_low: float
    bootstrap_high: float
    effect_size: float | None

    def to_json(self) -> dict[str, float | None]:
        """`{"value", "low", "high", "p_value", ...}`; infinite degrees of freedom are None."""
        body = dict(vars(self))
        body["degrees_of_freedom"] = self.degrees_of_freedom if math.isfinite(self.degrees_of_freedom) else None
        return body


@dataclass(frozen=True)
class _Source:
    """One thing that varies: its contributions to the difference, each less their mean, and their residuals."""

    deviations: Array

    @property
    def variance(self) -> float:
        """Of the mean of the contributions."""
        count = self.deviations.size
        return float(np.square(self.deviations).sum() / (count - 1) / count)

    def resampled(self, generator: np.random.Generator, num_resamples: int) -> Array:
        """Means of as many contributions drawn with replacement, shape (num_resamples,).

        Scaled by sqrt(n / (n - 1)): the spread of n resampled values is too small by that factor (Rao and Wu 1988).
        """
        count = self.deviations.size
        rows = max(1, _BLOCK // count)
        parts = [
            generator.multinomial(count, np.full(count, 1 / count), size=min(rows, num_resamples - start))
            @ self.deviations
            for start in range(0, num_resamples, rows)
        ]
        return np.concatenate(parts) / count * math.sqrt(count / (count - 1))


def hierarchical_difference(
    scores: ArrayLike,
    other_scores: ArrayLike,
    *,
    paired_seeds: bool,
    paired_prompts: bool = True,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Difference:
    """The mean of `scores` (S, P) less that of `other_scores` (T, Q), seeds and prompts both being samples.

    The variance is that of crossed random effects, V = V_seeds + V_prompts - V_residual (the residual is in both and
    counts once), and at least the larger of the two; interval and p-value are Student's with Satterthwaite's degrees of
    freedom, since three seeds tell little of the spread of seeds. The bootstrap resamples seeds and prompts
    independently of one another (the pigeonhole bootstrap of Owen 2007), what is paired together, and is rescaled to
    V: it takes nothing to be normal, but of three seeds there are few different resamples. One seed a side: only the
    prompts vary. One prompt a side: only the seeds.

    Raises `ValueError` for shapes that do not go together, scores that are not finite, or one number a side.
    """
    first, second = _matrix(scores), _matrix(other_scores)
    _check_pairs(first, second, paired_seeds, paired_prompts)
    value = float(first.mean() - second.mean())
    sources, residual, residual_freedom = _sources(first, second, paired_seeds, paired_prompts)
    if not sources:
        raise ValueError("a difference of two numbers has no interval: give several seeds or several prompts")
    variances = [source.variance for source in sources]
    total = sum(variances)
    variance = max(*variances, total - residual)
    effect = effect_size(first, second, paired_prompts=paired_prompts)
    if total == 0.0:
        return Difference(value, value, value, float(value == 0.0), 0.0, math.inf, value, value, effect)
    spread = sum(one**2 / (source.deviations.size - 1) for one, source in zip(variances, sources, strict=True))
    freedom = variance**2 / (spread + residual_freedom)
    generator = np.random.Generator(np.random.PCG64(seed))
    draws = np.zeros(num_resamples)
    for source in sources:
        draws += source.resampled(generator, num_resamples)
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2]) * math.sqrt(variance / total)
    error = math.sqrt(variance)
    half = student_quantile(confidence, freedom) * error
    return Difference(
        value,
        value - half,
        value + half,
        student_p_value(value / error, freedom),
        error,
        freedom,
        value + min(float(low), 0.0),
        value + max(float(high), 0.0),
        effect,
    )


def _check_pairs(first: Array, second: Array, paired_seeds: bool, paired_prompts: bool) -> None:
    if paired_prompts and first.shape[1] != second.shape[1]:
        raise ValueError(f"paired prompts need as many of each; got {first.shape[1]} and {second.shape[1]}")
    if paired_seeds and (first.shape[0] != second.shape[0] or not paired_prompts):
        raise ValueError(f"paired seeds need as many of each, and paired prompts; got {first.shape}, {second.shape}")


def _sources(
    first: Array, second: Array, paired_seeds: bool, paired_prompts: bool
) -> tuple[list[_Source], float, float]:
    """What varies; the variance that residuals add to the difference, and its share of Satterthwaite's sum."""
    sides = [first - second] if paired_seeds else [first, -second]
    contributions = [side.mean(axis=1) for side in sides]
    contributions += [sum(side.mean(axis=0) for side in sides)] if paired_prompts else [s.mean(axis=0) for s in sides]
    sources = [_Source(values - values.mean()) for values in contributions if values.size > 1]
    residual, share = 0.0, 0.0
    for side in sides:
        num_seeds, num_prompts = side.shape
        if num_seeds < 2 or num_prompts < 2:
            continue
        rest = side - side.mean(axis=1, keepdims=True) - side.mean(axis=0, keepdims=True) + side.mean()
        freedom = (num_seeds - 1) * (num_prompts - 1)
        variance = float(np.square(rest).sum() / freedom / side.size)
        residual += variance
        share += variance**2 / freedom
    return sources, residual, share


def effect_size(scores: ArrayLike, other_scores: ArrayLike, *, paired_prompts: bool) -> float | None:
    """Cohen's d over prompts, the seeds' mean taken first; None where nothing varies or there is one prompt.

    Paired: mean difference / standard deviation of the differences (d_z, Lakens 2013). Else the pooled deviation.
    """
    first, second = _matrix(scores).mean(axis=0), _matrix(other_scores).mean(axis=0)
    if paired_prompts:
        differences = first - second
        deviation = float(differences.std(ddof=1)) if differences.size > 1 else 0.0
    else:
        freedom = first.size + second.size - 2
        squares = float(np.square(first - first.mean()).sum() + np.square(second - second.mean()).sum())
        deviation = math.sqrt(squares / freedom) if freedom > 0 else 0.0
    return float(first.mean() - second.mean()) / deviation if deviation > 0 else None


def sign_flip_p_value(differences: ArrayLike, *, num_flips: int = NUM_FLIPS, seed: int = 0) -> float:
    """The two-sided p-value of a mean of paired `differences` (N,): under "no difference" each sign is a coin's.

    All 2^N signs are gone through where they are few, and the smallest p-value is then 2 / 2^N; else `num_flips` are
    drawn, and the value is (hits + 1) / (num_flips + 1) (Phipson and Smyth 2010). Fisher (1935, section 21).
    """
    values = _vector(differences)
    if values.size <= math.log2(MOST_ARRANGEMENTS):
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=values.size)))
        return float(np.mean(_at_least(np.abs(signs @ values), abs(float(values.sum())))))
    generator = np.random.Generator(np.random.PCG64(seed))
    hits, rows = 0, max(1, _BLOCK // values.size)
    for start in range(0, num_flips, rows):
        signs = generator.integers(2, size=(min(rows, num_flips - start), values.size)) * 2.0 - 1.0
        hits += int(_at_least(np.abs(signs @ values), abs(float(values.sum()))).sum())
    return (hits + 1) / (num_flips + 1)


def permutation_p_value(
    values: ArrayLike, other_values: ArrayLike, *, num_permutations: int = NUM_FLIPS, seed: int = 0
) -> float:
    """The two-sided p-value of a difference of means of unpaired `values` (N,) and `other_values` (M,).

    Under "no difference" every division of all values into N and M is as likely. All are gone through where they are
    few, else `num_permutations` are drawn, as in `sign_flip_p_value`.
    """
    first, second = _vector(values), _vector(other_values)
    both = np.concatenate([first, second])
    total, count = float(both.sum()), first.size
    seen = abs(float(first.mean() - second.mean()))

    def distance(sums: Array) -> Array:
        return np.abs(sums / count - (total - sums) / second.size)

    if math.comb(both.size, count) <= MOST_ARRANGEMENTS:
        sums = np.array([both[list(chosen)].sum() for chosen in itertools.combinations(range(both.size), count)])
        return float(np.mean(_at_least(distance(sums), seen)))
    generator = np.random.Generator(np.random.PCG64(seed))
    sums = np.array([generator.permutation(both)[:count].sum() for _ in range(num_permutations)])
    return (int(_at_least(distance(sums), seen).sum()) + 1) / (num_permutations + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for being several, in their order: Holm's (1979) step-down, which needs no independence.

    The k-th smallest of m counts m - k + 1 times, and none less than a smaller one; at most 1.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _at_least(values: Array, bound: float) -> NDArray[np.bool_]:
    """Rounding must not tell an arrangement from its equal."""
    return np.greater_equal(values, bound - 1e-12 * max(1.0, abs(bound)))


def _matrix(scores: ArrayLike) -> Array:
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 2 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"expected finite scores of shape (seeds, prompts); got shape {array.shape}")
    return array


def _vector(values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"expected at least one finite number in one dimension; got shape {array.shape}")
    return array
