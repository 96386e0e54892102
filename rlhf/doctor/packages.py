"""Versions of Python and the packages, against the ranges the code is written for and the versions it is tested with.

Nothing is imported: a package that is installed but broken is found by the checks that use it.
"""

from __future__ import annotations

import configparser
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import rlhf
from rlhf.config import RLHFConfig
from rlhf.doctor.finding import Finding, green, red, yellow

# Each gets a line of its own; the rest of the requirements share one.
NAMED = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "wandb", "datasets")
# Runs without these work; they only lack what the package does.
_OPTIONAL = {"wandb": "metrics then go to metrics.jsonl alone", "deepspeed": "only zero=none works without it"}
# Checked where the compiler is: nothing is imported from it.
_ELSEWHERE = ("ninja",)


def requirements() -> dict[str, str]:
    """Supported range of each required package, such as `>=5.0,<6`; of Python too, under `python`.

    From the installed package or, for a checkout that is only on the path, from its setup.cfg; empty without either.
    """
    from packaging.requirements import Requirement

    checkout = Path(rlhf.__file__).resolve().parent.parent / "setup.cfg"
    if checkout.is_file():
        parser = configparser.ConfigParser()
        parser.read(checkout, encoding="utf-8")
        lines = parser.get("options", "install_requires", fallback="").split("\n")
        python = parser.get("options", "python_requires", fallback="")
    else:
        try:
            lines = metadata.requires("rlhf") or []
            python = str(metadata.metadata("rlhf")["Requires-Python"] or "")
        except metadata.PackageNotFoundError:
            return {}
    found = {"python": python}
    for line in filter(None, map(str.strip, lines)):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found[requirement.name] = str(requirement.specifier)
    return found


def tested_versions() -> dict[str, str]:
    """The versions of constraints.txt, the ones tested together; empty where the checkout is not there."""
    path = Path(rlhf.__file__).resolve().parent.parent / "constraints.txt"
    if not path.is_file():
        return {}
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {name: version for name, _, version in (line.partition("==") for line in lines if "==" in line)}


def installed_version(name: str) -> str | None:
    """The version of an installed package, or of Python; None for one that is not there."""
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_packages(config: RLHFConfig) -> list[Finding]:
    """A line for Python and each named package, and one for all others."""
    ranges, tested = requirements(), tested_versions()
    if not ranges:
        remedy = "install it: pip install -e . in its checkout"
        return [yellow("packages", "rlhf is not installed, so the supported versions are not known", remedy)]
    findings = [check_version(name, ranges, tested, config) for name in ("python", *NAMED)]
    rest = [name for name in ranges if name not in ("python", *NAMED, *_ELSEWHERE)]
    others = [check_version(name, ranges, tested, config) for name in rest]
    wrong = [finding for finding in others if finding.level != "green"]
    return [*findings, *(wrong or [green("other packages", f"{len(rest)} in their supported ranges")])]


def check_version(name: str, ranges: Mapping[str, str], tested: Mapping[str, str], config: RLHFConfig) -> Finding:
    """One package: red when it is missing or older than supported, yellow when newer."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    supported = SpecifierSet(ranges.get(name, ""))
    version = installed_version(name)
    remedy = f"pip install '{name}{supported}'" if name != "python" else f"install Python {supported}"
    if version is None:
        needed = name not in _OPTIONAL or (name == "deepspeed" and config.zero.stage > 0)
        if needed:
            return red(name, f"not installed (supported: {supported})", remedy)
        return yellow(name, f"not installed; {_OPTIONAL[name]}", remedy)
    if supported.contains(version, prereleases=True):
        public = Version(version).public
        note = f" (tested: {tested[name]})" if name in tested and tested[name] != public else ""
        return green(name, version + note)
    lower = [part for part in supported if part.operator in (">=", ">", "==", "~=")]
    too_old = any(not part.contains(version, prereleases=True) for part in lower)
    if too_old:
        return red(name, f"{version} is older than supported ({supported})", remedy)
    return yellow(name, f"{version} is newer than supported ({supported}), and nobody has tried it", remedy)
