"""A training that was saved by some ranks at some ZeRO stage goes on, on others at another one, as if undisturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.engine_worker import fixed_batch, loss_sum
from tests.distributed.ranks import run_worker
from tests.distributed.reshape_worker import MORE_STEPS, SAVED_STEPS, SHAPES, STAGES, build

pytestmark = pytest.mark.distributed

MOVES = [(writers, readers) for writers, all_readers in SHAPES.items() for readers in all_readers]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reshape")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> dict[int, dict[str, Any]]:
    """What each number of ranks came to, by name."""
    for number in SHAPES:
        run_worker("reshape_worker", folder, number, "save", num_processes=number)
    readers = sorted({reader for _, reader in MOVES})
    for number in readers:
        run_worker("reshape_worker", folder, number, "load", num_processes=number)
    return {number: torch.load(folder / f"loaded{number}.pt", weights_only=True) for number in readers}


@pytest.fixture(scope="module")
def undisturbed() -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and gradient norms of a plain torch loop over the whole batch."""
    module, optimizer, scheduler = build(seed=1)
    tokens, targets, mask = fixed_batch()
    norms = []
    for _ in range(SAVED_STEPS + MORE_STEPS):
        optimizer.zero_grad()
        (loss_sum(module(tokens), targets, mask) / mask.sum()).backward()  # type: ignore[no-untyped-call]
        trained = [parameter for parameter in module.parameters() if parameter.grad is not None]
        norm = sum(float(parameter.grad.double().square().sum()) for parameter in trained if parameter.grad is not None)
        for parameter in trained:
            assert parameter.grad is not None
            parameter.grad.mul_(min(1.0, 0.5 / (norm**0.5 + 1e-6)))
        optimizer.step()
        scheduler.step()
        norms.append(norm**0.5)
    return dict(module.state_dict()), norms


def _check(result: dict[str, Any], undisturbed: tuple[dict[str, torch.Tensor], list[float]]) -> None:
    weights, norms = undisturbed
    assert result["norms"] == pytest.approx(norms[SAVED_STEPS:], rel=1e-4)
    assert result["rates"] == pytest.approx([1e-2 * 0.7, 3e-3 * 0.7])
    assert result["weights"].keys() == weights.keys()
    for name, value in weights.items():
        error = (result["weights"][name] - value).abs().max()
        assert float(error) <= 1e-4 * float(value.abs().max()), name


@pytest.mark.parametrize(("writers", "readers"), MOVES)
@pytest.mark.parametrize("written", STAGES)
@pytest.mark.parametrize("stage", STAGES)
def test_the_trajectory_goes_on(
    loaded: dict[int, dict[str, Any]],
    undisturbed: tuple[dict[str, torch.Tensor], list[float]],
    writers: int,
    readers: int,
    written: int,
    stage: int,
) -> None:
    result = loaded[readers][f"{writers}-{written} {stage}"]
    _check(result, undisturbed)
    assert len(result["notes"]) == 1
    assert f"zero.stage={written}, fp32; this run is" in result["notes"][0]


@pytest.mark.parametrize(("writers", "readers"), MOVES)
@pytest.mark.parametrize("case", ["0 2", "2 3"])
def test_it_goes_on_with_the_optimiser_in_cpu_memory(
    loaded: dict[int, dict[str, Any]],
    undisturbed: tuple[dict[str, torch.Tensor], list[float]],
    writers: int,
    readers: int,
    case: str,
) -> None:
    _check(loaded[readers][f"{writers}-{case} offload"], undisturbed)


@pytest.mark.parametrize(("writers", "readers"), MOVES)
def test_frozen_weights_are_saved_once_they_have_changed(
    loaded: dict[int, dict[str, Any]], folder: Path, writers: int, readers: int
) -> None:
    for stage in (0, 2, 3):
        assert torch.equal(loaded[readers][f"changed {writers} {stage}"], torch.full((11, 11), 0.25))
    assert not list(folder.glob(f"{writers}-[0-3]/*/frozen-*"))
    assert list(folder.glob(f"{writers}-changed/*/frozen-*"))


@pytest.mark.parametrize(("writers", "readers"), MOVES)
def test_other_frozen_weights_are_refused(loaded: dict[int, dict[str, Any]], writers: int, readers: int) -> None:
    assert "was trained on top of other frozen weights" in loaded[readers][f"other base {writers}"]


def test_no_file_of_a_checkpoint_can_run_code(loaded: dict[int, dict[str, Any]], folder: Path) -> None:
    suffixes = {path.suffix for path in folder.glob("*-[0-3]/checkpoint-*/*")}
    assert suffixes == {".json", ".safetensors"}
