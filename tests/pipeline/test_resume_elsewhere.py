"""A run that was begun on two ranks under ZeRO-3 ends on one without DeepSpeed, by the same command with other keys."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command import SMOKE, rlhf_command
from tests.run_example import Run
from tests.stage_example import metrics_of

BEGUN = ("stages=[sft]", "sft.max_steps=60", "sft.log_every=5", "sft.save_every=1000")
PPO = (
    *("stages=[sft,ppo]", "sft.max_steps=2", "ppo.num_updates=8", "ppo.value_init=policy"),
    "ppo.rewards={short: {type: length, unit: words, maximum: 2}}",
)


def _stop_and_go_on(folder: Path, stage: str, step: int, keys: tuple[str, ...]) -> tuple[Path, str]:
    """The run that two ranks began and one ended, and what was said at the end."""
    run = Run(folder, *keys, "zero=stage3", "distributed.num_processes=2", "run.dir=null", "run.root=runs")
    # The default folder does not depend on how many ranks there are, or on ZeRO.
    run.wait_until(lambda: any((folder / "runs/smoke").glob("*/metrics.jsonl")), "a run folder")
    (run.path,) = (folder / "runs/smoke").iterdir()
    run.wait_for_step(stage, step)
    code, said, _ = run.stop(signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, said
    again = rlhf_command("run", *SMOKE, *keys, "run.root=runs", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert list((folder / "runs/smoke").iterdir()) == [run.path]
    return run.path, again.stdout + again.stderr


def _published(run: Path, stage: str) -> dict[str, torch.Tensor]:
    (file,) = (run / "stages" / stage / "model").glob("*model.safetensors")
    return load_file(file)


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "step", "keys"), [("sft", 10, (*BEGUN, "peft=lora")), ("ppo", 3, PPO)])
def test_the_run_goes_on_as_it_would_have(tmp_path: Path, stage: str, step: int, keys: tuple[str, ...]) -> None:
    path, said = _stop_and_go_on(tmp_path, stage, step, keys)
    assert "was written by 2 ranks, zero.stage=3, fp32; this run is 1 rank, zero.stage=0, fp32" in " ".join(
        said.split()
    )
    whole = rlhf_command("run", *SMOKE, *keys, "run.dir=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    expected = _published(tmp_path / "whole", stage)
    weights = _published(path, stage)
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert float((weights[name] - value).abs().max()) <= 1e-4 * float(value.abs().max()), name
    lines, expected_lines = metrics_of(path, stage), metrics_of(tmp_path / "whole", stage)
    assert [line["step"] for line in lines] == [line["step"] for line in expected_lines]
    for line, wanted in zip(lines, expected_lines, strict=True):
        numbers = {name: value for name, value in wanted.items() if isinstance(value, float)}
        found = torch.tensor([line[name] for name in numbers], dtype=torch.float64)
        torch.testing.assert_close(
            found, torch.tensor(list(numbers.values()), dtype=torch.float64), rtol=1e-3, atol=1e-4
        )
