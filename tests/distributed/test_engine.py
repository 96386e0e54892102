"""The training engine: partition invariance, resume identity, gathering, checkpoints. One spawn of 1 rank, one of 2."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.engine_worker import CASES, NUM_STEPS, RESUMED, SCALES, Case, build, fixed_batch, loss_sum
from tests.distributed.ranks import run_worker

pytestmark = pytest.mark.distributed

Results = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Everything the ranks computed, by number of ranks."""
    folder = tmp_path_factory.mktemp("engine")
    found = {}
    for number in (1, 2):
        run_worker("engine_worker", folder, number, num_processes=number)
        found[number] = torch.load(folder / f"results{number}.pt", weights_only=True)
    return found


def oracle(max_grad_norm: float, num_steps: int = NUM_STEPS) -> tuple[dict[str, torch.Tensor], list[float], float]:
    """A plain torch loop over the whole batch at once, gradient clipping by hand."""
    module, optimizer, scheduler = build(seed=1)
    tokens, targets, mask = fixed_batch()
    norms = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        (loss_sum(module(tokens), targets, mask) / mask.sum()).backward()  # type: ignore[no-untyped-call]
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        norm = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
        for gradient in gradients:
            gradient.mul_(min(1.0, max_grad_norm / (norm + 1e-6)))
        optimizer.step()
        scheduler.step()
        norms.append(norm)
    return dict(module.state_dict()), norms, float(optimizer.param_groups[0]["lr"])


def distance(result: dict[str, Any], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a tensor, in the maximum norm."""
    assert set(result["weights"]) == set(expected)
    return max(
        float((result["weights"][name].float() - value).abs().max() / value.abs().max())
        for name, value in expected.items()
    )


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("case", [case for case in CASES if case.precision == "fp32"], ids=lambda case: case.name)
def test_every_partition_gives_the_plain_loop(results: Results, number: int, case: Case) -> None:
    weights, norms, rate = oracle(case.max_grad_norm)
    result = results[number][case.name]
    assert distance(result, weights) < 1e-5
    assert result["norms"] == pytest.approx(norms, rel=1e-5)
    assert result["rate"] == pytest.approx(rate)
    initial = dict(build(seed=1)[0].state_dict())
    assert distance(result, initial) > 1e-2  # it did train


def test_the_clipping_bound_is_felt(results: Results) -> None:
    clipped, free = results[1][Case(0, 2).name], results[1][Case(0, 2, max_grad_norm=100.0).name]
    assert min(clipped["norms"]) > 0.5
    assert distance(clipped, free["weights"]) > 1e-4


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("case", [case for case in CASES if case.precision == "bf16"], ids=lambda case: case.name)
def test_bf16_stays_near_fp32(results: Results, number: int, case: Case) -> None:
    weights, norms, _ = oracle(case.max_grad_norm)
    result = results[number][case.name]
    assert distance(result, weights) < 0.05
    assert result["norms"] == pytest.approx(norms, rel=0.05)
    dtype = torch.float32 if case.stage == 0 else torch.bfloat16
    assert {value.dtype for value in result["weights"].values()} == {dtype}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_many_micro_batches_in_bf16_add_up(results: Results, stage: int) -> None:
    assert results[1]["sums"][stage] == pytest.approx(sum(SCALES), rel=0.01)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("case", RESUMED, ids=lambda case: case.name)
def test_resume_is_bit_identical(results: Results, number: int, case: Case) -> None:
    assert results[number]["resume " + case.name] is True


@pytest.mark.parametrize("number", [1, 2])
def test_a_hugging_face_trainer_takes_the_json_and_leaves_nothing_behind(results: Results, number: int) -> None:
    assert results[number]["trainer"] == number
    case = CASES[-3]
    before, after = results[number][case.name], results[number]["after trainer"]
    assert all(torch.equal(after["weights"][name], value) for name, value in before["weights"].items())
