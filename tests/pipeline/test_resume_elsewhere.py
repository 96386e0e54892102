"""A run that goes on with other numbers of ranks and other ZeRO stages, by the same command with other keys."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command import SMOKE, rlhf_command
from tests.run_example import Run
from tests.stage_example import metrics_of

KEYS = (
    *("peft=lora", "peft.stages=[sft]"),
    *("sft.max_steps=20", "sft.log_every=4", "sft.save_every=1000"),
    *("reward_model.max_steps=12", "reward_model.log_every=4", "reward_model.save_every=1000"),
    *("ppo.num_updates=5", "ppo.save_every=1000"),
)
# Who is at work, and where it is stopped (see `run_example.held`): SFT by 2 ranks and then 1, which needs no DeepSpeed,
# the reward model by 1 and then 2, PPO by 2 and then 4.
ATTEMPTS = (
    (("zero=stage3", "distributed.num_processes=2"), ("sft", 11)),
    ((), ("reward_model", 7)),
    (("zero=stage3", "distributed.num_processes=2"), ("ppo", 7)),
)
LAST = ("zero=stage2", "distributed.num_processes=4")
MOVES = (
    "2 ranks, zero.stage=3, fp32; this run is 1 rank, zero.stage=0",
    "1 rank, zero.stage=0, fp32; this run is 2 ranks, zero.stage=3",
    "2 ranks, zero.stage=3, fp32; this run is 4 ranks, zero.stage=2",
)


# Relative, of weights and metrics alike.
TOLERANCE = 1e-4
# What is zero but for rounding has no relative error.
ROUNDING = 1e-6


def _run_in_many_shapes(folder: Path, whole: Path) -> Path:
    """The run folder, after each shape has said that it goes on from the one before.

    The inputs of the stages are those of the run `whole`: only what a stage itself does is compared.
    """
    made = whole / "stages"
    inputs = (
        *("stages=[sft,reward_model,ppo]", f"reward_model.comparisons={made}/collect/comparisons"),
        *(f"reward_model.base={made}/sft/model", f"ppo.policy={made}/sft/model"),
        f"ppo.reward_model={made}/reward_model/model",
    )
    said = []
    for number, (keys, hold) in enumerate(ATTEMPTS):
        with (folder / f"said-{number}").open("w+") as output:
            arguments = (*KEYS, *inputs, *keys, "run.dir=null", "run.root=runs")
            with Run(folder, *arguments, output=output.fileno(), hold=hold) as run:
                run.wait_for_hold()
                code, _, _ = run.stop(signal.SIGTERM)
            output.seek(0)
            said.append(" ".join(output.read().split()))
        assert code == 128 + signal.SIGTERM, said[-1]
    last = rlhf_command("run", *SMOKE, *KEYS, *inputs, *LAST, "run.root=runs", cwd=folder)
    assert last.returncode == 0, last.stderr
    said.append(" ".join((last.stdout + last.stderr).split()))
    for move, text in zip(MOVES, said[1:], strict=True):
        assert f"was written by {move}" in text, text
    # The default folder does not depend on how many ranks there are, or on ZeRO.
    (path,) = (folder / "runs/smoke").iterdir()
    return path


def _published(run: Path, stage: str) -> dict[str, torch.Tensor]:
    (file,) = (run / "stages" / stage / "model").glob("*model.safetensors")
    return load_file(file)


def _off(found: float, expected: float) -> bool:
    return abs(found - expected) > max(TOLERANCE * abs(expected), ROUNDING)


@pytest.mark.distributed
def test_the_run_goes_on_as_it_would_have(tmp_path: Path) -> None:
    whole = rlhf_command("run", *SMOKE, *KEYS, "stages=[sft,collect,reward_model,ppo]", "run.dir=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    path = _run_in_many_shapes(tmp_path, tmp_path / "whole")
    off: dict[tuple[object, ...], object] = {}
    for stage in ("sft", "reward_model", "ppo"):
        expected = _published(tmp_path / "whole", stage)
        weights = _published(path, stage)
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            error = float((weights[name] - value).abs().max() / value.abs().max())
            if error > TOLERANCE:
                off[stage, name] = error
        lines, expected_lines = metrics_of(path, stage), metrics_of(tmp_path / "whole", stage)
        assert [line["step"] for line in lines] == [line["step"] for line in expected_lines]
        for line, wanted in zip(lines, expected_lines, strict=True):
            numbers = {name: value for name, value in wanted.items() if isinstance(value, float)}
            off |= {
                (stage, line["step"], name): (line[name], value)
                for name, value in numbers.items()
                if _off(line[name], value)
            }
    assert off == {}
