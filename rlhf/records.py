"""Text records that the stages exchange on disk. Pure Python: no torch, no tokenizer.

A prompt is either plain text or a conversation; a response is always plain text (the last assistant turn).
Records are written as JSON Lines, one object a line, each with `schema` and its version; `read_records` refuses
another version by name. `content_hash` identifies a list of records whatever file it came from.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from rlhf.errors import DataError

SCHEMA_VERSION = 1
Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


PromptContent = str | tuple[Message, ...]


def prompt_key(prompt: PromptContent) -> str:
    """The text that identifies a prompt: splits and random streams hash it, so equal prompts are treated alike."""
    if isinstance(prompt, str):
        return " ".join(prompt.split())
    return json.dumps([[message.role, " ".join(message.content.split())] for message in prompt], ensure_ascii=False)


def prompt_hash(prompt: PromptContent) -> int:
    """A 64-bit hash of `prompt_key(prompt)`, the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(prompt_key(prompt).encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Prompt:
    """What a response answers. `columns` keeps the row's other fields for reward functions and reports."""

    prompt: PromptContent
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Demonstration:
    """A prompt with a response to imitate."""

    prompt: PromptContent
    response: str


@dataclass(frozen=True)
class Comparison:
    """Two responses to one prompt; `chosen` was preferred.

    `margin` is how much better, where known (the scale is the annotator's). `annotator` names who or what decided;
    `chosen_shown_first` keeps the side on which the chosen response was shown. `probability`, in [0.5, 1], is how
    likely `chosen` is the better one: None is 1, a tie is 0.5 (then `chosen` is no better than the other). `agreement`
    is the share of `num_annotators` annotators behind this outcome. `source` names what a report tells apart.
    """

    prompt: PromptContent
    chosen: str
    rejected: str
    margin: float | None = None
    annotator: str | None = None
    chosen_shown_first: bool | None = None
    probability: float | None = None
    agreement: float | None = None
    num_annotators: int | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if self.probability is not None and not 0.5 <= self.probability <= 1:
            raise ValueError(f"the probability that chosen is better lies in [0.5, 1], not {self.probability}")


@dataclass(frozen=True)
class RatedResponse:
    """A response with a number that says how good it is, on the annotator's scale; higher is better."""

    prompt: PromptContent
    response: str
    rating: float
    annotator: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.rating):
            raise ValueError(f"a rating is a finite number, not {self.rating}")


Record = Prompt | Demonstration | Comparison | RatedResponse
RecordT = TypeVar("RecordT", Prompt, Demonstration, Comparison, RatedResponse)


def prompt_to_json(prompt: PromptContent) -> Any:
    """A string, or a list of `{"role", "content"}` objects."""
    if isinstance(prompt, str):
        return prompt
    return [{"role": message.role, "content": message.content} for message in prompt]


def prompt_from_json(value: Any) -> PromptContent:
    """The inverse of `prompt_to_json`. Raises `ValueError` for anything else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"a prompt is a string or a list of messages, not {type(value).__name__}")
    messages = []
    for turn in value:
        if not (isinstance(turn, dict) and turn.get("role") in ROLES and isinstance(turn.get("content"), str)):
            raise ValueError(f"a message has a role of {', '.join(ROLES)} and a text content, not {turn!r}")
        messages.append(Message(turn["role"], turn["content"]))
    return tuple(messages)


def to_json(record: Record) -> dict[str, Any]:
    """The record as a JSON object; fields that are None are left out."""
    body: dict[str, Any] = {"schema": f"{type(record).__name__.lower()}/{SCHEMA_VERSION}"}
    for name, value in vars(record).items():
        if name == "prompt":
            body[name] = prompt_to_json(value)
        elif name == "columns":
            if value:
                body[name] = dict(value)
        elif value is not None:
            body[name] = value
    return body


def from_json(body: Mapping[str, Any], kind: type[RecordT]) -> RecordT:
    """The inverse of `to_json` for one kind of record. Raises `ValueError` when the object is not of that kind."""
    expected = f"{kind.__name__.lower()}/{SCHEMA_VERSION}"
    if body.get("schema") != expected:
        raise ValueError(f"expected a record of schema {expected}, found {body.get('schema')!r}")
    fields = {name: value for name, value in body.items() if name != "schema"}
    fields["prompt"] = prompt_from_json(fields.get("prompt"))
    return kind(**fields)


def dump_line(record: Record) -> str:
    """One JSON line without the newline; key order is fixed, so equal records give equal bytes."""
    return json.dumps(to_json(record), ensure_ascii=False, sort_keys=True)


def read_records(path: Path, kind: type[RecordT]) -> list[RecordT]:
    """Reads records that `dump_line` wrote. Raises `DataError` naming the file and line of the first bad one."""
    records = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                records.append(from_json(json.loads(line), kind))
            except (ValueError, TypeError) as error:
                raise DataError(f"{path}, line {number}: {error}") from error
    return records


def content_hash(records: Iterable[Record]) -> str:
    """SHA-256 over the records' JSON lines, in order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(dump_line(record).encode())
        digest.update(b"\n")
    return digest.hexdigest()
