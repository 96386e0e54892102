"""A trainer whose loss is a sum over a micro-batch, divided by the count of the whole optimiser step on all ranks.

Neither micro-batches, nor ranks, nor uneven lengths change the loss or what is logged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

Sums = dict[str, Tensor]


class SumTrainer(Trainer, ABC):
    """transformers' Trainer with a loss that is a sum, and metrics that are means over all examples between two logs.

    A batch holds `labels`; those that are not -100 are counted over the optimiser step. Its masks, whose names end in
    `attention_mask`, count tokens.
    """

    # The division is by the count of all micro-batches already.
    loss_is_scaled_for_ga = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # Has the Trainer count the labels of a whole optimiser step, on all ranks.
        self.model_accepts_loss_kwargs = True
        self._sums: Sums = {}
        self._num_tokens = 0.0

    @abstractmethod
    def loss_sum(self, model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, int, Sums]:
        """The micro-batch's summed loss, how many labels make one of its terms, and the sums of what is logged.

        The sums have the same names in every batch; `means` makes of them what is logged.
        """

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """What is logged, from the sums over all examples since the last log: each over the sum named `count`."""
        count = sums.pop("count")
        return {name: value / count for name, value in sums.items()}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """This micro-batch's part of the loss, times the number of ranks, which DDP and DeepSpeed divide by."""
        if num_items_in_batch is None:
            raise RuntimeError("the Trainer did not count the labels of the optimiser step")
        labels = inputs.pop("labels")
        masks = [value for name, value in inputs.items() if name.endswith("attention_mask")]
        loss, labels_per_term, sums = self.loss_sum(model, inputs, labels)
        sums["num_tokens"] = torch.stack([mask.sum() for mask in masks]).sum()
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value.detach().double()
        share: Tensor = loss * labels_per_term / num_items_in_batch
        num_processes: int = self.accelerator.num_processes
        return share * num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log, over all ranks. All ranks call it at the same steps."""
        if "loss" in logs and self._sums:
            names = sorted(self._sums)
            totals: Any = self.accelerator.reduce(torch.stack([self._sums[name].double() for name in names]), "sum")
            found = dict(zip(names, totals.tolist(), strict=True))
            self._sums = {}
            self._num_tokens += found.pop("num_tokens")
            logs |= self.means(found)
            logs["num_tokens"] = self._num_tokens
        super().log(logs, start_time)
