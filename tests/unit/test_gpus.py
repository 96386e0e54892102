"""Which GPUs a run takes where several runs share a host."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from rlhf.config.distributed import DistributedConfig
from rlhf.distributed.gpus import VISIBLE, claimed_gpus
from rlhf.errors import ConfigError


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `nvidia-smi` prints: four GPUs, the first one old. Of names that no other test's claims have."""
    name = f"GPU-{uuid.uuid4().hex}"
    rows = [f"{number}, {name}-{number}, [N/A], {capability}" for number, capability in enumerate((7.0, 9, 9, 9.0))]
    listing = tmp_path / "listing"
    listing.write_text("\n".join(rows) + "\n")
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nexec cat '{listing}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return listing


def numbers(env: dict[str, str]) -> list[int]:
    return [int(name.rpartition("-")[2]) for name in env[VISIBLE].split(",")]


def test_runs_at_the_same_time_take_different_gpus(nvidia_smi: Path) -> None:
    first: dict[str, str] = {}
    second: dict[str, str] = {}
    two, one = DistributedConfig(num_processes=2), DistributedConfig(num_processes=1)
    with claimed_gpus(two, first):
        assert numbers(first) == [1, 2]
        with claimed_gpus(two, first):  # the run's next stage
            assert numbers(first) == [1, 2]
        with claimed_gpus(one, second):
            assert numbers(second) == [3]
        assert second == {}
        refused = pytest.raises(
            ConfigError, match=r"num_processes is 2, but of this host's 3 GPUs other runs have 1, 2:"
        )
        with refused, claimed_gpus(two, second):
            pass
        with claimed_gpus(one, second):  # what was refused has kept nothing
            assert numbers(second) == [3]
    with claimed_gpus(two, second):
        assert numbers(second) == [1, 2]


@pytest.mark.parametrize(
    ("config", "env", "listing"),
    [
        (DistributedConfig(), {VISIBLE: "3"}, None),
        (DistributedConfig(device="cpu"), {}, None),
        (DistributedConfig(num_processes=4), {}, None),
        (DistributedConfig(), {}, "0, GPU-0, [N/A], 7.0\n1, GPU-1, [N/A], 9.0\n"),
        (DistributedConfig(), {}, "0, GPU-0, Enabled, 9.0\n1, GPU-1, Disabled, 9.0\n"),
        (DistributedConfig(), {}, "Failed to initialize NVML: Driver/library version mismatch\n"),
        (DistributedConfig(), {}, ""),
    ],
    ids=["chosen", "cpu", "too_few", "one_new", "partitioned", "broken", "none"],
)
def test_where_nothing_is_chosen(
    nvidia_smi: Path, config: DistributedConfig, env: dict[str, str], listing: str | None
) -> None:
    if listing is not None:
        nvidia_smi.write_text(listing)
    before = dict(env)
    with claimed_gpus(config, env):
        assert env == before


def test_a_host_without_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    env: dict[str, str] = {}
    with claimed_gpus(DistributedConfig(), env):
        assert env == {}
