"""Each check of `rlhf doctor` with its bad case, and that the doctor always comes to its end."""

from __future__ import annotations

import io
import json
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import RLHFConfig
from rlhf.doctor import host, network, packages, storage, visit
from rlhf.doctor.devices import Device, Probe, check_torch, probe_torch
from rlhf.doctor.finding import Finding
from rlhf.doctor.packages import check_packages
from rlhf.doctor.ranks import check_ranks, difference, planned_checks
from rlhf.doctor.render import Printer, as_json, text_lines, verdict
from rlhf.errors import ConfigError
from rlhf.runs import machine
from tests.command import ROOT
from tests.silent_server import black_hole, silent_server
from tests.small_disk import small_disk

H100 = Device("NVIDIA H100", 80 * 2**30, (9, 0))
V100 = Device("Tesla V100", 16 * 2**30, (7, 0))
BACKENDS: dict[str, str | None] = {"gloo": "available", "nccl": "2.27.3"}


def config(**sections: Any) -> RLHFConfig:
    return RLHFConfig.model_validate(sections)


def late(*_: object, **__: object) -> Any:
    """A name server that nobody wants to wait for."""
    time.sleep(60)
    raise socket.gaierror(-3, "Temporary failure in name resolution")


def check_bad(finding: Finding, level: str, found: str, remedy: str) -> None:
    assert (finding.level, found in finding.found, remedy in finding.remedy) == (level, True, True), finding


# --- packages ---------------------------------------------------------------------------------------------------------
def of(findings: list[Finding], name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


def test_installed_packages_are_supported() -> None:
    findings = check_packages(config())
    assert {finding.level for finding in findings} == {"green"}
    assert of(findings, "trl").found.startswith(metadata.version("trl"))
    assert [finding.name for finding in findings] == ["python", *packages.NAMED, "other packages"]


@pytest.mark.parametrize(
    ("name", "version", "level", "found", "remedy"),
    [
        ("trl", "1.15.3", "red", "1.15.3 is older than supported (", "pip install 'trl"),
        ("trl", None, "red", "not installed", "pip install 'trl"),
        ("transformers", "6.1.0", "yellow", "6.1.0 is newer than supported (", "pip install 'transformers"),
        ("python", "3.10.4", "red", "3.10.4 is older", "install Python >=3.11"),
        ("wandb", None, "yellow", "metrics.jsonl alone", "pip install 'wandb"),
        ("deepspeed", None, "yellow", "only zero=none works", "pip install 'deepspeed"),
        ("numpy", "1.25.0", "red", "1.25.0 is older", "pip install 'numpy>=1.26'"),
    ],
)
def test_versions_out_of_range(
    name: str, version: str | None, level: str, found: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = packages.installed_version
    monkeypatch.setattr(packages, "installed_version", lambda asked: version if asked == name else real(asked))
    findings = check_packages(config())
    check_bad(of(findings, name), level, found, remedy)
    assert all(finding.level == "green" for finding in findings if finding.name != name)


def test_another_version_than_the_tested_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = {"trl": ">=1.16,<2"}
    monkeypatch.setattr(packages, "installed_version", lambda _: "1.17.2+local")
    assert packages.check_version("trl", ranges, {"trl": "1.16.0"}, config()) == Finding(
        "trl", "green", "1.17.2+local (tested: 1.16.0)"
    )
    assert packages.check_version("trl", ranges, {"trl": "1.17.2"}, config()).found == "1.17.2+local"


def test_deepspeed_is_needed_where_zero_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "installed_version", lambda _: None)
    ranges = {"deepspeed": ">=0.17"}
    assert packages.check_version("deepspeed", ranges, {}, config(zero={"stage": 2})).level == "red"


def test_an_installed_package_knows_its_ranges_without_a_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from_checkout = packages.requirements()
    monkeypatch.setattr("rlhf.__file__", str(tmp_path / "rlhf" / "__init__.py"))
    monkeypatch.setattr(metadata, "requires", lambda _: ["torch>=2.6", 'pytest>=8; extra == "test"', "trl<2,>=1.16"])
    monkeypatch.setattr(metadata, "metadata", lambda _: {"Requires-Python": ">=3.11"})
    assert packages.requirements() == {"python": ">=3.11", "torch": ">=2.6", "trl": "<2,>=1.16"}
    assert from_checkout["torch"] == ">=2.6"

    def gone(_: str) -> list[str]:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "requires", gone)
    check_bad(check_packages(config())[0], "yellow", "not installed", "pip install -e .")


# --- the host ---------------------------------------------------------------------------------------------------------
def test_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    check_bad(host.check_compiler(), "yellow", "C++ compiler and ninja", "g++")
    for name in ("g++", "ninja"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    assert host.check_compiler() == Finding("compiler", "green", f"{tmp_path}/g++, {tmp_path}/ninja")
    (tmp_path / "ninja").unlink()
    finding = host.check_compiler()
    assert finding.level == "yellow"
    assert finding.found.startswith("no ninja on the path")


@pytest.mark.parametrize("folder", ["cache/torch_extensions/py312_cu128", "extensions"])
def test_locks_of_killed_builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    if folder == "extensions":
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / folder))
    assert host.check_builds().level == "green"
    locks = [tmp_path / folder / name / "lock" for name in ("cpu_adam", "fused_adam")]
    for lock in locks:
        lock.parent.mkdir(parents=True)
        lock.touch()
    assert host.check_builds().level == "green"  # they may be building now
    os.utime(locks[0], (time.time() - 3600,) * 2)
    check_bad(host.check_builds(), "yellow", "a build of cpu_adam has not ended", f"rm {locks[0]}")


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (host.available_memory_bytes() or 0) > 2**20
    monkeypatch.setattr(machine, "memory_bytes", lambda: 16 * 2**30)
    monkeypatch.setattr(host, "available_memory_bytes", lambda: 3 * 2**29)
    check_bad(host.check_memory(), "yellow", "1.5 of 16.0 GiB free", "end other programs")
    monkeypatch.setattr(host, "available_memory_bytes", lambda: 2 * 2**30)
    assert host.check_memory().level == "green"


def test_shared_memory_matters_between_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpus: list[dict[str, Any]] = [{}]
    monkeypatch.setattr(machine, "gpus", lambda: gpus)
    with small_disk(tmp_path / "shm", "64m") as folder:
        assert host.check_shared_memory(folder).level == "green"
        gpus.append({})
        check_bad(host.check_shared_memory(folder), "yellow", "0.06 GiB", "--shm-size")
    check_bad(host.check_shared_memory(tmp_path / "none"), "yellow", "No such file", "--shm-size")


def test_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    check_bad(host.check_open_files(), "yellow", "256", "ulimit -n 65536 (at most 4096 here)")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert host.check_open_files().level == "green"


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert host.check_threads(config()).level == "green"
    ranks = {"num_processes": 4}
    finding = host.check_threads(config(distributed=ranks))
    check_bad(finding, "yellow", "4 ranks of 4 threads on 8 cores", "set OMP_NUM_THREADS to 2")
    finding = host.check_threads(config(distributed={**ranks, "num_threads": 3}))
    check_bad(finding, "yellow", "4 ranks of 3 threads", "set distributed.num_threads to 2")
    monkeypatch.setattr(host, "available_cores", lambda: 2)
    check_bad(host.check_threads(config(distributed=ranks)), "yellow", "on 2 cores", "at most 2 processes")


def test_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.check_loopback().level == "green"

    def refused(*_: object, **__: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refused)
    check_bad(host.check_loopback(), "red", "Network is unreachable", "ip link set lo up")


def test_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")

    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    check_bad(host.check_host_name(), "yellow", "Name or service not known", "/etc/hosts")
    monkeypatch.setattr(host, "RESOLVE_SECONDS", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", late)
    check_bad(host.check_host_name(), "yellow", "no answer within 0.1 s", "/etc/hosts")


# --- disks ------------------------------------------------------------------------------------------------------------
def test_run_folder_is_really_tried_and_nothing_stays(tmp_path: Path) -> None:
    finding = storage.check_run_folder(config(run={"root": str(tmp_path / "a/b")}))
    assert finding.level in ("green", "yellow")
    assert f"{tmp_path}/a/b, writable" in finding.found
    assert list(tmp_path.iterdir()) == []


def test_run_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = storage.check_run_folder(config(run={"root": str(tmp_path / "file/runs")}))
    check_bad(finding, "red", "file is not a folder", "set run.root")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    finding = storage.check_run_folder(config(run={"dir": str(tmp_path / "link")}))
    check_bad(finding, "red", "a link to nothing", "set run.dir")


@pytest.fixture
def read_only_folder(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "1m") as folder:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        yield folder


def test_read_only_disk(read_only_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = storage.check_run_folder(config(run={"root": str(read_only_folder / "runs")}))
    check_bad(finding, "red", "its file system is read-only", "set run.root")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(read_only_folder / "hub"))
    check_bad(storage.check_cache(), "yellow", "its file system is read-only", "HF_HOME")


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk", "1m") as folder:
        check_bad(storage.check_run_folder(config(run={"root": str(folder)})), "red", "only 1 MiB free", "free some")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
        check_bad(storage.check_cache(), "yellow", "only 1 MiB free", "HF_HOME")
        (folder / "fill").write_bytes(b"x" * 2**20)
        check_bad(storage.check_run_folder(config(run={"root": str(folder)})), "red", "no space left", "run.root")


@pytest.mark.parametrize(
    ("free", "level"), [(199 << 20, "red"), (200 << 20, "yellow"), ((10 << 30) - 1, "yellow"), (10 << 30, "green")]
)
def test_little_space(free: int, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "free_bytes", lambda _: free)
    assert storage.check_run_folder(config(run={"root": str(tmp_path)})).level == level


# --- the network ------------------------------------------------------------------------------------------------------
@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def hub_at(address: str, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.5) -> Finding:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    started = time.monotonic()
    finding = network.check_hub(config(), seconds)
    assert time.monotonic() - started < seconds + 10
    return finding


@pytest.mark.usefixtures("online")
def test_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with silent_server() as address:
        check_bad(hub_at(address, monkeypatch), "yellow", f"{address} does not answer (no answer", "HF_HUB_OFFLINE=1")
    check_bad(hub_at(address, monkeypatch), "yellow", "Connection refused", "HF_ENDPOINT")
    with black_hole() as address:
        check_bad(hub_at(address, monkeypatch), "yellow", "no answer within 0.5 s", "proxy")
    monkeypatch.setattr(socket, "getaddrinfo", late)
    check_bad(hub_at("http://hub.invalid", monkeypatch), "yellow", "no answer within 0.5 s", "network")


@pytest.mark.usefixtures("online")
def test_hub_without_network_names_what_the_config_wants_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    finding = network.check_hub(config(model={"path": "owner/name"}))
    assert finding.level == "green"
    assert finding.found.endswith("this config asks it for owner/name")
    assert "asks" not in network.check_hub(config(model={"path": str(tmp_path)})).found


@pytest.mark.usefixtures("online")
def test_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    assert network.check_wandb(config()) == Finding(
        "W&B", "green", "no API key: runs log offline (wandb sync uploads later)"
    )
    assert "disabled" in network.check_wandb(config(tracking={"wandb": "disabled"})).found
    check_bad(network.check_wandb(config(tracking={"wandb": "online"})), "yellow", "no API key", "wandb login")
    monkeypatch.setenv("WANDB_API_KEY", "k")
    with silent_server() as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        started = time.monotonic()
        check_bad(network.check_wandb(config(), 0.3), "yellow", f"{address} does not answer", "tracking.wandb=offline")
        assert time.monotonic() - started < 10
        monkeypatch.setattr(network, "why_silent", lambda *_: None)
        assert network.check_wandb(config()).found == f"there is an API key for {address}, which answers"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    check_bad(network.check_wandb(config()), "yellow", "not installed", "pip install wandb")


# --- torch and its devices --------------------------------------------------------------------------------------------
def test_a_broken_torch_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: undefined symbol: boom')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    probe = probe_torch()
    (finding,) = check_torch(probe, config())
    check_bad(finding, "red", "ImportError: libtorch.so: undefined symbol: boom", "pip install --force-reinstall torch")
    (tmp_path / "torch.py").write_text("import os\nos.kill(os.getpid(), 11)\n")
    assert "ended with -11" in str(probe_torch().error)
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(60)\n")
    assert "more than 0.5 s" in str(probe_torch(0.5).error)


def test_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", list)
    probe = Probe(backends={"gloo": "available", "nccl": None})
    gpus, backends = check_torch(probe, config())
    assert (gpus.level, gpus.found) == ("green", "none: runs use the CPU")
    assert backends.level == "green"
    gpus, _ = check_torch(probe, config(distributed={"device": "cuda"}))
    check_bad(gpus, "red", "distributed.device=cuda", "distributed.device=cpu")
    assert check_torch(Probe(backends={"gloo": None, "nccl": None}), config())[1].level == "red"


def test_gpus_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [{"name": "x", "driver": "535.1"}])
    gpus, _ = check_torch(Probe(backends=BACKENDS), config())
    check_bad(gpus, "yellow", "this torch is a CPU build", "CUDA build")
    probe = Probe(backends=BACKENDS, cuda="12.8", complaint="The NVIDIA driver on your system is too old")
    gpus, _ = check_torch(probe, config(distributed={"device": "cuda"}))
    check_bad(gpus, "red", "driver on your system is too old", "CUDA build")


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [{"driver": "570.1"}] * 2)
    two = Probe((H100, H100), BACKENDS, "12.8")
    gpus, backends = check_torch(two, config())
    assert gpus.level == backends.level == "green"
    assert "NVIDIA H100, 80 GiB, compute capability 9.0" in gpus.found
    assert gpus.found.endswith("CUDA 12.8, driver 570.1; bf16")
    gpus, _ = check_torch(two, config(distributed={"num_processes": 4}))
    check_bad(gpus, "red", "for 4 processes", "at most 2")
    assert check_torch(two, config(distributed={"num_processes": 4, "device": "cpu"}))[0].level == "green"
    old = Probe((V100,), BACKENDS, "12.8")
    check_bad(check_torch(old, config())[0], "yellow", "no bfloat16 units", "it works")
    check_bad(check_torch(old, config(distributed={"precision": "bf16"}))[0], "red", "no bfloat16", "precision=fp32")
    _, backends = check_torch(Probe((H100, H100), {"gloo": "available", "nccl": None}, "12.8"), config())
    assert backends.level == "red"


# --- ranks ------------------------------------------------------------------------------------------------------------
def test_which_ranks_are_started() -> None:
    assert [check.name for check in planned_checks(config(), 0)] == ["2 ranks on CPU"]
    (check,) = planned_checks(config(distributed={"num_processes": 4}, zero={"stage": 3}), 0)
    assert (check.num_processes, check.zero["stage"], check.precision) == (4, 3, "auto")
    assert [check.name for check in planned_checks(config(), 8)] == ["2 ranks on CPU", "8 ranks on GPU"]
    assert planned_checks(config(), 1)[1].name == "1 rank on GPU"
    assert planned_checks(config(distributed={"num_processes": 4}), 8)[1].num_processes == 4
    assert len(planned_checks(config(distributed={"device": "cpu"}), 8)) == 1
    assert planned_checks(config(), 0)[0].zero["stage"] == 2


def rank(**changes: Any) -> dict[str, Any]:
    good = {"world_size": 2, "precision": "fp32", "sum": 3.0, "weights": [0.75, 1.5], "norm": [5**0.5], "seconds": 1.0}
    return {**good, **changes}


def test_what_ranks_computed_is_compared() -> None:
    assert difference([rank(), rank()]) is None
    assert "no result from rank 1" in str(difference([rank(), None]))
    assert "all-reduce gave 2.0 on rank 1 instead of 3.0" in str(difference([rank(), rank(sum=2.0)]))
    # What a rank alone would get: its own share of the gradient, twice.
    assert "weights after a ZeRO step" in str(difference([rank(weights=[0.8333, 1.6667]), rank()]))
    assert "norm" in str(difference([rank(), rank(norm=[2.0])]))
    assert "one of 1 ranks" in str(difference([rank(world_size=1), rank()]))
    assert difference([rank(precision="bf16", weights=[0.7505, 1.5])] * 2) is None
    assert difference([rank(weights=[0.7505, 1.5])] * 2) is not None


def test_ranks_that_fail_or_hang_are_findings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch today')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    (check,) = planned_checks(config(), 0)
    check_bad(check_ranks(check), "red", "ImportError: no torch today", "GLOO_SOCKET_IFNAME")
    hang = f"import os, time\nopen('{tmp_path}/pid%d' % os.getpid(), 'w')\ntime.sleep(60)\n"
    (tmp_path / "torch.py").write_text(hang)

    class Impatient(subprocess.Popen[bytes]):
        """Waits until both ranks hang, however long this machine takes to start them, and not one moment more."""

        def wait(self, timeout: float | None = None) -> int:
            while timeout == 77 and len(list(tmp_path.glob("pid*"))) < 2:
                time.sleep(0.05)
            return super().wait(0.1 if timeout == 77 else timeout)

    monkeypatch.setattr(subprocess, "Popen", Impatient)
    check_bad(check_ranks(check, 77.0), "red", "not done after 77 s", "GLOO_SOCKET_IFNAME")
    pids = [int(path.name.removeprefix("pid")) for path in tmp_path.glob("pid*")]
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


# --- the report -------------------------------------------------------------------------------------------------------
GREEN, YELLOW, RED = Finding("a", "green", "x"), Finding("b", "yellow", "y", "do y"), Finding("c", "red", "z", "do z")


def test_verdict() -> None:
    assert verdict([GREEN], "CPU") == ("ready (CPU)", "green")
    assert verdict([GREEN, YELLOW], "2 GPUs: x") == ("ready (2 GPUs: x), with 1 warning", "green")
    assert verdict([YELLOW, YELLOW, RED], "CPU") == ("not ready: 1 problem and 2 warnings", "red")


def test_lines_read_without_colours() -> None:
    assert text_lines(GREEN)[0].split() == ["✓", "ok", "a", "x"]
    assert [line.split() for line in text_lines(RED)] == [["✗", "problem", "c", "z"], ["→", "do", "z"]]
    stream = io.StringIO()
    printer = Printer(stream)
    printer.show(YELLOW)
    printer.close("ready (CPU)", "green")
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().splitlines()[-1] == "✓ ready (CPU)"


def test_report_for_machines() -> None:
    report = as_json([GREEN, RED], "CPU")
    assert report["ready"] is False
    assert report["findings"][1] == {"name": "c", "level": "red", "found": "z", "remedy": "do z"}


def sick(monkeypatch: pytest.MonkeyPatch, finding: Finding | None) -> None:
    """A visit in which nothing is started, and the memory check finds what is given, or fails."""

    def memory() -> Finding:
        if finding is None:
            raise RuntimeError("never seen before")
        return finding

    monkeypatch.setattr(host, "check_memory", memory)
    monkeypatch.setattr(visit, "probe_torch", lambda: Probe(backends=BACKENDS))
    monkeypatch.setattr(visit, "planned_checks", lambda *_: [])
    monkeypatch.setattr(machine, "gpus", list)


@pytest.mark.parametrize(("finding", "code"), [(GREEN, 0), (YELLOW, 0), (RED, 1), (None, 1)])
def test_exit_code_and_json(
    finding: Finding | None, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sick(monkeypatch, finding)
    assert visit.run_doctor(["--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] is (code == 0)
    assert all(entry["remedy"] for entry in report["findings"] if entry["level"] != "green")
    if finding is None:
        (entry,) = [entry for entry in report["findings"] if entry["level"] == "red"]
        assert entry["found"] == "the check itself failed: RuntimeError: never seen before"


def test_a_mistyped_key_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run\.rot(.|\n)*run\.root"):
        visit.run_doctor(["run.rot=x"])


def test_the_doctor_itself_stays_light() -> None:
    """With a broken torch it must still come to its report."""
    code = (
        "import sys\nfrom rlhf.doctor import Visit\nfrom rlhf.config import RLHFConfig\n"
        "from rlhf.doctor import visit\nfrom rlhf.doctor.devices import Probe\n"
        "visit.probe_torch = lambda: Probe(error='broken')\n"
        "print([f.level for f in Visit(RLHFConfig()).findings()].count('red'))\n"
        "print([name for name in ('torch', 'transformers', 'deepspeed', 'wandb', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split("\n")[:2] == ["1", "[]"]


def test_checks_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three checks that wait for a network must not add up: here each waits until the others are at work too."""
    sick(monkeypatch, GREEN)
    together, met = threading.Barrier(3), []

    def waiting(*_: object) -> Finding:
        met.append(together.wait(20))
        return GREEN

    for module, name in ((network, "check_hub"), (network, "check_wandb"), (host, "check_host_name")):
        monkeypatch.setattr(module, name, waiting)
    assert len(list(visit.Visit(config()).findings())) > 10
    assert sorted(met) == [0, 1, 2]
