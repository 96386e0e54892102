"""Data: sources of records, their splits and their tokenisation. Importing this package imports no torch."""

from rlhf.data.labelled_text import load_labelled_texts
from rlhf.data.sources import (
    data_content,
    data_hash,
    gives_comparisons,
    load_comparisons,
    load_demonstrations,
    load_prompts,
    load_ratings,
    preflight,
    settings_of,
    training_texts,
)
from rlhf.data.splits import BadRow, BadRows, Origin, Splits

__all__ = [
    "BadRow",
    "BadRows",
    "Origin",
    "Splits",
    "data_content",
    "data_hash",
    "gives_comparisons",
    "load_comparisons",
    "load_demonstrations",
    "load_labelled_texts",
    "load_prompts",
    "load_ratings",
    "preflight",
    "settings_of",
    "training_texts",
]
