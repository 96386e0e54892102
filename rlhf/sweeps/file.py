"""A sweep file in W&B's format: read, checked line by line, and what it says as plain data.

What needs W&B's server (`method: custom`, `scheduler`, `metrics`, `job`) is refused by name. Whatever passes here also
passes W&B's own schema, so that the same file goes to `wandb sweep`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from rlhf.config.errors import close_names, did_you_mean
from rlhf.config.provenance import read_yaml
from rlhf.errors import ConfigError
from rlhf.sweeps.command import with_verb
from rlhf.sweeps.distributions import NUMBERS, REQUIRED, WITHDRAWN, Distribution, infer_kind, optional

Method = Literal["grid", "random", "bayes"]
METHODS: tuple[Method, ...] = ("grid", "random", "bayes")
# W&B's top-level keys: those that mean something here, those that matter to its server alone, those that need it.
USED = ("method", "metric", "parameters", "early_terminate", "run_cap", "command", "program", "name")
FOR_WANDB = ("description", "project", "entity", "kind", "apiVersion", "controller")
NEEDS_SERVER = ("scheduler", "metrics", "job", "image_uri")
DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
Lines = Mapping[tuple[str | int, ...], int]


@dataclass(frozen=True)
class Parameter:
    """One leaf of `parameters`. `path` holds the file's keys: ("ppo", "lam") when nested, ("ppo.lam",) when not."""

    path: tuple[str, ...]
    distribution: Distribution
    line: int

    @property
    def name(self) -> str:
        """The dotted key of the config."""
        return ".".join(self.path)


@dataclass(frozen=True)
class Metric:
    """What is optimised. `impute` says what a failed setting counts as; `target` ends the sweep."""

    name: str
    goal: Literal["minimize", "maximize"] = "minimize"
    target: float | None = None
    impute: Literal["worst", "best", "latest"] = "worst"

    def better(self, value: float, than: float) -> bool:
        """Whether `value` is strictly better."""
        return value > than if self.goal == "maximize" else value < than


@dataclass(frozen=True)
class EarlyTerminate:
    """`early_terminate: hyperband`; see `rlhf.sweeps.hyperband`."""

    eta: float = 3.0
    min_iter: int | None = None
    max_iter: int | None = None
    s: int | None = None
    strict: bool = True


@dataclass(frozen=True)
class SweepFile:
    """What a sweep file says."""

    path: Path
    text: str
    method: Method
    metric: Metric | None
    parameters: tuple[Parameter, ...]
    command: tuple[str, ...]
    program: str | None = None
    early_terminate: EarlyTerminate | None = None
    run_cap: int | None = None
    name: str | None = None

    def where(self, line: int) -> str:
        """`file:line` for messages."""
        return f"{self.path}:{line}"


class _Reader:
    """Collects what is wrong, each with its line, so that one reading names everything."""

    def __init__(self, path: Path, lines: Lines) -> None:
        self.path, self.lines = path, lines
        self.problems: list[str] = []

    def line(self, *keys: str | int) -> int:
        while keys and keys not in self.lines:
            keys = keys[:-1]
        return self.lines.get(keys, 1)

    def wrong(self, message: str, *keys: str | int) -> None:
        self.problems.append(f"  {self.path}:{self.line(*keys)}: {message}")

    def number(self, value: Any, *keys: str | int) -> float | None:
        """The value as a finite number; None, with a problem, for anything else."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            hint = ""
            if isinstance(value, str) and EXPONENT.fullmatch(value.strip()):
                hint = f" YAML reads {value} as text, and so does W&B: write {with_point(value.strip())}"
            self.wrong(f"{'.'.join(map(str, keys))}: expected a number, found {value!r}.{hint}", *keys)
            return None
        return value


def with_point(text: str) -> str:
    """The spelling of `1e-5` that YAML 1.1 reads as a number: `1.0e-5`."""
    mantissa, _, exponent = text.lower().partition("e")
    mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
    return f"{mantissa}e{exponent if exponent[0] in '+-' else '+' + exponent}"


def read_sweep_file(path: Path) -> SweepFile:
    """Reads and checks a file. Raises `ConfigError` naming every mistake with its line."""
    try:
        text = path.read_text(encoding="utf-8")
        _, lines = read_yaml(path)
        # As W&B reads it: there 1e-5 is text.
        values = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no sweep file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the sweep file {path} cannot be read: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"the sweep file {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the sweep file {path} holds no mapping such as `method: grid`; docs/sweeps.md has examples")
    reader = _Reader(path, lines)
    _check_keys(reader, values)
    method = _method(reader, values)
    metric = _metric(reader, values, method)
    parameters = _parameters(reader, values.get("parameters"))
    if method == "grid":
        _check_grid(reader, parameters)
    command, program = _command(reader, values)
    early = _early_terminate(reader, values, metric)
    cap = values.get("run_cap")
    if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int) or cap < 1):
        reader.wrong(f"run_cap: expected a whole number of at least 1, found {cap!r}", "run_cap")
    if reader.problems:
        count = "a mistake" if len(reader.problems) == 1 else f"{len(reader.problems)} mistakes"
        raise ConfigError("\n".join([f"{count} in the sweep file:", *reader.problems]))
    name = values.get("name")
    return SweepFile(
        path, text, method, metric, tuple(parameters), command, program, early, cap, str(name) if name else None
    )


def _check_keys(reader: _Reader, values: Mapping[Any, Any]) -> None:
    for key in values:
        if key in NEEDS_SERVER:
            reader.wrong(f"{key} needs W&B's server; the own agent has grid, random and bayes over one metric", key)
        elif key not in (*USED, *FOR_WANDB):
            known = (*USED, *FOR_WANDB)
            hint = did_you_mean(close_names(str(key), known))
            reader.wrong(f"unknown key {key}{hint}; W&B's sweep files have {', '.join(known)}", str(key))


def _method(reader: _Reader, values: Mapping[str, Any]) -> Method:
    method = values.get("method")
    if method in METHODS:
        return next(known for known in METHODS if known == method)
    hint = did_you_mean(close_names(str(method), METHODS))
    reader.wrong(f"method: expected {', '.join(METHODS)}, found {method!r}{hint}", "method")
    return "random"


def _metric(reader: _Reader, values: Mapping[str, Any], method: Method) -> Metric | None:
    body = values.get("metric")
    if body is None:
        if method == "bayes" or "early_terminate" in values:
            what = "method bayes" if method == "bayes" else "early_terminate"
            reader.wrong(f"{what} needs a metric: {{name: ppo/objective, goal: maximize}}", "method")
        return None
    if not isinstance(body, dict) or not isinstance(body.get("name"), str):
        reader.wrong("metric: expected a mapping with a name, such as {name: ppo/objective, goal: maximize}", "metric")
        return None
    choices = {"goal": ("minimize", "maximize"), "impute": ("worst", "best", "latest")}
    for key, value in body.items():
        if key in choices and value not in choices[key]:
            hint = did_you_mean(close_names(str(value), choices[key]))
            reader.wrong(f"metric.{key}: expected {' or '.join(choices[key])}, found {value!r}{hint}", "metric", key)
        elif key == "impute_while_running" and value not in (False, "false"):
            reader.wrong("metric.impute_while_running: here what is running counts by its sampler; leave it out", key)
        elif key not in ("name", "target", "impute_while_running", *choices):
            names = ("name", "goal", "target", "impute")
            hint = did_you_mean(close_names(str(key), names))
            reader.wrong(f"metric has no key {key}{hint}; it has {', '.join(names)}", "metric", str(key))
    target = body.get("target")
    if target is not None:
        target = reader.number(target, "metric", "target")
    impute = body.get("impute", "worst")
    goal: Literal["minimize", "maximize"] = "maximize" if body.get("goal") == "maximize" else "minimize"
    return Metric(body["name"], goal, target, impute if impute in choices["impute"] else "worst")


def _parameters(reader: _Reader, body: Any, around: tuple[str, ...] = ()) -> list[Parameter]:
    keys = tuple(key for name in around for key in ("parameters", name)) + ("parameters",)
    if not isinstance(body, dict) or not body:
        reader.wrong("parameters: expected a mapping of keys to what they are drawn from", *keys)
        return []
    found = []
    for name, spec in body.items():
        path, here = (*around, str(name)), (*keys, str(name))
        shown = ".".join(path)
        if not NAME.fullmatch(str(name)):
            reader.wrong(f"{name!r} is no name of a key", *here)
        elif not isinstance(spec, dict):
            reader.wrong(f"{shown}: expected a mapping such as {{values: [1, 2]}}, found {spec!r}", *here)
        elif "parameters" in spec:
            if len(spec) > 1:
                others = ", ".join(key for key in spec if key != "parameters")
                reader.wrong(f"{shown}: nested parameters stand alone, without {others}", *here)
            found += _parameters(reader, spec["parameters"], path)
        else:
            distribution = _distribution(reader, shown, spec, here)
            if distribution is not None:
                found.append(Parameter(path, distribution, reader.line(*here)))
    names = [parameter.name for parameter in found]
    for double in sorted({name for name in names if names.count(name) > 1}):
        reader.wrong(f"{double} is there twice, once nested and once as a dotted key", *keys)
    return found


def _distribution(reader: _Reader, name: str, spec: Mapping[str, Any], here: tuple[str, ...]) -> Distribution | None:
    kind = spec.get("distribution") or infer_kind(spec)
    if kind in WITHDRAWN:
        reader.wrong(
            f"{name}: {kind} takes exponents of e and is withdrawn, by W&B as well; {kind}_values takes values", *here
        )
        return None
    if kind not in REQUIRED:
        hint = did_you_mean(close_names(str(kind), tuple(REQUIRED)))
        what = "expected value, values, or min and max" if kind is None else f"unknown distribution {kind!r}{hint}"
        reader.wrong(f"{name}: {what}; the distributions are {', '.join(REQUIRED)}", *here)
        return None
    allowed = (*REQUIRED[kind], *optional(kind), "distribution")
    before = len(reader.problems)
    for key in spec:
        if key not in allowed:
            hint = did_you_mean(close_names(str(key), allowed))
            reader.wrong(f"{name}: {kind} has no {key}{hint}; it takes {', '.join(allowed)}", *here, str(key))
    for key in REQUIRED[kind]:
        if key not in spec:
            reader.wrong(f"{name}: {kind} needs {key}", *here)
    if len(reader.problems) > before:
        return None
    if kind == "constant":
        return Distribution(kind, (plain(spec["value"]),))
    if "values" in spec:
        return _choice(reader, name, kind, spec, here)
    numbers = {key: reader.number(value, *here, key) for key, value in spec.items() if key in NUMBERS}
    if None in numbers.values():
        return None
    known = optional(kind) | {key: value for key, value in numbers.items() if value is not None}
    problem = _wrong_numbers(kind, known)
    if problem:
        reader.wrong(f"{name}: {problem}", *here)
        return None
    return Distribution(kind, numbers=known)


def _wrong_numbers(kind: str, numbers: Mapping[str, float]) -> str | None:
    low, high = numbers.get("min"), numbers.get("max")
    if low is not None and high is not None:
        if low >= high:
            return f"min {low!r} is not less than max {high!r}"
        if kind.endswith("_values") and low <= 0:
            return f"{kind} takes the logarithm, so min must be above 0; found {low!r}"
    if kind == "int_uniform" and not all(isinstance(numbers[key], int) for key in ("min", "max")):
        return "int_uniform takes whole numbers as min and max"
    for key in ("sigma", "a", "b", "q"):
        if numbers.get(key, 1.0) <= 0:
            return f"{key} must be above 0; found {numbers[key]!r}"
    return None


def _choice(
    reader: _Reader, name: str, kind: str, spec: Mapping[str, Any], here: tuple[str, ...]
) -> Distribution | None:
    values = spec["values"]
    if not isinstance(values, list) or not values:
        reader.wrong(f"{name}: values must be a list with something in it, found {values!r}", *here, "values")
        return None
    values = [plain(value) for value in values]
    doubles = [value for index, value in enumerate(values) if value in values[:index]]
    if doubles:
        reader.wrong(f"{name}: {doubles[0]!r} is listed twice", *here, "values")
        return None
    if kind == "categorical":
        return Distribution(kind, tuple(values))
    probabilities = spec["probabilities"]
    numbers = probabilities if isinstance(probabilities, list) else []
    good = len(numbers) == len(values) and all(isinstance(one, int | float) and one >= 0 for one in numbers)
    if not good or not math.isclose(sum(numbers), 1.0, rel_tol=1e-5):
        reader.wrong(
            f"{name}: probabilities must be {len(values)} numbers that sum to 1; found {probabilities!r}",
            *here,
            "probabilities",
        )
        return None
    return Distribution(kind, tuple(values), tuple(float(one) for one in numbers))


def plain(value: Any) -> Any:
    """A listed value; `3e-06`, which YAML takes for text, becomes the number that it means."""
    if isinstance(value, str) and EXPONENT.fullmatch(value.strip()):
        return float(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def _check_grid(reader: _Reader, parameters: list[Parameter]) -> None:
    for parameter in parameters:
        if parameter.distribution.in_grid is None:
            keys = tuple(key for name in parameter.path for key in ("parameters", name))
            reader.wrong(
                f"{parameter.name}: method grid goes through all values, and {parameter.distribution.kind} has none to "
                "list. Write values: [...] (int_uniform and q_uniform go as well), or take method random or bayes",
                *keys,
            )


def _command(reader: _Reader, values: Mapping[str, Any]) -> tuple[tuple[str, ...], str | None]:
    program = values.get("program")
    if program is not None and not isinstance(program, str):
        reader.wrong(f"program: expected the path of a script, found {program!r}", "program")
        program = str(program)
    command = values.get("command")
    if command is None:
        if program is None:
            reader.wrong(
                "nothing says what to start: add `command: [rlhf, run, experiment=NAME, '${args_no_hyphens}']`, or a "
                "program"
            )
        return with_verb(DEFAULT_COMMAND, program), program
    if not isinstance(command, list) or not all(isinstance(item, str | int | float) for item in command) or not command:
        reader.wrong("command: expected a list of words such as [rlhf, run, '${args_no_hyphens}']", "command")
        return DEFAULT_COMMAND, program
    words = tuple(str(item) for item in command)
    if "${program}" in words and program is None:
        reader.wrong("command has ${program}, and the file names no program", "command")
    return with_verb(words, program), program


def _early_terminate(reader: _Reader, values: Mapping[str, Any], metric: Metric | None) -> EarlyTerminate | None:
    body = values.get("early_terminate")
    if body is None:
        return None
    known = ("type", "min_iter", "max_iter", "eta", "s", "strict")
    if not isinstance(body, dict) or body.get("type") != "hyperband":
        reader.wrong("early_terminate: expected {type: hyperband, min_iter: N}", "early_terminate")
        return None
    before = len(reader.problems)
    for key, value in body.items():
        if key not in known:
            hint = did_you_mean(close_names(str(key), known))
            reader.wrong(f"early_terminate has no key {key}{hint}; it has {', '.join(known)}", "early_terminate", key)
        elif key == "strict" and not isinstance(value, bool):
            reader.wrong(f"early_terminate.strict: expected true or false, found {value!r}", "early_terminate", key)
        elif key in ("min_iter", "max_iter", "s") and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            reader.wrong(
                f"early_terminate.{key}: expected a whole number of at least 1, found {value!r}", "early_terminate", key
            )
        elif key == "eta" and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 1):
            reader.wrong(f"early_terminate.eta: expected a number above 1, found {value!r}", "early_terminate", key)
    if "min_iter" not in body and not ("max_iter" in body and "s" in body):
        reader.wrong("early_terminate: hyperband needs min_iter, or max_iter with s", "early_terminate")
    if len(reader.problems) > before or metric is None:
        return None
    return EarlyTerminate(
        float(body.get("eta", 3.0)),
        body.get("min_iter"),
        body.get("max_iter"),
        body.get("s"),
        bool(body.get("strict", True)),
    )
