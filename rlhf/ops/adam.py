"""Adam with epsilon where TensorFlow 1 has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor


class TensorFlowAdam(torch.optim.Optimizer):
    """Adam in the form before section 2.1 of Kingma and Ba 2015 (arXiv 1412.6980), which TensorFlow 1 implements:

        step size_t = lr * sqrt(1 - beta2^t) / (1 - beta1^t)
        parameter  -= step size_t * m_t / (sqrt(v_t) + epsilon)

    torch corrects v_t before it adds epsilon, which makes epsilon larger by 1 / sqrt(1 - beta2^t) here: about 30 times
    at the first step for beta2 = 0.999, so early updates of small gradients are smaller (pytorch#104857; Huang et al.
    2023, "The N implementation details of RLHF with PPO"). Late in training both agree.

    `weight_decay` is decoupled as in AdamW: parameter *= 1 - lr * weight_decay, before the step. State per parameter:
    `step` (float32 scalar), `exp_avg`, `exp_avg_sq`.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """Raises `ValueError` naming the argument that cannot be."""
        for name, number in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not 0.0 <= number < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, but is {number}")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), but are {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient. Raises `TypeError` for a sparse gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if gradient.is_sparse:
            raise TypeError("TensorFlowAdam takes dense gradients, but came a sparse one")
        beta1, beta2 = group["betas"]
        state = self.state[parameter]
        if not state:
            # The count stays on the CPU, as torch has it, so that reading it does not wait for a GPU.
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        first, second = state["exp_avg"], state["exp_avg_sq"]
        first.lerp_(gradient, 1.0 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        count, rate = float(state["step"]), float(group["lr"])
        parameter.mul_(1.0 - rate * group["weight_decay"])
        step_size = rate * math.sqrt(1.0 - beta2**count) / (1.0 - beta1**count)
        parameter.addcdiv_(first, second.sqrt().add_(group["eps"]), value=-step_size)
