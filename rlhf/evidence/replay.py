"""`rlhf replay RUN`: the same code, config, data and seed again, compared with the run step by step."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rlhf import data
from rlhf.config import STAGES, RLHFConfig, config_from_file, config_from_values
from rlhf.errors import EXIT_FAILURE, EXIT_SUCCESS, ArtifactError, ConfigError, UserError
from rlhf.evidence.causes import describe_facts, likely_causes
from rlhf.evidence.diff import headline, to_json
from rlhf.evidence.difference import Difference, compare
from rlhf.evidence.facts import Facts, compare_facts
from rlhf.evidence.output import refuse_launchers, standard_output_to_error
from rlhf.evidence.record import RunRecord, StageRecord, full_config, read_record
from rlhf.pipeline import decided_by, preflight, resolve_inputs
from rlhf.preferences.waiting import store_path
from rlhf.runs import machine
from rlhf.runs.files import discard, disk_errors, write_json
from rlhf.runs.folder import RunFolder
from rlhf.runs.jsonable import read_json
from rlhf.studies.arms import ARMS_FOLDER
from rlhf.terminal import say

USAGE = """usage: rlhf replay RUN [run.dir=FOLDER] [--keep] [--json]
RUN is a run folder. The replay goes to RUN-replay, which is removed where it is identical unless --keep is given or
run.dir chose it. The same command again goes on where it was interrupted."""
LABELS = ("there", "here")
_MARK = "replay_of.json"


@dataclass(frozen=True)
class Options:
    """The arguments of the verb."""

    run: Path
    folder: Path
    chosen: bool
    keep: bool
    as_json: bool


def run_replay(arguments: Sequence[str], debug: bool) -> int:
    """The verb: 0 where the replay is identical, else 1, or the exit code with which the run ended."""
    from rlhf.supervisor import supervise

    refuse_launchers("replay")
    options = parse_options(arguments)
    original = read_record(options.run)
    if original.is_recorded:
        raise ArtifactError(f"{original.path} is the record of a run; rlhf verify runs its experiment again")
    config = replay_config(original, options)
    _check_inputs(original, config, options.folder)
    _claim(original, options.folder)
    copied = _copy_store(original, config, options.folder)
    obstacles = compare_facts(original, _here(original, config, options.folder))
    _tell(options, f"replay of {original.path} ({original.status}, seed {original.seed}) in {options.folder}")
    for line in [*_obstacle_lines(original, obstacles), *copied]:
        _tell(options, line)
    with standard_output_to_error(options.as_json):
        code = supervise(config, command=["rlhf", "replay", *arguments], debug=debug)
    if code != EXIT_SUCCESS:
        return code
    return _conclude(options, compare(original, read_record(options.folder)))


def parse_options(arguments: Sequence[str]) -> Options:
    """Raises `ConfigError` for anything but RUN, run.dir and the flags: a replay changes no key."""
    folders, chosen = [], None
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if key == "run.dir" and equals and value:
            chosen = Path(value).expanduser()
        elif equals and not Path(argument).exists():
            raise ConfigError(f"{argument}: a replay changes no key of the run but run.dir\n{USAGE}")
        elif argument not in ("--keep", "--json"):
            folders.append(argument)
    wrong = [folder for folder in folders if folder.startswith("--")]
    if wrong or len(folders) != 1:
        raise ConfigError(f"{f'unknown flag {wrong[0]}' if wrong else 'name one run folder'}\n{USAGE}")
    run = Path(folders[0]).expanduser()
    folder = chosen or default_folder(run)
    if folder.resolve() == run.resolve():
        raise ConfigError(f"run.dir={folder} is the run itself: a replay needs a folder of its own")
    return Options(run, folder, chosen is not None, "--keep" in arguments, "--json" in arguments)


def default_folder(run: Path) -> Path:
    """`RUN-replay`; of an arm beside the study, whose arms are what is below its own folder."""
    path = Path(run.as_posix().rstrip("/"))
    for parent in path.parents:
        if parent.name == ARMS_FOLDER and (parent.parent / "manifest.json").is_file():
            arm = path.relative_to(parent).as_posix().replace("/", "-")
            return parent.parent.with_name(f"{parent.parent.name}-replay-{arm}")
    return path.with_name(f"{path.name}-replay")


def replay_config(original: RunRecord, options: Options) -> RLHFConfig:
    """The run's config, for another folder, with as many threads, not told to W&B and taking nothing from a cache."""
    stages = [name for name in STAGES if name in original.stages and original.stages[name].status != "pending"]
    if not stages:
        raise ArtifactError(f"{original.path} has no stage that was begun: there is nothing to replay")
    config = config_from_file(RunFolder(original.path).config)
    values = config.model_dump(mode="json")
    values["stages"] = stages
    values["run"] |= {"dir": str(options.folder)} | ({"cache": None} if "cache" in values["run"] else {})
    values["tracking"]["wandb"] = "disabled"
    values["launcher"] = {"type": "local"}
    threads = {stage.compute.get("num_threads") for stage in original.stages.values() if stage.compute}
    if values["distributed"]["num_threads"] is None and len(threads) == 1:
        # Else the cores and the environment of this moment decide, and with them the order of additions.
        values["distributed"]["num_threads"] = threads.pop()
    if config.preferences.store is not None:
        values["preferences"]["store"] = str(options.folder / "preferences-replay.sqlite")
    return config_from_values(values, f"the replay of {original.path}")


def _check_inputs(original: RunRecord, config: RLHFConfig, folder: Path) -> None:
    """Whether data, files and models are there. Raises `ConfigError` that says from where relative paths are read."""
    # The copy of the store is made in a folder that is not there yet.
    asked = config.model_copy(update={"preferences": config.preferences.model_copy(update={"store": None})})
    try:
        preflight(asked, RunFolder(folder))
    except UserError as error:
        raise ConfigError(
            f"{error}\n  A replay reads what the run named where it lies, relative paths from the folder in which you "
            f"stand: start it where {original.path} was started"
        ) from error


def _claim(original: RunRecord, folder: Path) -> None:
    """Marks the folder as the replay of this run. Raises `ConfigError` when something else is in it."""
    mark = {"run": str(original.path.resolve()), "started": original.manifest.get("started")}
    there = read_json(folder / _MARK)
    if there is None and folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is there and is no replay of {original.path}: set run.dir=FOLDER to another")
    if there is not None and there != mark:
        raise ConfigError(
            f"{folder} is the replay of {there.get('run')} as started {there.get('started')}: remove it, or set run.dir"
        )
    write_json(folder / _MARK, mark)


def _copy_store(original: RunRecord, config: RLHFConfig, folder: Path) -> list[str]:
    """What people have labelled, and a store that other runs share, are taken from a copy: nobody is asked twice."""
    before = config_from_file(RunFolder(original.path).config)
    if "collect" not in config.stages or not (before.preferences.asks_people or before.preferences.store is not None):
        return []
    source, target = store_path(before, original.path), store_path(config, folder)
    if not source.is_file():
        raise ArtifactError(f"the labels of the run are gone: there is no preference store {source}")
    if not target.exists():
        with disk_errors(target):
            partial = target.with_suffix(".partial")
            partial.unlink(missing_ok=True)
            readable = f"file:{quote(str(source))}?mode=ro"
            with closing(sqlite3.connect(readable, uri=True)) as reader, closing(sqlite3.connect(partial)) as writer:
                reader.backup(writer)
            partial.rename(target)
    return [f"labels: from a copy of {source}, as they are now; nobody is asked again"]


def _here(original: RunRecord, config: RLHFConfig, folder: Path) -> RunRecord:
    """What this machine, this checkout and these files would write down about the run."""
    run = RunFolder(folder)
    content = data.data_content(config.data)
    data_hash = data.data_hash(config.data, content)
    stages: dict[str, StageRecord] = {}
    for name in config.stages:
        before = original.stages[name]
        inputs = resolve_inputs(config, run, name)
        # Those that the run makes itself are not there yet.
        own = {
            key for key, value in before.inputs.items() if any(part in original.own_hashes for part in value.split())
        }
        outside = {key: path for key, path in inputs.items() if key in before.inputs and key not in own}
        decisive = decided_by(config, run, name, outside, data_hash) if before.decided_by else {}
        merged: Mapping[str, Any] = {key: before.inputs[key] for key in own} | dict(decisive.get("inputs", {}))
        stages[name] = StageRecord(name, "pending", (), {}, {}, merged, json.loads(json.dumps(decisive)), {}, None)
    manifest = {
        "code": {**machine.code_state(), "content": machine.code_content()},
        "packages": machine.package_versions(),
        "hardware": machine.hardware(),
        "data": {"hash": data_hash, "content": content},
        "seed": config.seed,
    }
    here = full_config(config.model_dump(mode="json"))
    return RunRecord(folder, manifest, here, stages, ())


def _obstacle_lines(original: RunRecord, facts: Facts) -> list[str]:
    """What cannot be the same, before anything runs."""
    groups = [
        ("config", facts.results),
        ("data", facts.data),
        ("files", facts.content),
        ("code", facts.code),
        ("packages", facts.packages),
        ("hardware", facts.hardware),
    ]
    lines = [f"  {name}: {describe_facts(found, LABELS)}" for name, found in groups if found]
    unknown = [] if original.manifest.get("data") else ["the content of its data"]
    unknown += [] if facts.code_known else ["its code"]
    unknown += [] if all(stage.compute for stage in original.stages.values()) else ["its number of threads"]
    if unknown:
        lines.append(f"  the run did not write down {' and '.join(unknown)}")
    if lines:
        return ["not the same, or not known to be:", *lines]
    return ["the same as far as it was written down: config, data, files, input models, code, packages and hardware"]


def _conclude(options: Options, difference: Difference) -> int:
    told = not (difference.identical or difference.empty)
    causes = likely_causes(difference.facts, LABELS) if told else []
    if told and not causes:
        causes = ["nothing that was written down differs: look for randomness without a seed, or atomics on a GPU"]
    if options.as_json:
        print(json.dumps({**to_json(difference), "likely_causes": causes}, indent=2))
    else:
        say(_amount(difference) if difference.identical else headline(difference))
        for cause in causes:
            say(f"  likely cause: {cause}")
    if not difference.identical:
        _tell(options, f"  rlhf diff {options.run} {options.folder} shows all of it")
        return EXIT_FAILURE
    if not (options.keep or options.chosen):
        discard(options.folder)
        _tell(options, f"removed {options.folder}, which has nothing that {options.run} has not (--keep keeps it)")
    return EXIT_SUCCESS


def _amount(difference: Difference) -> str:
    """`identical: 5 stages, 143 lines of metrics, 6 outputs, 40 samples`."""
    counted = [difference, *difference.arms.values()]
    num_lines = sum(stage.steps.num_compared for one in counted for stage in one.stages)
    num_outputs = sum(len(stage.outputs) for one in counted for stage in one.stages)
    num_samples = sum(min(len(one.first.samples), len(one.second.samples)) for one in counted)
    num_stages = sum(len(one.stages) for one in counted)
    return (
        f"{headline(difference)}: {num_stages} stages, {num_lines} lines of metrics, {num_outputs} outputs, "
        f"{num_samples} samples"
    )


def _tell(options: Options, text: str) -> None:
    say(text, sys.stderr if options.as_json else None)
