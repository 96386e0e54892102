"""`rlhf preferences`: import, export, status and check of a preference store. It never imports torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rlhf.config.data import SplitConfig
from rlhf.config.errors import close_names, did_you_mean, printable
from rlhf.errors import EXIT_SUCCESS, ConfigError
from rlhf.preferences.exchange import (
    EXPORT_FORMATS,
    ExportOptions,
    ImportOptions,
    check_file,
    export_labels,
    import_file,
    write_export,
)
from rlhf.preferences.exchange.publishing import check_target
from rlhf.preferences.resolution import ResolutionRule
from rlhf.preferences.store import AnnotatorKind, FlagKind, PreferenceStore
from rlhf.terminal import say

JSON_FLAG = "--json"
USAGE = """usage: rlhf preferences import from=FILE store=PATH [format=auto] [on_bad_row=error|skip] [annotator=NAME]
       rlhf preferences export store=PATH to=FOLDER [format=trl] [rule=majority|mean|all] [overwrite=true] ...
       rlhf preferences status store=PATH [--json]
       rlhf preferences check from=FILE [format=auto]"""


def _items(value: Any) -> Any:
    """`[a,b]` or `a,b` as a list."""
    if not isinstance(value, str):
        return value
    inner = value.strip().removeprefix("[").removesuffix("]")
    return [item.strip() for item in inner.split(",") if item.strip()]


Texts = Annotated[tuple[str, ...], BeforeValidator(_items)]
Flags = Annotated[tuple[FlagKind, ...], BeforeValidator(_items)]
Rounds = Annotated[tuple[int, ...], BeforeValidator(_items)]


class _Arguments(BaseModel):
    """Arguments are texts, so that numbers and truths are read from them."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=False)


class CheckArguments(_Arguments):
    """`rlhf preferences check`."""

    source: str = Field(alias="from", description="a file, or a folder of files")
    format: str = Field("auto", description="format of the rows; auto tells it from the first one")
    on_bad_row: Literal["error", "skip"] = Field("error", description="broken rows: stop, or report and leave out")
    annotator: str | None = Field(None, description="who labelled, where the file does not say")
    annotator_kind: AnnotatorKind = Field("human", description="what the annotators of the file are")
    rating_scale: int = Field(5, ge=2, description="highest rating of the file; the lowest is 1")
    prompt_field: str | None = Field(None, description="field of the prompt in a Label Studio or Argilla task")
    response_fields: Texts = Field((), description="fields of the responses in a Label Studio or Argilla task")


class ImportArguments(CheckArguments):
    """`rlhf preferences import`."""

    store: str = Field("preferences.sqlite", description="the store; made when it is not there")
    seed: int = Field(0, description="seed of a store that is made: order of tasks and sides of responses")


class ExportArguments(_Arguments):
    """`rlhf preferences export`."""

    store: str
    to: str
    format: str = "trl"
    rule: Literal["majority", "mean", "all"] = "majority"
    on_tied_vote: Literal["drop", "tie"] = "drop"
    both_bad: Literal["tie", "leave_out"] = "tie"
    use_strength: bool = False
    ratings_as_pairs: bool = False
    leave_out_flagged: Flags = ()
    margins: Literal["none", "imported", "strength"] = "imported"
    prompts: Literal["all", "text", "messages"] = "all"
    rounds: Rounds | None = None
    validation: float = Field(0.05, ge=0, lt=1)
    test: float = Field(0.05, ge=0, lt=1)
    salt: str = "rlhf"
    overwrite: bool = False


class StatusArguments(_Arguments):
    """`rlhf preferences status`."""

    store: str


ArgumentsT = TypeVar("ArgumentsT", bound=_Arguments)


def run_preferences(arguments: Sequence[str]) -> int:
    """Does what the arguments say and prints the result. Raises `ConfigError` for wrong ones."""
    verbs = {"import": _import, "export": _export, "status": _status, "check": _check}
    if not arguments or arguments[0] not in verbs:
        came = f", not {arguments[0]!r}" if arguments else ""
        hint = did_you_mean(close_names(arguments[0], list(verbs))) if arguments else ""
        raise ConfigError(f"rlhf preferences takes {', '.join(verbs)}{came}{hint}\n{USAGE}")
    verbs[arguments[0]](list(arguments[1:]))
    return EXIT_SUCCESS


def parse_arguments(arguments: Sequence[str], kind: type[ArgumentsT], verb: str) -> ArgumentsT:
    """`key=value` and `--key=value` as the arguments of a verb. Raises `ConfigError` that names key and remedy."""
    known = {field.alias or name: field for name, field in kind.model_fields.items()}
    values: dict[str, str] = {}
    for argument in arguments:
        key, sign, value = argument.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not sign:
            raise ConfigError(f"rlhf preferences {verb}: expected key=value, got {printable(argument)!r}\n{USAGE}")
        if key not in known:
            near = did_you_mean(close_names(key, list(known)))
            raise ConfigError(
                f"rlhf preferences {verb}: unknown key {printable(key)!r}{near}; it takes {', '.join(known)}"
            )
        if key in values:
            raise ConfigError(f"rlhf preferences {verb}: {key} is given twice")
        values[key] = value
    try:
        return kind.model_validate({key: value for key, value in values.items() if value != "null"})
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = str(problem["loc"][0]) if problem["loc"] else ""
            if problem["type"] == "missing":
                lines.append(f"{key}= is missing")
            else:
                message = problem["msg"].removeprefix("Input should be ")
                lines.append(f"{key}={printable(values.get(key, ''))}: expected {message}")
        raise ConfigError(f"rlhf preferences {verb}: {'; '.join(lines)}\n{USAGE}") from error


def _options(arguments: CheckArguments) -> ImportOptions:
    return ImportOptions(
        arguments.annotator,
        arguments.annotator_kind,
        arguments.rating_scale,
        arguments.prompt_field,
        arguments.response_fields,
    )


def _import(arguments: list[str]) -> None:
    wanted = parse_arguments(arguments, ImportArguments, "import")
    path = Path(wanted.store).expanduser()
    source = Path(wanted.source).expanduser()
    made = not path.exists()
    if made:
        # A file that cannot be read should not leave an empty store behind.
        check_file(source, format=wanted.format, on_bad_row=wanted.on_bad_row, options=_options(wanted))
    with PreferenceStore.open_or_create(path, seed=wanted.seed) as store:
        report = import_file(
            store, source, format=wanted.format, on_bad_row=wanted.on_bad_row, options=_options(wanted)
        )
    say(str(report))
    say(f"{'made' if made else 'added to'} the store {path}")


def _check(arguments: list[str]) -> None:
    wanted = parse_arguments(arguments, CheckArguments, "check")
    source = Path(wanted.source).expanduser()
    say(str(check_file(source, format=wanted.format, on_bad_row=wanted.on_bad_row, options=_options(wanted))))
    say("nothing was written; `rlhf preferences import` with the same arguments and store=PATH imports it")


def _export(arguments: list[str]) -> None:
    wanted = parse_arguments(arguments, ExportArguments, "export")
    if wanted.format not in EXPORT_FORMATS:
        near = did_you_mean(close_names(wanted.format, EXPORT_FORMATS))
        raise ConfigError(f"format={wanted.format} is unknown{near}; an export is one of {', '.join(EXPORT_FORMATS)}")
    if wanted.validation + wanted.test >= 1:
        raise ConfigError("validation + test must stay below 1: nothing would be left to train on")
    folder = Path(wanted.to).expanduser()
    check_target(folder, wanted.overwrite)
    rule = ResolutionRule(wanted.rule, wanted.on_tied_vote, wanted.both_bad, wanted.use_strength)
    with PreferenceStore.open(Path(wanted.store).expanduser()) as store:
        exported = export_labels(
            store,
            rule=rule,
            rounds=wanted.rounds,
            splits=SplitConfig(validation=wanted.validation, test=wanted.test, salt=wanted.salt),
            options=ExportOptions(wanted.leave_out_flagged, wanted.ratings_as_pairs, wanted.margins),
        )
        card = write_export(
            exported, folder, format=wanted.format, prompts=wanted.prompts, store=store, overwrite=wanted.overwrite
        )
    counts = ", ".join(
        f"{name} {one['num_comparisons']:,} comparisons"
        + (f" and {one['num_ratings']:,} ratings" * bool(one["num_ratings"]))
        for name, one in card["splits"].items()
    )
    say(f"{folder}: format {wanted.format}; {counts}")
    say(f"rule: {exported.resolved}")
    for reason, count in {**card["left_out"], **card.get("not_written", {})}.items():
        say(f"left out: {count:,} x {reason}")


def _status(arguments: list[str]) -> None:
    from rlhf.preferences.status import render_status, store_status

    wanted = parse_arguments([one for one in arguments if one != JSON_FLAG], StatusArguments, "status")
    with PreferenceStore.open(Path(wanted.store).expanduser()) as store:
        status = store_status(store)
    if JSON_FLAG in arguments:
        say(json.dumps(status, ensure_ascii=False, indent=2, allow_nan=False))
    else:
        say(render_status(status))
