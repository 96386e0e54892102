"""Rollouts on two ranks under ZeRO-3 that stop at different lengths: one gather, no hang, one process's numbers."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.stages.ppo import loop
from rlhf.stages.ppo.rollout import gather_experience
from tests.distributed.generation_worker import MAX_TOKENS, fixed_logits, make_job, responses, stopping_at
from tests.distributed.ranks import run_worker
from tests.ppo_example import write_models

pytestmark = pytest.mark.distributed

RANKS = (0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    write_models(folder / "models")
    run_worker("generation_worker", folder)
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    """What each rank found."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in RANKS]


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """One process without DeepSpeed: its logits, and the rollout whose even rows stop at once and odd rows never."""
    job = make_job(folder, {"stage": 0}, num_processes=1)
    engine = loop.make_engine(job)
    found = [
        responses(gather_experience(engine, part.models, job.prompts, job.section, job.runtime, job.seed, 0))
        for part in (stopping_at(job, 1), stopping_at(job, MAX_TOKENS))
    ]
    width = MAX_TOKENS
    merged = {}
    for name, short in found[0].items():
        fill = {"mask": 0, "ids": -1}.get(name, 0.0)
        wide = short if short.dim() == 1 else torch.nn.functional.pad(short, (0, width - short.shape[1]), value=fill)
        merged[name] = torch.where(_even(len(wide), wide.dim()), wide, found[1][name])
    with engine.gathered(), job.models.actor_critic.policy_role() as policy:
        return {"logits": fixed_logits(policy), "experience": merged}


def _even(num_rows: int, num_axes: int) -> Tensor:
    even = torch.arange(num_rows) % 2 == 0
    return even if num_axes == 1 else even[:, None]


def test_the_ranks_had_unequally_much_to_do(seen: list[dict[str, Any]]) -> None:
    lengths = seen[0]["experience"]["mask"].sum(dim=1).tolist()
    assert lengths == [1, MAX_TOKENS] * 4


@pytest.mark.parametrize("rank", RANKS)
def test_a_rollout_gathers_once_and_releases(rank: int, seen: list[dict[str, Any]]) -> None:
    found = seen[rank]
    assert len(found["gathers"]) == 1
    assert found["gathers"][0] > 20
    assert found["before"] == found["after"] == {"NOT_AVAILABLE"}
    assert found["within"] == {"AVAILABLE"}


@pytest.mark.parametrize("rank", RANKS)
def test_the_logits_are_one_process_s(rank: int, seen: list[dict[str, Any]], one: dict[str, Any]) -> None:
    torch.testing.assert_close(seen[rank]["logits"], one["logits"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", RANKS)
def test_the_rollout_is_one_process_s(rank: int, seen: list[dict[str, Any]], one: dict[str, Any]) -> None:
    found, expected = seen[rank]["experience"], one["experience"]
    assert torch.equal(found["ids"], expected["ids"])
    for name in ("sampling_logprobs", "old_logprobs", "reference_logprobs", "scores"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)
    assert found["exact_kl"].isnan().tolist() == [False] * 5 + [True] * 3
    # Policy and reference are one model still; where weights lie in memory may change the last bit.
    torch.testing.assert_close(found["old_logprobs"], found["reference_logprobs"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", ["reference", "reward"])
def test_a_rank_holds_half_of_a_frozen_model(name: str, rank: int, seen: list[dict[str, Any]]) -> None:
    model = seen[rank][name]
    assert model["status"] == {"NOT_AVAILABLE"}
    assert model["whole"] / 2 <= model["resident"] < 0.51 * model["whole"]


@pytest.mark.parametrize("rank", RANKS)
def test_a_stop_that_one_rank_hears_of_ends_the_rollout_of_both(rank: int, seen: list[dict[str, Any]]) -> None:
    assert seen[rank]["stopped"] == signal.SIGTERM
    assert seen[rank]["after stop"] == {"NOT_AVAILABLE"}
    for name, value in seen[rank]["experience"].items():
        torch.testing.assert_close(seen[rank]["again"][name], value, rtol=0, atol=0, equal_nan=True, msg=name)
