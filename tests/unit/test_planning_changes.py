"""What a plan advises is what it says: every printed change is taken by the config, and gives the stated peak."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.config import load_config
from rlhf.planning.plan import Plan, make_plan
from rlhf.planning.render import verdict
from rlhf.planning.table import SHAPES


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with the config.json of Llama-2-7B with two layers."""
    content = json.loads((SHAPES / "llama-2-7b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "num_hidden_layers": 2}))
    return tmp_path


def plan_of(model: Path, *arguments: str) -> Plan:
    return make_plan(load_config([f"model.path={model}", "distributed.num_processes=8", *arguments]).config)


@pytest.mark.parametrize(
    ("arguments", "advised"),
    [
        (("stages=[ppo]", "zero=none", "plan.gpu_memory_gib=12"), "zero.stage=3"),
        # The reward model stays whole beside adapters.
        (("stages=[ppo]", "zero=stage2", "plan.gpu_memory_gib=3", "ppo.reward_model={model}"), "peft.type=lora"),
        # 40 rows are none that 32 ranks could share.
        (("stages=[ppo]", "zero.stage=2", "ppo.batch_size=40", "plan.gpu_memory_gib=3"), "ppo.batch_size=64"),
    ],
)
def test_every_change_gives_the_peak_it_is_printed_with(model: Path, arguments: tuple[str, ...], advised: str) -> None:
    given = [argument.format(model=model) for argument in arguments]
    changes = plan_of(model, *given).stages[0].changes
    assert advised in [override for change in changes for override in change.overrides]
    together: list[str] = []
    for change in changes:
        together += change.overrides
        assert plan_of(model, *given, *together).stages[0].peak == pytest.approx(change.peak)
        if change.alone is not None:
            assert plan_of(model, *given, *change.overrides).stages[0].peak == pytest.approx(change.alone)


def test_a_change_that_a_file_for_deepspeed_forbids_is_not_advised(model: Path) -> None:
    file = model / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    changes = plan_of(model, "stages=[ppo]", f"zero.config={file}", "plan.gpu_memory_gib=5").stages[0].changes
    assert changes
    assert not any("zero.stage" in override for change in changes for override in change.overrides)


def test_the_verdict_says_what_a_host_needs(model: Path) -> None:
    plan = plan_of(model, "stages=[ppo]", "zero=stage3_offload")
    host = plan.stages[0].host * 8 / 2**30
    assert host > 20  # policy and critic of 1.2 billion, 20 bytes a parameter
    assert f"; a host needs {host:,.1f} GiB of memory)" in verdict(plan)
