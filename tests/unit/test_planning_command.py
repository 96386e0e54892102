"""`rlhf plan`: a verdict with numbers, what to change, JSON, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.bookkeeping import NOT_IDENTITY
from rlhf.cli import main
from rlhf.config import RLHFConfig, config_hash, load_config
from rlhf.distributed.memory import Measured
from rlhf.planning.during_run import StageMemory
from rlhf.planning.plan import GIB, make_plan
from rlhf.planning.render import duration, size, verdict
from tests.stage_example import one_process
from tests.unit.test_planning import write_llama

PPO = (
    "stages=[ppo]",
    "distributed.num_processes=8",
    "zero=stage3",
    "ppo.max_response_tokens=512",
    "data.max_prompt_tokens=512",
    "ppo.micro_batch_size=1",
    "ppo.rollout_batch_size=16",
)


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `rlhf plan`."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, output, _ = answer(capsys, *arguments, "--json")
    assert code == 0
    body: dict[str, Any] = json.loads(output)
    return body


def test_llama_3_8b_ppo_on_eight_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight GPUs of 80 GB, ZeRO-3: an answer with numbers, and where they come from."""
    model = f"model.path={write_llama(tmp_path)}"
    code, output, _ = answer(capsys, model, *PPO)
    assert code == 0
    last = [line for line in output.splitlines() if line.startswith("fits: ")]
    assert len(last) == 1
    assert "8 × a100-80gb" in last[0]
    assert "limit 77.0 GiB" in last[0]
    assert "8,030,261,248 parameters" in output
    body = plan_json(capsys, model, *PPO)
    stage = body["stages"]["ppo"]
    # Yes, and not by far. What no plan may leave out while responses are sampled: policy and critic, whole in 16 bits
    # and an eighth of their 18 bytes of weights, gradients and optimiser, together 61 GiB; and 2 GiB of cache, keys and
    # values of 32 layers with 8 heads of 128 for 16 responses of 1024 tokens.
    assert last[0].startswith("fits: yes")
    assert body["fits"]
    assert stage["limit_bytes"] == 77 * GIB
    policy, critic = 8_030_261_248, 8_030_261_248 - 525_336_576 + 4096
    lower_bound = (policy + critic) * (2 + 18 / 8) + 2 * 32 * 8 * 128 * 1024 * 16 * 2
    assert 63 * GIB < lower_bound < stage["peak_bytes"] < 77 * GIB
    assert stage["peak_bytes"] == max(phase["device_bytes"] for phase in stage["phases"])
    gather = next(phase for phase in stage["phases"] if phase["name"] == "gather")
    # Policy and critic, bfloat16, whole and an eighth; 12 bytes of the optimiser and 4 of the gradient, an eighth.
    trained = policy + critic
    assert gather["parts"]["parameters"] == pytest.approx(trained * (2 + 2 / 8))
    assert gather["parts"]["optimizer"] == pytest.approx(trained * 12 / 8)
    assert gather["parts"]["gradients"] == pytest.approx(trained * 4 / 8)
    # One parameter at a time is placed and shared out, the largest being the embedding: never the whole in float32.
    load = next(phase for phase in stage["phases"] if phase["name"] == "load")
    shares = trained * (2 + 4 + 4) / 8  # weights, their float32 masters, and the gradients' place
    assert load["parts"]["parameters"] == pytest.approx(shares + 525_336_576 * 2)


def test_what_does_not_fit_comes_with_the_first_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = f"model.path={write_llama(tmp_path)}"
    wide = [*PPO[:-2], "ppo.micro_batch_size=16", "ppo.batch_size=128", "plan.gpu=h200"]
    code, output, _ = answer(capsys, model, *wide)
    assert code == 0
    assert "fits: no" in output
    assert "first change: ppo.micro_batch_size=1 (peak" in output
    stage = plan_json(capsys, model, *wide)["stages"]["ppo"]
    largest = stage["largest_micro_batch_size"]
    assert 1 <= largest < 16
    # What it says is so: the largest one fits, the next one does not.
    for rows, fits in ((largest, True), (largest + 1, False)):
        wanted = [f"ppo.batch_size={16 * rows}", f"ppo.micro_batch_size={rows}"]
        config = load_config([model, *PPO[:-2], "plan.gpu=h200", *wanted]).config
        assert make_plan(config).fits is fits


def test_a_small_gpu_needs_several_changes(tmp_path: Path) -> None:
    model = f"model.path={write_llama(tmp_path)}"
    plan = make_plan(load_config([model, *PPO, "zero=stage2", "plan.gpu=a100-40gb"]).config)
    changes = plan.stages[0].changes
    assert not plan.fits
    # Whole, policy, critic, reference and reward model take 58 GiB in 16 bits: nothing helps without sharding them all.
    assert {"zero.stage=3", "zero.shard_frozen=true"} <= {name for change in changes for name in change.overrides}
    assert changes[-1].fits
    assert changes[-1].peak <= 37 * GIB
    assert all(change.peak > 37 * GIB for change in changes[:-1])
    assert f"first change: {' '.join(changes[0].overrides)}" in verdict(plan)


def test_stages_and_devices_of_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    body = plan_json(capsys, "experiment=quickstart", "distributed.device=cpu", "stages=[sft,reward_model]")
    assert list(body["stages"]) == ["sft", "reward_model"]
    assert body["fits"]
    assert body["precision"] == "fp32"
    work = body["stages"]["sft"]["work"]
    assert work["seconds"] is None  # no peak of this machine's CPU is stated
    assert work["tokens"] == 32 * 128


def test_time_scales_with_gpus_and_efficiency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft = [f"model.path={write_llama(tmp_path)}", "stages=[sft]", "sft.batch_size=64", "sft.max_steps=10"]
    one = plan_json(capsys, *sft, "plan.efficiency=0.5")["stages"]["sft"]["work"]
    two = plan_json(capsys, *sft, "plan.efficiency=0.25", "distributed.num_processes=4")["stages"]["sft"]["work"]
    assert one["seconds"] == pytest.approx(one["flops"] / (0.5 * 312e12))
    assert two["seconds"] == pytest.approx(one["seconds"] / 2)
    assert one["steps"] == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan.gpu=b200x"], "plan.gpu"),
        (["plan.efficiency=1.5"], "plan.efficiency"),
        (["plan.efficiency=0"], "plan.efficiency"),
        (["plan.gpu_memory_gib=-3"], "plan.gpu_memory_gib"),
        (["plan.gpu_memory_gib=1"], "plan.reserved_gib"),
        (["distributed.num_processes=0"], "distributed.num_processes"),
        (["stages=[collect,report]"], "no training stage"),
    ],
)
def test_mistakes_end_with_two(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = answer(capsys, "experiment=smoke", *arguments)
    assert code == 2
    assert message in errors


def test_a_folder_without_config_ends_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = answer(capsys, f"model.path={tmp_path}")
    assert code == 2
    assert "has no config.json" in errors


def test_planner_settings_are_not_the_run() -> None:
    plain, other = RLHFConfig(), RLHFConfig.model_validate({"plan": {"gpu": "h100", "efficiency": 0.3}})
    assert config_hash(plain, exclude=NOT_IDENTITY) == config_hash(other, exclude=NOT_IDENTITY)


def test_numbers_for_people() -> None:
    assert size(3 * 2**20) == "3 MiB"
    assert size(1.5 * GIB) == "1.50 GiB"
    assert size(77 * GIB) == "77.0 GiB"
    assert [duration(value) for value in (5.25, 600, 7300, 864_000)] == ["5.25 s", "10 min", "2.03 h", "10 days"]


def test_a_stage_that_cannot_be_planned_runs_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RLHFConfig.model_validate({"distributed": {"device": "cpu"}})
    memory = StageMemory.start(config, "sft", {"base": str(tmp_path / "gone")}, one_process())
    assert memory.predicted is None
    assert "memory: no prediction (ConfigError: model.path=" in capsys.readouterr().out
    assert set(memory.summary([Measured(5, 3), Measured(4, 2)])) == {
        "perf/peak_memory_bytes",
        "perf/memory_growth_bytes",
    }


def test_the_prediction_stands_beside_the_measured_memory(capsys: pytest.CaptureFixture[str]) -> None:
    config = RLHFConfig.model_validate({"distributed": {"device": "cpu"}})
    memory = StageMemory.start(config, "sft", {}, one_process())
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    measured = memory.meter.read()
    assert 64 * 2**20 <= measured.growth < 80 * 2**20
    assert measured.peak >= measured.growth
    entries = memory.summary([measured])
    assert entries["perf/predicted_memory_bytes"] == pytest.approx(memory.predicted)
    assert "MiB, measured 6" in capsys.readouterr().out
    assert len(block) == 64 * 2**20
