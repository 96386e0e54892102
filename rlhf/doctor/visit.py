"""The list of checks, in the order of the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from rlhf.config import RLHFConfig
from rlhf.doctor import host, network, packages, storage
from rlhf.doctor.devices import Probe, check_torch, probe_torch
from rlhf.doctor.finding import Finding, red
from rlhf.doctor.ranks import check_ranks, planned_checks
from rlhf.doctor.render import Printer, as_json, verdict
from rlhf.errors import EXIT_FAILURE, EXIT_SUCCESS

JSON_FLAG = "--json"
_Check = Callable[[], Finding | list[Finding]]


def run_doctor(arguments: Sequence[str]) -> int:
    """`rlhf doctor [key=value ...] [--json]`: prints the report. Returns the exit code, 1 when something is red.

    Raises `ConfigError` for a key or value that is wrong.
    """
    from rlhf.config.compose import load_config

    config = load_config([argument for argument in arguments if argument != JSON_FLAG]).config
    printer = None if JSON_FLAG in arguments else Printer()
    visit = Visit(config)
    findings: list[Finding] = []
    for finding in visit.findings():
        findings.append(finding)
        if printer is not None:
            printer.show(finding)
    if printer is None:
        print(json.dumps(as_json(findings, visit.device), indent=2))
    else:
        printer.close(*verdict(findings, visit.device))
    return EXIT_FAILURE if any(finding.level == "red" for finding in findings) else EXIT_SUCCESS


class Visit:
    """All checks for one config. `probe` is what torch said of itself, known when `findings` has come to its end."""

    def __init__(self, config: RLHFConfig) -> None:
        self.config = config
        self.probe = Probe()

    @property
    def device(self) -> str:
        """What runs will use, for the verdict."""
        devices = self.probe.devices
        if not devices or self.config.distributed.device == "cpu":
            return "CPU"
        return f"{len(devices)} GPU{'s' if len(devices) > 1 else ''}: {', '.join(sorted({d.name for d in devices}))}"

    def findings(self) -> Iterator[Finding]:
        """Every finding as soon as it and those before it are there."""
        config = self.config
        quick: list[tuple[str, _Check]] = [
            ("packages", lambda: packages.check_packages(config)),
            ("compiler", host.check_compiler),
            ("builds", host.check_builds),
            ("memory", host.check_memory),
            ("shared memory", host.check_shared_memory),
            ("open files", host.check_open_files),
            ("threads", lambda: host.check_threads(config)),
            ("run folder", lambda: storage.check_run_folder(config)),
            ("hub cache", storage.check_cache),
            ("loopback", host.check_loopback),
            ("host name", host.check_host_name),
            ("W&B", lambda: network.check_wandb(config)),
            ("hub", lambda: network.check_hub(config)),
        ]
        with ThreadPoolExecutor(max_workers=4) as pool:
            probed = pool.submit(probe_torch)
            for future in [pool.submit(guarded, name, check) for name, check in quick]:
                yield from future.result()
            self.probe = probed.result()
        yield from guarded("torch works", lambda: check_torch(self.probe, config))
        if self.probe.error is None:
            # One after the other: they would take each other's cores and memory.
            for check in planned_checks(config, len(self.probe.devices)):
                yield from guarded(check.name, partial(check_ranks, check))


def guarded(name: str, check: _Check) -> list[Finding]:
    """What a check found; one that fails itself is a red finding, so that the others are still shown."""
    try:
        found = check()
    except Exception as error:  # noqa: BLE001 - sick in a way nobody foresaw: saying so is the doctor's purpose
        found = red(
            name, f"the check itself failed: {type(error).__name__}: {error}", "report this as a mistake of rlhf"
        )
    return found if isinstance(found, list) else [found]
