"""Refusals that every operation shares, so that a wrong argument never broadcasts its way to a number."""

from __future__ import annotations

import torch
from torch import Tensor


def check_same_shape(**tensors: Tensor) -> None:
    """Raises `ValueError` naming every argument and its shape unless all shapes are equal."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"these arguments must have one shape, but came as: {found}")


def check_rank(num_axes: int, **tensors: Tensor) -> None:
    """Raises `ValueError` naming the first argument that does not have `num_axes` axes."""
    for name, tensor in tensors.items():
        if tensor.ndim != num_axes:
            raise ValueError(f"{name} must have {num_axes} axes, but has shape {tuple(tensor.shape)}")


def check_bool(**tensors: Tensor) -> None:
    """Raises `TypeError` naming the first argument that is not a bool tensor."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.bool:
            raise TypeError(f"{name} must be a bool tensor (True = a real token), but has dtype {tensor.dtype}")


def check_floating(**tensors: Tensor) -> None:
    """Raises `TypeError` naming the first argument that is not a floating-point tensor."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, but has dtype {tensor.dtype}")


def check_integer(**tensors: Tensor) -> None:
    """Raises `TypeError` naming the first argument that is not an integer tensor."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name} must be an integer tensor, but has dtype {tensor.dtype}")


def check_prefix(**masks: Tensor) -> None:
    """Raises `ValueError` naming the first (B, R) mask with a True after a False: responses are right-padded."""
    for name, mask in masks.items():
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError(f"{name} must be a right-padded prefix in every row, but has a True after a False")


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for every narrower type; float64 stays, so that gradients can be checked numerically."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kept(values: Tensor, mask: Tensor) -> Tensor:
    """`values` in the working type with zero where `mask` is False; a `where`, because NaN times zero is NaN."""
    return torch.where(mask, values.to(working_dtype(values.dtype)), 0.0)
