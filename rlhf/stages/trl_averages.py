"""What a trainer has summed up since its last log: the part of its state that its own checkpoints leave out.

With it a checkpoint may be written at any step, also between two logs, and the metrics do not depend on when it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rlhf.distributed.runtime import Runtime


class LogAverages:
    """The running sums of a transformers Trainer, of TRL's trainers on top of it, and of our encoder-decoder trainers.

    They lie in attributes without a public name; `tests/unit/test_trl_averages.py` fails when a library renames them.
    """

    def __init__(self, trainer: Any, runtime: Runtime) -> None:
        self._trainer = trainer
        self._runtime = runtime

    def state_dict(self) -> dict[str, Any]:
        """Plain values, the same on every rank. All ranks call it, between optimiser steps.

        `logged_step` is the step of the last log. `loss` has each rank's sum of losses since then. `means` are lists of
        values over all ranks to be averaged (TRL), `num_tokens` counts tokens since the first step; `sums` has each
        rank's sums by name (encoder-decoder trainers).
        """
        trainer = self._trainer
        sums = getattr(trainer, "_sums", {})
        own = (trainer._tr_loss.item(), {name: value.item() for name, value in sums.items()})
        everyone = self._runtime.gather_objects(own)
        return {
            "logged_step": trainer._globalstep_last_logged,
            "loss": [loss for loss, _ in everyone],
            "sums": [rank_sums for _, rank_sums in everyone],
            "means": {name: list(values) for name, values in self._means().items()},
            "num_tokens": trainer._num_tokens if hasattr(trainer, "_num_tokens") else trainer._total_train_tokens,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave; to be called in `on_train_begin`, when the trainer has reset its sums.

        On another number of ranks every rank gets the mean of the losses, of which the log takes the mean again, and
        rank 0 the total of the sums, which the log adds up: the same but for rounding.
        """
        trainer, rank = self._trainer, self._runtime.rank
        losses, sums = list(state["loss"]), [dict(rank_sums) for rank_sums in state["sums"]]
        if len(losses) != self._runtime.world_size:
            losses = [sum(losses) / len(losses)] * self._runtime.world_size
            totals = {name: sum(rank_sums[name] for rank_sums in sums) for name in sums[0]}
            # A name whose sum is 0 elsewhere: all ranks must reduce the same names.
            sums = [totals if number == 0 else dict.fromkeys(totals, 0.0) for number in range(self._runtime.world_size)]
        trainer._tr_loss = torch.tensor(losses[rank], device=trainer._tr_loss.device, dtype=trainer._tr_loss.dtype)
        trainer._globalstep_last_logged = state["logged_step"]
        if hasattr(trainer, "_num_tokens"):
            device = trainer._tr_loss.device
            trainer._num_tokens = state["num_tokens"]
            trainer._sums = {
                name: torch.tensor(value, device=device, dtype=torch.float64) for name, value in sums[rank].items()
            }
            return
        trainer._total_train_tokens = state["num_tokens"]
        means = self._means()
        means.clear()
        means.update({name: list(values) for name, values in state["means"].items()})

    def _means(self) -> Any:
        """TRL's lists by name; a trainer without them has none."""
        return self._trainer._metrics["train"] if hasattr(self._trainer, "_metrics") else {}
