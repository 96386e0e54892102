"""What a request must look like: from the bytes of a body to rows to score, or to the row that is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from rlhf.records import PromptContent, prompt_from_json

_KEYS = ("prompts", "responses", "columns", "normalized")


class RequestProblem(Exception):  # noqa: N818 - it is an answer to the client
    """An HTTP status, what is wrong for people, and the first row that is (None: none in particular)."""

    def __init__(self, status: int, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.row = row

    def to_json(self) -> dict[str, Any]:
        """`{"error"}`, with `row` where one is to blame."""
        body: dict[str, Any] = {"error": str(self)}
        return body if self.row is None else {**body, "row": self.row}


@dataclass(frozen=True)
class ScoreRequest:
    """Rows to score: prompts and responses of one length, columns of the same by their names."""

    prompts: Sequence[PromptContent]
    responses: Sequence[str]
    columns: Mapping[str, Sequence[Any]]
    normalized: bool

    def __len__(self) -> int:
        return len(self.responses)


def parse_request(body: bytes, max_rows: int) -> ScoreRequest:
    """The request of a body. Raises `RequestProblem`: 400 for what is no JSON, 413 for too many rows, else 422."""
    try:
        values = json.loads(body, parse_constant=_no_constant)
    except RecursionError as error:
        raise RequestProblem(400, "the body is nested too deeply") from error
    except ValueError as error:
        raise RequestProblem(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise RequestProblem(422, f"expected a JSON object with {', '.join(_KEYS)}, got {_kind(values)}")
    unknown = [key for key in values if key not in _KEYS]
    if unknown:
        raise RequestProblem(422, f"unknown key {unknown[0]!r}; a request has {', '.join(_KEYS)}")
    responses, prompts = _texts(values, "responses"), _list(values, "prompts")
    if len(prompts) != len(responses):
        raise RequestProblem(422, f"{len(prompts)} prompts, but {len(responses)} responses")
    if not responses:
        raise RequestProblem(422, "there is nothing to score: responses is empty")
    if len(responses) > max_rows:
        raise RequestProblem(
            413, f"{len(responses)} responses in one request, and serve.max_request_rows is {max_rows}; send fewer"
        )
    normalized = values.get("normalized", True)
    if not isinstance(normalized, bool):
        raise RequestProblem(422, f"normalized is true or false, not {_kind(normalized)}")
    return ScoreRequest(
        [_prompt(value, row) for row, value in enumerate(prompts)],
        responses,
        _columns(values.get("columns", {}), len(responses)),
        normalized,
    )


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _list(values: Mapping[str, Any], name: str) -> list[Any]:
    if name not in values:
        raise RequestProblem(422, f"{name} is missing: a list with one entry for each response")
    if not isinstance(values[name], list):
        raise RequestProblem(422, f"{name} is a list, not {_kind(values[name])}")
    result: list[Any] = values[name]
    return result


def _texts(values: Mapping[str, Any], name: str) -> list[str]:
    texts = _list(values, name)
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise RequestProblem(422, f"row {row}: a response is a text, not {_kind(text)}", row)
        _check_text(text, "response", row)
    return texts


def _prompt(value: Any, row: int) -> PromptContent:
    try:
        prompt = prompt_from_json(value)
    except ValueError as error:
        raise RequestProblem(422, f"row {row}: {str(error)[:300]}", row) from error
    if not prompt and not isinstance(value, str):
        raise RequestProblem(422, f"row {row}: the conversation has no message", row)
    for text in [prompt] if isinstance(prompt, str) else [message.content for message in prompt]:
        _check_text(text, "prompt", row)
    return prompt


def _check_text(text: str, name: str, row: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestProblem(
            422, f"row {row}: the {name} holds half of a surrogate pair, which is no text", row
        ) from error


def _columns(values: Any, num_rows: int) -> dict[str, list[Any]]:
    if not isinstance(values, dict):
        raise RequestProblem(422, f"columns is an object of lists, not {_kind(values)}")
    for name, column in values.items():
        if not isinstance(column, list):
            raise RequestProblem(422, f"columns.{name} is a list, not {_kind(column)}")
        if len(column) != num_rows:
            raise RequestProblem(422, f"columns.{name} has {len(column)} values for {num_rows} responses")
    return values


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
