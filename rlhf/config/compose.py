"""Composition: Hydra merges the YAML groups, the arguments change the result, pydantic checks it.

A group choice is a file `<group>/<choice>.yaml` in one of the config folders, or the path of any YAML file. Of the
folders the first that has the file wins: `extra_config_folder`, `./configs` of the working folder, this package's own.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import rlhf
from rlhf.config.errors import Problem, close_names, did_you_mean
from rlhf.config.interpolation import resolve
from rlhf.config.overrides import Arguments, apply, expand_kinds, parse_arguments
from rlhf.config.provenance import Draft, Origin, display_path, flatten, nearest_origin, read_yaml, render
from rlhf.config.root import UNEVEN_BATCHES, RLHFConfig
from rlhf.config.serialize import broken_file, plain_values
from rlhf.config.validation import Findings, validate
from rlhf.config.values import text_keys

# The root file is given to Hydra under this name, so that a stranger's ./configs/config.yaml is never taken for it.
ROOT_NAME = "rlhf_root"
PACKAGE_HEADER = re.compile(r"^#\s*@package\s+(\S+)")
# On malformed files Hydra and OmegaConf raise plain built-in errors besides their own.
HYDRA_ERRORS = (
    HydraException,
    OmegaConfBaseException,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    AssertionError,
    OSError,
)
PLAIN_NAME = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)*")

_search_folders: ContextVar[tuple[Path, ...]] = ContextVar("_search_folders", default=())


@dataclass(frozen=True)
class LoadedConfig:
    """A config with where each of its values came from, by dotted key: a file and line, an argument, or "default"."""

    config: RLHFConfig
    sources: dict[str, str]


class UserConfigFolders(SearchPathPlugin):
    """Puts the user's folders before the package's in Hydra's search path, the first one foremost."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in _search_folders.get():
            search_path.prepend(provider="user", path=f"file://{folder}", anchor="main")


@dataclass
class Files:
    """The config folders in order, and the files that were given by path, by the name Hydra knows them under."""

    user: tuple[Path, ...]
    packaged: Path
    by_path: dict[str, Path] = field(default_factory=dict)

    def find(self, name: str) -> Path | None:
        """The file of `<group>/<choice>`; None when no folder has it."""
        if name in self.by_path:
            return self.by_path[name]
        candidates = (folder / f"{name}.yaml" for folder in (*self.user, self.packaged))
        return next((path for path in candidates if os.path.isfile(path)), None)

    def choices(self, group: str) -> list[str]:
        """The names of all choices of a group, sorted."""
        found: set[str] = set()
        for folder in (*self.user, self.packaged):
            paths = (folder / group).rglob("*.yaml")
            found.update(path.relative_to(folder / group).with_suffix("").as_posix() for path in paths)
        return sorted(found)

    def show(self, path: Path) -> str:
        return display_path(path, self.packaged)


def load_config(
    arguments: Sequence[str], *, extra_config_folder: Path | None = None, uneven_batches: bool = False
) -> LoadedConfig:
    """The config that arguments such as `experiment=quickstart ppo.learning_rate=3e-6` mean, with its sources.

    `uneven_batches`: batches that the ranks cannot share are let through (`rlhf.config.root.uneven_batches` finds
    them). Raises `ConfigError` naming every mistake at once, and nothing else whatever the arguments are.
    """
    files = _config_files(extra_config_folder)
    root, _ = read_yaml(files.packaged / "config.yaml")
    groups = _groups(root)
    parsed = parse_arguments(arguments, groups)
    findings = Findings(parsed.problems, groups)
    choices = _check_choices(parsed, files, findings)
    draft = _composed(root, choices, files, findings)
    if "experiment" in choices and draft.get(("experiment",)) is None:
        stem = Path(parsed.choices["experiment"].text or "").stem
        name = re.sub(r"[^\w.-]", "-", stem)
        draft.set(("experiment",), name, Origin(parsed.choices["experiment"].source, "file"))
    expand_kinds(draft)
    for argument in parsed.values:
        findings.problems.extend(apply(argument, draft, groups))
    findings.problems.extend(resolve(draft))
    config = validate(draft, findings, {UNEVEN_BATCHES: uneven_batches})
    leaves = flatten(plain_values(config))
    return LoadedConfig(config, {".".join(path): draft.leaf_source(path) for path in leaves})


def render_sources(loaded: LoadedConfig) -> str:
    """The whole config as YAML, each value followed by a comment that says where it came from."""
    return render(plain_values(loaded.config), loaded.sources)


def packaged_config_folder() -> Path:
    """The folder of the config files that come with this package: inside it in a wheel, beside it in a checkout."""
    package = Path(rlhf.__file__).resolve().parent
    inside = package / "configs"
    return (inside if inside.is_dir() else package.parent / "configs").resolve()


def _config_files(extra: Path | None) -> Files:
    packaged = packaged_config_folder()
    folders = [folder for folder in (extra, Path("configs")) if folder is not None and os.path.isdir(folder)]
    resolved = dict.fromkeys(folder.resolve() for folder in folders)
    return Files(tuple(folder for folder in resolved if folder != packaged), packaged)


def _groups(root: Any) -> tuple[str, ...]:
    return tuple(group for item in root["defaults"] if isinstance(item, dict) for group in item)


def _check_choices(parsed: Arguments, files: Files, findings: Findings) -> dict[str, str]:
    """The name under which Hydra finds each choice. One that cannot be used becomes a problem and is left out."""
    choices = {}
    for group, argument in parsed.choices.items():
        text = (argument.text or "").strip()
        if group == "experiment" and text in ("null", "None"):
            continue
        known = PLAIN_NAME.fullmatch(text) is not None and files.find(f"{group}/{text}") is not None
        by_path = os.path.expanduser(text)
        if known:
            problem, name = _unusable(files.find(f"{group}/{text}"), files), text
        elif by_path.endswith((".yaml", ".yml")) and os.path.isfile(by_path):
            problem, name = _unusable(Path(by_path), files), ""
            if problem is None:
                name = _name_for(Path(by_path))
                files.by_path[f"{group}/{name}"] = Path(by_path)
        else:
            problem, name = _unknown_choice(group, text, argument.source, files), ""
        if problem is None:
            choices[group] = name
        else:
            findings.problems.append(problem)
            findings.incomplete = True
    return choices


def _unknown_choice(group: str, text: str, source: str | None, files: Files) -> Problem:
    choices = files.choices(group)
    name = text.removesuffix(".yaml")
    names = close_names(name, choices) or close_names(name.rpartition("/")[2], choices)
    message = "there is no such file" if text.endswith((".yaml", ".yml")) else "unknown choice"
    message += did_you_mean(names)
    message += f"\n      choices: {', '.join(choices)}, or the path of a YAML file"
    return Problem(group, message, text, source)


def _unusable(path: Path | None, files: Files) -> Problem | None:
    """The problem of a config file that Hydra could not use; None for a good one."""
    assert path is not None
    try:
        values, _ = read_yaml(path)
        values = text_keys(values)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        return broken_file(path, error, files.packaged)
    if values is not None and not isinstance(values, dict):
        return Problem(files.show(path), f"expected a mapping such as `key: value`, found a {type(values).__name__}")
    return None


def _name_for(path: Path) -> str:
    """The choice under which Hydra knows a file given by its path; two files never share one."""
    digest = hashlib.sha256(str(path.resolve()).encode(errors="surrogateescape")).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9]', '_', path.stem)}_{digest}"


def _register_files(files: Files) -> None:
    """Makes the files given by path known to Hydra as choices of their groups."""
    for choice, path in files.by_path.items():
        group, _, name = choice.partition("/")
        values, _ = read_yaml(path)
        comments = (line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
        packages = [match.group(1) for line in comments if (match := PACKAGE_HEADER.match(line))]
        package = packages[0] if packages else None
        ConfigStore.instance().store(name=name, node=text_keys(values or {}), group=group, package=package)


@cache
def _register_plugin() -> None:
    Plugins.instance().register(UserConfigFolders)


def _composed(root: Any, choices: dict[str, str], files: Files, findings: Findings) -> Draft:
    """The merged groups with the origin of every value; empty, with a problem added, when they do not compose."""
    _register_plugin()
    ConfigStore.instance().store(name=ROOT_NAME, node=root)
    overrides = [f"{group}='{name}'" for group, name in choices.items()]
    token = _search_folders.set(files.user)
    try:
        _register_files(files)
        with initialize_config_dir(str(files.packaged), job_name="rlhf", version_base="1.3"):
            merged = text_keys(OmegaConf.to_container(compose(ROOT_NAME, overrides), resolve=False))
            loader = GlobalHydra.instance().config_loader()
            order = loader.compute_defaults_list(ROOT_NAME, overrides, RunMode.RUN).defaults
        return _with_origins(merged, [(item.config_path, item.package) for item in order], files)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        findings.problems.append(broken_file(Path(mark.name if mark else "a config file"), error, files.packaged))
    except MissingConfigException as error:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        findings.problems.append(_unknown_choice(group, choice, _who_chose(group, choice, choices, files), files))
    except HYDRA_ERRORS as error:
        findings.problems.append(_not_merged(error, choices, files))
    finally:
        _search_folders.reset(token)
    findings.incomplete = True
    return Draft()


def _not_merged(error: Exception, choices: dict[str, str], files: Files) -> Problem:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    used = []
    for choice in choices.items():
        path = files.find("/".join(choice))
        used.append(files.show(path) if path is not None else "=".join(choice))
        reason = reason.replace("/".join(choice), used[-1])
    return Problem(", ".join(used) or "the config files", f"cannot be merged: {reason}")


def _who_chose(group: str, choice: str, choices: dict[str, str], files: Files) -> str | None:
    """The file and line of the defaults list that asks for a choice; None when no chosen file does itself."""
    for chosen in choices.items():
        path = files.find("/".join(chosen))
        if path is None:
            continue
        values, lines = read_yaml(path)
        for index, item in enumerate((values or {}).get("defaults") or ()):
            named = next(iter(item.items())) if isinstance(item, dict) and item else (chosen[0], item)
            if named[1] == choice and str(named[0]).removeprefix("override ").strip("/ ") == group:
                return f"{files.show(path)}:{lines['defaults', index]}"
    return None


def _with_origins(merged: Any, order: Sequence[tuple[str, str]], files: Files) -> Draft:
    """Gives each merged value its origin: the last file, in Hydra's order of merging, that sets it."""
    shadow = Draft()
    for name, package in order:
        path = files.packaged / "config.yaml" if name == ROOT_NAME else files.find(name)
        if path is None:
            # Hydra's own files.
            continue
        values, lines = read_yaml(path)
        prefix = tuple(package.split(".")) if package else ()
        shown = files.show(path)
        origins = {
            (*prefix, *(str(part) for part in key)): Origin(f"{shown}:{line}", "file") for key, line in lines.items()
        }
        if isinstance(values, dict):
            values.pop("defaults", None)
            shadow.merge(prefix, text_keys(values), origins)
    draft = Draft()
    for leaf, value in flatten(merged).items():
        draft.set(leaf, value, nearest_origin(shadow.origins, leaf) or Origin("a config file", "file"))
    return draft
