"""`expected.json` of an experiment: what a run of it must show. Hand-written but for what `record=true` measures.

{"schema": "expected/1", "experiment": "twin/tldr", "command": "rlhf verify experiment=twin/tldr",
 "question": "...", "source": "arXiv ...", "rule": "how bands were made", "seeds": [1, 2, 3],
 "checks": [{"name": "...", "stage": "evaluate", "metric": "evaluate/win_rate", "at": "result",
             "range": [0, 1], "low": 0.7, "high": 0.9, "values": {"1": 0.8, ...}, "why": "..."}]}
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

import rlhf
from rlhf.config.errors import close_names, did_you_mean
from rlhf.errors import ConfigError
from rlhf.runs.files import write_text
from rlhf.runs.jsonable import read_json

SCHEMA = "expected/1"
FOLDER = "experiments"
_PLACE = re.compile(r"result|first|last|max|min|mean|(?:mean_last|step):[1-9][0-9]*|step:0")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def _is_place(value: str) -> str:
    if not _PLACE.fullmatch(value):
        raise ValueError("expected result, first, last, max, min, mean, mean_last:N or step:N")
    return value


def _is_no_timing(value: str) -> str:
    if value.startswith("perf/"):
        raise ValueError("perf/ numbers are the machine's, not the experiment's: they are printed and never judged")
    return value


Place = Annotated[str, AfterValidator(_is_place)]
Metric = Annotated[str, Field(min_length=1), AfterValidator(_is_no_timing)]


class Reading(_Part):
    """Where one number of a run is read.

    `at` "result" reads the summary in the stage's result.json (a dotted `metric` goes into nested values; `row` chooses
    the row of a list by its cells); anything else reads the stage's lines of metrics.jsonl. `arm` names an arm of a
    study whose run is read instead.
    """

    stage: str
    metric: Metric
    at: Place = "last"
    arm: str | None = None
    row: dict[str, str | float | bool | None] | None = None

    @model_validator(mode="after")
    def _row_is_of_a_result(self) -> Self:
        if self.row is not None and (self.at != "result" or "." not in self.metric):
            raise ValueError('row needs "at": "result" and a metric such as "table.gap"')
        return self

    def describe(self) -> str:
        """On one line: `ppo/score_mean at last of stage ppo`."""
        row = "" if self.row is None else "[" + ", ".join(f"{key}={value}" for key, value in self.row.items()) + "]"
        arm = "" if self.arm is None else f" of arm {self.arm}"
        return f"{self.metric}{row} at {self.at} of stage {self.stage}{arm}"


class Check(Reading):
    """One line of the verdict: a number and the band in which it is expected.

    `minus` is a second reading that is taken off the first. A check with one limit, or with `fixed`, is a claim whose
    limits are written by hand; the band of any other is measured by `record=true`.
    """

    name: str
    minus: Reading | None = None
    low: float | None = None
    high: float | None = None
    fixed: bool = False
    range: tuple[float | None, float | None] = (None, None)
    values: dict[str, float] = Field(default_factory=dict)
    why: str
    source: str = ""

    @property
    def limits_by_hand(self) -> bool:
        """Whether recording leaves low and high as they are."""
        return self.fixed or (self.low is None) != (self.high is None)

    @property
    def recorded(self) -> bool:
        """Whether there is anything to judge by."""
        return self.low is not None or self.high is not None

    @model_validator(mode="after")
    def _limits_in_order(self) -> Self:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low ({self.low:g}) is above high ({self.high:g})")
        if self.fixed and not self.recorded:
            raise ValueError("fixed says that low and high are written by hand, and neither is there")
        return self


class Expected(_Part):
    """The file. `seconds`, `values` and bands come from `record=true`; everything else is written by hand."""

    schema_name: Literal["expected/1"] = Field(alias="schema")
    experiment: str
    command: str
    question: str
    source: str
    rule: str = ""
    seeds: tuple[int, ...] = ()
    seconds: dict[str, float] = Field(default_factory=dict)
    hardware: str = ""
    checks: tuple[Check, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_once(self) -> Self:
        names = [check.name for check in self.checks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two checks have the name {twice[0]!r}")
        return self


# In the order in which a check is read.
_CHECK_KEYS = tuple(sorted(Check.model_fields, key=lambda name: (name != "name", list(Check.model_fields).index(name))))


@dataclass(frozen=True)
class Baseline:
    """An expected.json that was found, and where."""

    path: Path
    expected: Expected

    @property
    def recorded(self) -> Path:
        """The folder of what `record=true` keeps of the first seed's run: `expected_x.json` has `recorded_x`."""
        return self.path.with_name(self.path.stem.replace("expected", "recorded", 1))


def read_expected(path: Path) -> Baseline:
    """Reads and checks the file. Raises `ConfigError` that names the file and the key and says what was expected."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file; `rlhf verify` lists the baselines there are") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    try:
        body = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: is not JSON: {error.msg}") from error
    try:
        return Baseline(path, Expected.model_validate_json(text))
    except ValidationError as error:
        # A list whose only entry is wrong is told to be too short besides.
        told = [one for one in error.errors() if one["type"] != "too_short"] or error.errors()
        lines = [f"  {_where(one['loc'], body)}: {_message(one)}" for one in told]
        raise ConfigError(f"{path} is not a valid expected.json:\n" + "\n".join(lines)) from error


def _where(location: tuple[int | str, ...], body: Any) -> str:
    """The key, with the check's name in place of its number alone."""
    text = ".".join(str(part) for part in location) or "the file"
    if len(location) >= 2 and location[0] == "checks" and isinstance(location[1], int) and isinstance(body, dict):
        checks = body.get("checks")
        entry = checks[location[1]] if isinstance(checks, list) and location[1] < len(checks) else None
        if isinstance(entry, dict) and "name" in entry:
            text += f" (check {entry['name']!r})"
    return text


def _message(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        known = {
            *(Check.model_fields if "checks" in error["loc"] else Expected.model_fields),
            *(Reading.model_fields if "minus" in error["loc"] else ()),
        } - {"schema_name"}
        return f"unknown key{did_you_mean(close_names(str(error['loc'][-1]), sorted(known)))}"
    if error["type"] in ("missing", "too_short"):
        return "is missing" if error["type"] == "missing" else "is empty: at least one is needed"
    got = "" if isinstance(error["input"], dict) else f", got {str(error['input'])[:80]!r}"
    return str(error["msg"]).removeprefix("Value error, ") + got


def write_expected(path: Path, expected: Expected) -> None:
    """Writes the file; a check's values and its band are each on one line."""
    body = expected.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    for number, check in enumerate(expected.checks):
        body["checks"][number] |= {"at": check.at, "values": check.values}
        body["checks"][number] = {
            key: body["checks"][number][key] for key in _CHECK_KEYS if key in body["checks"][number]
        }
    write_text(path, _pretty({**body, "schema": SCHEMA}) + "\n")


def _pretty(value: Any, indent: str = "") -> str:
    """JSON that people edit: whatever fits on a line is on one."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(indent) + len(line) <= 110:
        return line
    inner = indent + "  "
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + _pretty(item, inner) for item in value) + f"\n{indent}]"
    items = (f"{inner}{json.dumps(key)}: {_pretty(item, inner)}" for key, item in value.items())
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"


def folders(working: Path | None = None) -> list[Path]:
    """Where baselines are looked for: ./experiments, then the folder beside the package's own checkout."""
    package = Path(rlhf.__file__).resolve().parent.parent / FOLDER
    found = [path for path in ((working or Path()) / FOLDER, package) if path.is_dir()]
    return list({path.resolve(): path for path in reversed(found)}.values())[::-1]


def names_of(places: Sequence[Path]) -> dict[str, Path]:
    """The experiments that have an expected.json; of two for one experiment the one of the earlier place counts.

    A file that is not JSON, or names no experiment, is known by its path.
    """
    found: dict[str, Path] = {}
    for place in places:
        for path in sorted(place.glob("*/expected*.json")):
            body = read_json(path)
            name = body.get("experiment") if isinstance(body, dict) else None
            found.setdefault(name if isinstance(name, str) else str(path), path)
    return dict(sorted(found.items()))


def find_baseline(experiment: str, places: Sequence[Path]) -> Baseline:
    """The baseline of an experiment's choice. Raises `ConfigError` that lists those there are."""
    names = names_of(places)
    if experiment in names:
        return read_expected(names[experiment])
    looked = ", ".join(str(place) for place in places) or f"./{FOLDER}"
    raise ConfigError(
        f"no expected.json is for experiment={experiment}{did_you_mean(close_names(experiment, list(names)))}\n"
        f"  there are: {', '.join(names) or 'none'} (in {looked})\n"
        "  expected=FILE names one that lies elsewhere; docs/evidence.md says how to write one"
    )
