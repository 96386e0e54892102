"""Evaluation: statistics with intervals, and judges who score responses."""
