"""The row formats that people have, each turned into a record.

Name and fields of a row; what a row gives:

- `prompt_response`: `prompt`, `instruction` (+ `input`), `question` or `input`, with `response`, `completion`,
  `output` or `answer`; a demonstration, or a prompt when no response field is there.
- `messages`: `messages`, a list of `role` and `content`, or `conversations`, a list of `from` and `value`; a
  demonstration, or a prompt when the last turn is the user's.
- `preference`: `chosen`, `rejected`, and `prompt` unless they share it: texts, or lists of messages; a comparison,
  with what `comparison_columns` finds beside them.
- `hh`: `chosen`, `rejected`: transcripts of "\\n\\nHuman: ...\\n\\nAssistant: ..."; a comparison.
- `input_output`: `input_text` with `output_text` (a demonstration), with `candidate_0`, `candidate_1` and `choice`, the
  index of the better one (a comparison), or alone (a prompt).
- `contents`: `contents`, a list of `role` (user, model) and `parts` of `text`, and `systemInstruction`; as `messages`.
- `text`: `text`; a demonstration with an empty prompt.
- `query_responses`, `summaries`, `post_summary`, `instruction`, `best_of`: see `rlhf.data.paper_formats`.

A comparison also serves as the demonstration of its chosen response, a rated response as that of its response, and all
serve as their prompt (`as_kind`).
Texts are taken as they are: a response that should be separated from its prompt by white space starts with it. A
conversation becomes messages and meets the model through its chat template. An HH transcript stays plain text, as in
the literature on it: the prompt goes up to and includes the last "\\n\\nAssistant:", the response is the rest.

A null field counts as absent. What does not fit raises `RowError`, whose text is the reason shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from rlhf.data import paper_formats
from rlhf.data.comparison_columns import comparison_columns
from rlhf.data.readers import json_type
from rlhf.data.row_format import Format as Format
from rlhf.data.turns import RowError as RowError
from rlhf.data.turns import messages_of as messages_of
from rlhf.data.turns import role_of, text_of_parts, without_empty_system
from rlhf.errors import ConfigError
from rlhf.records import (
    Comparison,
    Demonstration,
    Message,
    Prompt,
    PromptContent,
    RatedResponse,
    Record,
    RecordT,
    prompt_key,
)

Fields = Mapping[str, Any]
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
PROMPT_FIELDS = ("prompt", "instruction", "question", "input")
RESPONSE_FIELDS = ("response", "completion", "output", "answer")


def detect_format(row: Fields) -> str:
    """The name of the format that a row's keys fit. Raises `ConfigError` that lists the formats when none does."""
    for name, known in FORMATS.items():
        if known.fits(row):
            return name
    listed = "\n".join(f"  {name}: {known.describes}" for name, known in FORMATS.items())
    keys = ", ".join(str(key) for key in row) or "none"
    raise ConfigError(f"the first row fits no known format; its fields are: {keys}. Known formats:\n{listed}")


def as_kind(record: Record, kind: type[RecordT], fields: Fields, prompt_fields: tuple[str, ...]) -> RecordT | None:
    """The record as the wanted kind, or None when it holds less. `fields` is the row, for a prompt's columns."""
    if kind is Prompt:
        columns = {name: _plain(value) for name, value in fields.items() if name not in prompt_fields}
        return kind(record.prompt, columns)
    if isinstance(record, kind):
        return record
    if kind is Demonstration and isinstance(record, Comparison):
        return kind(record.prompt, record.chosen)
    if kind is Demonstration and isinstance(record, RatedResponse):
        return kind(record.prompt, record.response)
    return None


def _plain(value: Any) -> Any:
    """A column value that JSON can write; anything else (dates, bytes of Parquet) as its text."""
    return value if value is None or isinstance(value, str | int | float | bool | list | dict) else str(value)


# --- one function for each format -------------------------------------------------------------------------------------


def parse_prompt_response(row: Fields) -> Record:
    """Prompt and response under any of their usual names; either may be a list of messages."""
    name = _present(row, PROMPT_FIELDS)
    if name is None:
        raise RowError("field 'prompt' is missing (or 'instruction', 'question')")
    prompt = _prompt(row, name)
    if name == "instruction" and isinstance(prompt, str) and row.get("input"):
        prompt = f"{prompt}\n\n{_text(row, 'input')}"
    response_name = _present(row, RESPONSE_FIELDS)
    if response_name is None:
        return Prompt(_ending_with_user(prompt))
    if isinstance(row[response_name], list):
        answer = messages_of(row[response_name], response_name)
        return Demonstration(*_last_turn((*_as_messages(prompt), *answer), response_name))
    return Demonstration(prompt, _text(row, response_name))


def parse_rating(row: Fields) -> Record:
    """A prompt, a response and its rating, higher is better. A row without a rating is a demonstration."""
    record = parse_prompt_response(row)
    if not isinstance(record, Demonstration) or row.get("rating") in (None, ""):
        return record
    rating = _rating(row)
    if rating is None:
        raise RowError(f"field 'rating' is a number, found {row['rating']!r}")
    named = {name: row[name] for name in ("annotator", "source") if isinstance(row.get(name), str) and row[name]}
    return RatedResponse(record.prompt, record.response, rating, **named)


def _rating(row: Fields) -> float | None:
    """A finite number, which may be written as text."""
    try:
        number = float(row["rating"])
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _is_rated(row: Fields) -> bool:
    """Of rows that call something else than a number a rating, only the response counts."""
    named = _present(row, PROMPT_FIELDS) and _present(row, RESPONSE_FIELDS)
    return bool(named) and row.get("rating") is not None and _rating(row) is not None


def parse_messages(row: Fields) -> Record:
    """A conversation: everything up to the last assistant turn is the prompt."""
    name = _present(row, ("messages", "conversations"))
    if name is None:
        raise RowError("field 'messages' is missing (or 'conversations')")
    return _conversation_record(messages_of(row[name], name), name)


def parse_preference(row: Fields) -> Record:
    """TRL's preference rows: standard (texts) or conversational (messages), with the prompt or with a shared start."""
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise RowError(f"field '{name}' is missing")
    if isinstance(row["chosen"], list) or isinstance(row["rejected"], list):
        prompt, chosen, rejected = _conversational_pair(row)
    elif row.get("prompt") is None:
        prompt, chosen, rejected = split_shared_start(_text(row, "chosen"), _text(row, "rejected"))
    else:
        prompt = _prompt(row, "prompt")
        chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    return _comparison(prompt, chosen, rejected, row)


def parse_hh(row: Fields) -> Record:
    """An Anthropic HH transcript pair, kept as plain text."""
    prompt, chosen = _split_transcript(_text(row, "chosen"), "chosen")
    rejected_prompt, rejected = _split_transcript(_text(row, "rejected"), "rejected")
    if prompt != rejected_prompt:
        raise RowError("chosen and rejected differ before the last assistant turn")
    return _comparison(prompt, chosen, rejected, row)


def parse_input_output(row: Fields) -> Record:
    """`input_text` with `output_text`, or with two candidates and the index of the better one."""
    prompt = _text(row, "input_text")
    if row.get("output_text") is not None:
        return Demonstration(prompt, _text(row, "output_text"))
    if row.get("candidate_0") is None and row.get("candidate_1") is None:
        return Prompt(prompt)
    candidates = _text(row, "candidate_0"), _text(row, "candidate_1")
    if str(row.get("choice")) not in ("0", "1"):
        raise RowError(f"field 'choice' is 0 or 1, found {row.get('choice')!r}")
    choice = int(row["choice"])
    return _comparison(prompt, candidates[choice], candidates[1 - choice], row)


def parse_contents(row: Fields) -> Record:
    """`systemInstruction` and `contents` with `parts`; the parts of one turn are joined by line breaks."""
    if not isinstance(row.get("contents"), list):
        raise RowError(f"field 'contents' is a list of turns, found {json_type(row.get('contents'))}")
    messages = []
    system = row.get("systemInstruction", row.get("system_instruction"))
    if system is not None:
        messages.append(
            Message("system", system if isinstance(system, str) else text_of_parts(system, "systemInstruction"))
        )
    for turn in row["contents"]:
        if not isinstance(turn, dict):
            raise RowError(f"a turn of 'contents' is an object with role and parts, found {json_type(turn)}")
        messages.append(Message(role_of(turn.get("role", "user"), "contents"), text_of_parts(turn, "contents")))
    return _conversation_record(without_empty_system(messages, "contents"), "contents")


def parse_text(row: Fields) -> Record:
    """The whole text is the response to an empty prompt."""
    return Demonstration("", _text(row, "text"))


def _has(*names: str) -> Callable[[Fields], bool]:
    return lambda row: all(name in row for name in names)


def _is_transcript_pair(row: Fields) -> bool:
    sides = (row.get("chosen"), row.get("rejected"))
    return row.get("prompt") is None and all(isinstance(side, str) and ASSISTANT in side for side in sides)


_BOTH, _ALL = (Demonstration, Prompt), (Comparison, Demonstration, Prompt)
# The order is that of detection: a format whose fields another also has comes first.
FORMATS: dict[str, Format] = {
    **paper_formats.FORMATS,
    "hh": Format(
        "chosen, rejected: transcripts of Human and Assistant",
        _is_transcript_pair,
        parse_hh,
        ("chosen", "rejected"),
        _ALL,
    ),
    "preference": Format(
        "chosen, rejected and usually prompt: texts or lists of messages",
        _has("chosen", "rejected"),
        parse_preference,
        ("prompt", "chosen", "rejected"),
        _ALL,
    ),
    "contents": Format(
        "contents with parts, systemInstruction",
        _has("contents"),
        parse_contents,
        ("contents", "systemInstruction", "system_instruction"),
        _BOTH,
    ),
    "messages": Format(
        "messages (role, content) or conversations (from, value)",
        lambda row: "messages" in row or "conversations" in row,
        parse_messages,
        ("messages", "conversations"),
        _BOTH,
    ),
    "input_output": Format(
        "input_text with output_text, or with candidate_0, candidate_1 and choice",
        _has("input_text"),
        parse_input_output,
        ("input_text",),
        _ALL,
    ),
    "rating": Format(
        "prompt and response as in prompt_response, and rating, a number",
        _is_rated,
        parse_rating,
        PROMPT_FIELDS,
        (RatedResponse, Demonstration, Prompt),
    ),
    "prompt_response": Format(
        "prompt, instruction (+ input), question or input; response, completion, output or answer",
        lambda row: any(name in row for name in PROMPT_FIELDS[:-1]) or ("input" in row and "output" in row),
        parse_prompt_response,
        PROMPT_FIELDS,
        _BOTH,
    ),
    "text": Format("text", _has("text"), parse_text, ("text",), (Demonstration,)),
}


# --- shared pieces ----------------------------------------------------------------------------------------------------


def split_shared_start(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two texts that begin alike.

    The prompt is what they share, cut back to the last word boundary, so that no word is split and both responses
    keep their leading white space. It is empty when they share no whole word.
    """
    # Both responses keep at least one character that is not white space.
    low, high = 0, min(len(chosen.rstrip()), len(rejected.rstrip())) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if chosen[:middle] == rejected[:middle] else (low, middle - 1)
    while low > 0 and not (chosen[low].isspace() and rejected[low].isspace()):
        low -= 1
    end = len(chosen[:low].rstrip())
    return chosen[:end], chosen[end:], rejected[end:]


def _present(row: Fields, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _text(row: Fields, name: str) -> str:
    value = row.get(name)
    if value is None:
        raise RowError(f"field '{name}' is missing")
    if not isinstance(value, str):
        raise RowError(f"field '{name}' is text, found {json_type(value)}")
    if not value or value.isspace():
        raise RowError(f"field '{name}' is empty")
    return value


def _prompt(row: Fields, name: str) -> PromptContent:
    return messages_of(row[name], name) if isinstance(row[name], list) else _text(row, name)


def _as_messages(prompt: PromptContent) -> tuple[Message, ...]:
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def _ending_with_user(prompt: PromptContent) -> PromptContent:
    if not isinstance(prompt, str) and (not prompt or prompt[-1].role != "user"):
        raise RowError("a conversation to answer ends with a user turn")
    return prompt


def _conversation_record(messages: tuple[Message, ...], name: str) -> Record:
    if not messages:
        raise RowError(f"field '{name}' is empty")
    if messages[-1].role == "assistant":
        return Demonstration(*_last_turn(messages, name))
    return Prompt(_ending_with_user(messages))


def _last_turn(messages: tuple[Message, ...], name: str) -> tuple[tuple[Message, ...], str]:
    """(turns before the last, text of the last), which is the assistant's and has a user's turn before it."""
    if not messages or messages[-1].role != "assistant":
        raise RowError(f"'{name}' does not end with an assistant turn")
    if len(messages) < 2 or messages[-2].role != "user":
        raise RowError(f"'{name}' has no user turn before the last assistant turn")
    return messages[:-1], messages[-1].content


def _conversational_pair(row: Fields) -> tuple[PromptContent, str, str]:
    """A pair of lists of messages: whole conversations, or answers to the conversation in `prompt`."""
    before: tuple[Message, ...] = ()
    if row.get("prompt") is not None:
        before = _as_messages(_prompt(row, "prompt"))
    sides = []
    for name in ("chosen", "rejected"):
        value = row[name]
        turns = (Message("assistant", _text(row, name)),) if isinstance(value, str) else messages_of(value, name)
        sides.append(_last_turn(_continued(before, turns, name), name))
    (prompt, chosen), (rejected_prompt, rejected) = sides
    if prompt != rejected_prompt:
        raise RowError("chosen and rejected differ before the last assistant turn")
    return prompt, chosen, rejected


def _continued(before: tuple[Message, ...], turns: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    """The whole conversation: `turns` when they repeat the prompt's turns, else the prompt's turns and then `turns`."""
    if not any(turn.role == "user" for turn in turns):
        return before + turns
    keys = {prompt_key((turn,)) for turn in turns}
    if any(prompt_key((turn,)) not in keys for turn in before):
        raise RowError(f"'{name}' is a conversation that does not contain the turns of 'prompt'")
    return turns


def _split_transcript(text: str, name: str) -> tuple[str, str]:
    start, marker, response = text.rpartition(ASSISTANT)
    if not marker or HUMAN in response:
        raise RowError(f"'{name}' does not end with an assistant turn ({ASSISTANT!r})")
    if not response.strip():
        raise RowError(f"'{name}' has an empty last turn")
    return start + marker, response


def _comparison(prompt: PromptContent, chosen: str, rejected: str, row: Fields) -> Comparison:
    if chosen == rejected:
        raise RowError("chosen and rejected are the same")
    try:
        return Comparison(prompt, chosen, rejected, **comparison_columns(row))
    except ValueError as error:
        raise RowError(str(error)) from error
