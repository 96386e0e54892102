"""Metrics of sft and reward_model are means since the last log, whenever a checkpoint was written in between."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf.config import RLHFConfig
from rlhf.distributed import stopping
from rlhf.errors import Stopped
from rlhf.stages import reward_model, sft, trl_adapter
from rlhf.stages.trl_averages import LogAverages
from tests.stage_example import make_context, metrics_of, tiny_config, weight_bytes, write_comparisons
from tests.stage_example import write_demonstrations as write_data

T5 = {"architecture": "t5", "num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": 300}
# Logs at 3, 6, 9 and 10; the stop at 5 is in the middle of a mean, and so is a checkpoint at 4.
STOP_AT = 5


@pytest.fixture
def requests() -> Iterator[Any]:
    before = stopping._requests
    stopping._requests = stopping._Requests()
    yield stopping._requests
    stopping._requests = before


def _config(folder: Path, architecture: str, save_every: int) -> RLHFConfig:
    sections: dict[str, Any] = {"sft": {"save_every": save_every}, "reward_model": {"save_every": save_every}}
    return tiny_config(folder, **sections, **({"model": {"scratch": T5}} if architecture == "t5" else {}))


def _run(stage: str, config: RLHFConfig, folder: Path, run: str) -> None:
    inputs = {"base": str(folder / "whole/stages/sft/model"), "comparisons": str(folder / "comparisons")}
    module = {"sft": sft, "reward_model": reward_model}[stage]
    module.run(make_context(config, folder / run, stage, {} if stage == "sft" else inputs))


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_neither_checkpoints_nor_a_stop_change_the_metrics(
    requests: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    write_data(tmp_path / "data")
    write_comparisons(tmp_path / "comparisons")
    without = _config(tmp_path, architecture, save_every=1000)
    original = trl_adapter._TrackingCallback.on_step_end

    def on_step_end(self: Any, args: object, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == STOP_AT:
            requests.number = signal.SIGTERM
        return original(self, args, state, control, **kwargs)

    for stage in ("sft", "reward_model"):
        _run(stage, without, tmp_path, "whole")
        assert [line["step"] for line in metrics_of(tmp_path / "whole", stage)] == [3, 6, 9, 10]
        _run(stage, _config(tmp_path, architecture, save_every=4), tmp_path, "saved")
        with monkeypatch.context() as patch:
            patch.setattr(trl_adapter._TrackingCallback, "on_step_end", on_step_end)
            with pytest.raises(Stopped, match=f"at step {STOP_AT}; a checkpoint was written"):
                _run(stage, without, tmp_path, "stopped")
        requests.number = None
        _run(stage, without, tmp_path, "stopped")
        for run in ("saved", "stopped"):
            assert metrics_of(tmp_path / run, stage) == metrics_of(tmp_path / "whole", stage)
            assert weight_bytes(tmp_path / run, stage) == weight_bytes(tmp_path / "whole", stage)


class _Gathering:
    """A rank of some, which hears what `everyone` has."""

    def __init__(self, rank: int, everyone: list[Any]) -> None:
        self.rank, self.world_size, self.everyone = rank, len(everyone), everyone

    def gather_objects(self, own: Any) -> list[Any]:
        assert own == self.everyone[self.rank]
        return self.everyone


def _trl_trainer(loss: float) -> Any:
    return SimpleNamespace(
        _tr_loss=torch.tensor(loss),
        _globalstep_last_logged=6,
        _metrics={"train": {"entropy": [1.5, 2.5]}},
        _total_train_tokens=70,
    )


def _our_trainer(loss: float, count: float | None) -> Any:
    sums = {} if count is None else {"count": torch.tensor(count)}
    return SimpleNamespace(_tr_loss=torch.tensor(loss), _globalstep_last_logged=6, _sums=sums, _num_tokens=70.0)


def test_each_rank_gets_its_own_sums_back() -> None:
    saved = LogAverages(_trl_trainer(0.5), _Gathering(0, [(0.5, {}), (1.5, {})])).state_dict()  # type: ignore[arg-type]
    trainer = _trl_trainer(0.0)
    trainer._metrics["train"] = {"entropy": [], "accuracy": [9.0]}
    LogAverages(trainer, _Gathering(1, [None, None])).load_state_dict(saved)  # type: ignore[arg-type]
    assert trainer._tr_loss.item() == 1.5
    assert trainer._globalstep_last_logged == 6
    assert trainer._metrics == {"train": {"entropy": [1.5, 2.5]}}
    assert trainer._total_train_tokens == 70


def test_other_ranks_go_on_with_the_same_means() -> None:
    everyone = [(0.5, {"count": 3.0}), (1.5, {"count": 4.0})]
    saved = LogAverages(_our_trainer(0.5, 3.0), _Gathering(0, everyone)).state_dict()  # type: ignore[arg-type]
    found = []
    for rank in range(4):
        trainer = _our_trainer(0.0, None)
        LogAverages(trainer, _Gathering(rank, [None] * 4)).load_state_dict(saved)  # type: ignore[arg-type]
        found.append((trainer._tr_loss.item(), trainer._sums["count"].item(), trainer._num_tokens))
    # The log takes the mean of the losses, (0.5 + 1.5) / 2, and the sum of the counts, 3 + 4.
    assert found == [(1.0, 7.0, 70.0), (1.0, 0.0, 70.0), (1.0, 0.0, 70.0), (1.0, 0.0, 70.0)]
