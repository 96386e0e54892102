"""One global batch of uneven lengths, cut up in every way, gives one update: ranks, ZeRO stages, micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.partition_worker import CASES, Case, write_inputs
from tests.distributed.ranks import run_worker

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
Results = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What rank 0 saw, by number of ranks and case."""
    folder = tmp_path_factory.mktemp("partition")
    write_inputs(folder / "models")
    found = {}
    for number in (1, 2):
        run_worker("partition_worker", folder, number, num_processes=number)
        found[number] = torch.load(folder / f"results{number}.pt", weights_only=True)
    return found


def whole(case: Case) -> str:
    """The case that everything is compared with: one rank, no sharding, the batch at once."""
    return Case(case.layout, 0, None, case.aggregation).name


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest number."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_11_and_12_a_partition_changes_nothing(case: Case, number: int, results: Results) -> None:
    found, expected = results[number][case.name], results[1][whole(case)]
    assert len(set(expected["lengths"].tolist())) > 1, "the lengths must differ, or a mean of means is right"
    for name, value in expected["batch"].items():
        assert distance(found["batch"][name], value) < TOLERANCE, name
    for name in ("ppo/loss", "ppo/policy_loss", "ppo/value_loss", "ppo/entropy", "ppo/ptx_loss", "ppo/grad_norm"):
        assert found["metrics"][name] == pytest.approx(expected["metrics"][name], rel=TOLERANCE, abs=1e-6), name
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        assert distance(found["weights"][name], value) < TOLERANCE or float(value.abs().max()) == 0.0, name


@pytest.mark.parametrize("layout", ["two_models", "adapters", "one_trunk"])
def test_the_update_moved_the_weights(layout: str, results: Results) -> None:
    """Weights that stay would agree too: the step is a hundred times what partitions may differ by."""
    weights = results[1][Case(layout, 0, None).name]["weights"]
    other = results[1][Case("two_models", 0, None, "sequence_mean").name]["weights"]
    if layout == "two_models":
        assert max(distance(weights[name], other[name]) for name in weights) > 10 * TOLERANCE
    assert results[1][Case(layout, 0, None).name]["metrics"]["ppo/grad_norm"] > 0.1
