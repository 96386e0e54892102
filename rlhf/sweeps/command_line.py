"""`rlhf sweep` and `rlhf agent`: their arguments, and what they say."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

from rlhf.config.compose import packaged_config_folder
from rlhf.config.errors import close_names, did_you_mean
from rlhf.config.overrides import join_spaced
from rlhf.errors import EXIT_SUCCESS, ConfigError
from rlhf.sweeps.agent import Agent
from rlhf.sweeps.check import check_sweep
from rlhf.sweeps.file import read_sweep_file
from rlhf.sweeps.folder import JOURNAL_STORAGE, Sweep, SweepFolder, create, default_name, open_sweep, source_changed
from rlhf.sweeps.outcome import own_code
from rlhf.sweeps.space import Space
from rlhf.terminal import say, warn

ROOT = "sweeps"
LEASE_SECONDS = 60.0
CREATE_KEYS = ("name", "root", "storage", "seed", "lease_seconds")
SWEEP_USAGE = (
    "rlhf sweep FILE [name=NAME] [root=sweeps] [storage=journal|sqlite:///FILE|postgresql://...] [seed=1] "
    "[lease_seconds=60], rlhf sweep status SWEEP [--json], or rlhf sweep retry SWEEP"
)
AGENT_USAGE = "rlhf agent SWEEP [--count N] [--no-wait] [root=sweeps]"


def run_sweep(arguments: Sequence[str]) -> int:
    """`rlhf sweep ...`; the exit code."""
    words, values, flags = _parse(arguments, ("root",), ("json",), SWEEP_USAGE, lenient=True)
    if words[:1] == ["status"] or words[:1] == ["retry"]:
        words, values, flags = _parse(arguments, ("root",), ("json",), SWEEP_USAGE)
        if len(words) != 2:
            raise ConfigError(f"rlhf sweep {words[0]} takes one sweep: {SWEEP_USAGE}")
        sweep = open_sweep(words[1], Path(values.get("root", ROOT)))
        return _retry(sweep) if words[0] == "retry" else _status(sweep, as_json="json" in flags)
    words, values, _ = _parse(arguments, CREATE_KEYS, (), SWEEP_USAGE)
    if len(words) != 1:
        hint = did_you_mean(close_names(words[0], ("status", "retry"))) if words else ""
        raise ConfigError(f"expected one sweep file, found {' '.join(words) or 'none'}{hint}: {SWEEP_USAGE}")
    path = Path(words[0]).expanduser()
    if not path.exists():
        raise ConfigError(f"there is no sweep file {path}{did_you_mean(near_files(path))}")
    return _create(path, values)


def run_agent(arguments: Sequence[str]) -> int:
    """`rlhf agent ...`; the exit code."""
    words, values, flags = _parse(arguments, ("root", "count"), ("no-wait",), AGENT_USAGE)
    if len(words) != 1:
        raise ConfigError(f"expected one sweep: {AGENT_USAGE}")
    count = None if "count" not in values else _whole("--count", values["count"])
    sweep = open_sweep(words[0], Path(values.get("root", ROOT)))
    if source_changed(sweep):
        warn(
            f"rlhf: {sweep.source} was changed after the sweep had been created; this sweep keeps what it began with "
            f"({sweep.folder.file})"
        )
    _warn_of_other_code(sweep)
    return Agent(sweep, count=count, wait="no-wait" not in flags).work()


def near_files(path: Path) -> list[str]:
    """Sweep files that a path most likely means: of its folder, of this one, or those that are shipped."""
    found: dict[str, str] = {}
    for folder in (path.parent, Path(), packaged_config_folder() / "sweep"):
        for file in sorted((*folder.glob("*.yaml"), *folder.glob("*.yml"))):
            whole = file.absolute()
            shown = whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else file
            found.setdefault(file.stem, str(shown))
    return [found[name] for name in close_names(path.stem, list(found))]


def _create(path: Path, values: dict[str, str]) -> int:
    file = read_sweep_file(path)
    name = values.get("name", default_name(file))
    if re.fullmatch(r"(?!\.)[\w.-]+", name) is None:
        raise ConfigError(f"name={name}: expected letters, digits, '.', '_' and '-'")
    started = time.monotonic()
    space = check_sweep(file)
    folder = SweepFolder(Path(values.get("root", ROOT)).expanduser() / name)
    seconds = float(_positive("lease_seconds", values["lease_seconds"])) if "lease_seconds" in values else LEASE_SECONDS
    seed = _whole("seed", values["seed"], least=0) if "seed" in values else 1
    made = create(file, space, folder, seed=seed, storage=values.get("storage", JOURNAL_STORAGE), lease_seconds=seconds)
    sweep = open_sweep(str(folder.path))
    num_tried = f", checked in {time.monotonic() - started:.1f} s"
    say(f"sweep {name}: {_size(sweep, space)}{num_tried if made else ', there already'}")
    say(f"folder: {folder.path}")
    say(f"start any number of agents, on any number of hosts that see the folder:\n  rlhf agent {folder.path}")
    say(f"how it stands:\n  rlhf sweep status {folder.path}")
    return EXIT_SUCCESS


def _size(sweep: Sweep, space: Space) -> str:
    file, seeds = sweep.file, max(1, len(space.seeds))
    names = ", ".join(parameter.name for parameter in space.searched) or "no parameter"
    per = f" x {seeds} seeds" if seeds > 1 else ""
    cap = f", at most {file.run_cap} trials" if file.run_cap is not None else ""
    settings = sweep.num_settings
    if settings is None:
        end = cap or ", without an end: give run_cap in the file or --count to the agents"
        return f"{file.method} over {names}{per}{end}"
    return f"grid over {names}: {settings} settings{per} = {settings * seeds} trials{cap}"


def _retry(sweep: Sweep) -> int:
    journal = sweep.journal
    with journal.locked() as state:
        failed = [trial for trial in state.trials.values() if trial.state in ("failed", "skipped")]
        again = {trial.setting for trial in failed if state.settings[trial.setting].state == "failed"}
        failed = [trial for trial in failed if trial.setting in again]
        for setting in sorted(again):
            journal.append("reopen", setting=setting)
        for trial in failed:
            journal.append("retry", trial=trial.number)
    plural = "" if len(failed) == 1 else "s"
    say(f"{len(failed)} trial{plural} will be handed out again" if failed else "no trial has failed")
    return EXIT_SUCCESS


def _status(sweep: Sweep, *, as_json: bool) -> int:
    from rlhf.sweeps.page import write_page
    from rlhf.sweeps.status import describe, status_of

    status = status_of(sweep)
    page = write_page(sweep, status)
    if as_json:
        say(json.dumps({**status.as_json(), "page": str(page)}, indent=2))
    else:
        for line in describe(status):
            say(line)
        say(f"page: {page}")
    return EXIT_SUCCESS


def _warn_of_other_code(sweep: Sweep) -> None:
    codes = {trial.code for trial in sweep.journal.look().trials.values() if trial.code}
    own = own_code()
    if own is not None and codes - {own}:
        warn(
            f"rlhf: trials of this sweep ran on other code ({', '.join(sorted(codes - {own}))}) than this agent's "
            f"({own}): their results may not be comparable"
        )


def _parse(
    arguments: Sequence[str], keys: Sequence[str], flags: Sequence[str], usage: str, *, lenient: bool = False
) -> tuple[list[str], dict[str, str], set[str]]:
    """Words, `key=value` (`--key=value`, `--key value`) and `--flag`, each checked against what there is."""
    words: list[str] = []
    values: dict[str, str] = {}
    found: set[str] = set()
    rest = [one for one in arguments if one.removeprefix("--") not in flags or not one.startswith("--")]
    found.update(one.removeprefix("--") for one in arguments if one not in rest)
    for argument in join_spaced(rest):
        key, equals, value = argument.removeprefix("--").partition("=")
        if not equals and not argument.startswith("-"):
            words.append(argument)
        elif equals and key in keys:
            values[key] = value
        elif not lenient:
            near = close_names(key, [*keys, *flags])
            if key in keys:
                raise ConfigError(f"{argument} needs a value: {usage}")
            hint = did_you_mean([f"--{one}" if one in (*flags, "count") else f"{one}=..." for one in near])
            raise ConfigError(f"unknown argument {argument}{hint}: {usage}")
    return words, values, found


def _whole(name: str, text: str, least: int = 1) -> int:
    if not text.lstrip("+").isdigit() or int(text) < least:
        raise ConfigError(f"{name}={text}: expected a whole number of at least {least}")
    return int(text)


def _positive(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1.0 <= number < 1e6:
        raise ConfigError(f"{name}={text}: expected seconds, at least 1")
    return number
