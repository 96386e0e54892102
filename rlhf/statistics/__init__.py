"""Estimates with intervals, tests and agreement between annotators: numpy only, every resample from a given seed."""

from rlhf.statistics.differences import (
    Difference,
    effect_size,
    hierarchical_difference,
    holm,
    permutation_p_value,
    sign_flip_p_value,
)
from rlhf.statistics.intervals import Interval, bootstrap_difference, bootstrap_mean, wilson, win_rate
from rlhf.statistics.length_control import LengthControlled, length_controlled_win_rate
from rlhf.statistics.ratings import bradley_terry, rating_intervals
from rlhf.statistics.student import student_p_value, student_quantile, t_interval

__all__ = [
    "Difference",
    "Interval",
    "LengthControlled",
    "bootstrap_difference",
    "bootstrap_mean",
    "bradley_terry",
    "effect_size",
    "hierarchical_difference",
    "holm",
    "length_controlled_win_rate",
    "permutation_p_value",
    "rating_intervals",
    "sign_flip_p_value",
    "student_p_value",
    "student_quantile",
    "t_interval",
    "wilson",
    "win_rate",
]
