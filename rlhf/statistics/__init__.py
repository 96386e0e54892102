"""Estimates with intervals and agreement between annotators: numpy only, every resample drawn from a given seed."""

from rlhf.statistics.intervals import Interval, bootstrap_difference, bootstrap_mean, wilson, win_rate

__all__ = ["Interval", "bootstrap_difference", "bootstrap_mean", "wilson", "win_rate"]
