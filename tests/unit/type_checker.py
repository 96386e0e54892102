"""Beartype for jaxtyping's import hook, which decorates methods one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype
from beartype.roar import BeartypeDecorHintPep673Exception


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Beartype, except for methods that return `Self`: it takes those on whole classes only."""
    try:
        return beartype(function)
    except BeartypeDecorHintPep673Exception:
        return function
