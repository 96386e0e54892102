"""Finding prompt and responses among the fields of a task of a labelling tool, whose names people made up."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlhf.data.formats import RowError, messages_of
from rlhf.preferences.exchange.items import Fields, ImportOptions
from rlhf.preferences.store import Answer, BothBad, Choice, FlagKind, Skip, Tie
from rlhf.records import PromptContent

PROMPT_NAMES = ("prompt", "instruction", "question", "query", "input", "context", "conversation", "messages", "chat")
# response-1, answer_b, completion2, text_left; the end tells the responses of a task apart.
_NUMBERED = re.compile(r"(?P<stem>.*?)[-_ ]?(?P<end>\d+|[a-i]|left|right)", re.IGNORECASE)
_STEMS = ("response", "answer", "completion", "reply", "output", "generation", "candidate", "summary", "text", "")
_SIDES = {"left": 0, "right": 1, "first": 0, "second": 1, "a": 0, "b": 1}
_OTHER: dict[str, Answer] = {
    "tie": Tie(),
    "equal": Tie(),
    "same": Tie(),
    "both good": Tie(),
    "both bad": BothBad(),
    "neither": BothBad(),
    "none": BothBad(),
    "skip": Skip(),
    "unsure": Skip(),
}
FLAG_NAMES: dict[str, FlagKind] = {
    "unsafe": "unsafe",
    "harmful": "unsafe",
    "personal data": "personal_data",
    "pii": "personal_data",
    "broken": "broken",
}


def find_responses(data: Fields, options: ImportOptions, named: Sequence[str] = ()) -> tuple[str, ...]:
    """The names of the fields that hold the responses, in the order of the file or of their numbers.

    `named` are the names that the task itself gives. Raises `RowError` where nothing tells which they are.
    """
    if options.response_fields:
        missing = [name for name in options.response_fields if not isinstance(data.get(name), str)]
        if missing:
            raise RowError(f"response_fields names {', '.join(missing)}, but the task has the texts {_listed(data)}")
        return options.response_fields
    if named and all(isinstance(data.get(name), str) for name in named):
        return tuple(named)
    by_stem: dict[str, list[str]] = {}
    for name, value in data.items():
        found = _NUMBERED.fullmatch(name)
        if found and isinstance(value, str):
            by_stem.setdefault(found["stem"].lower(), []).append(name)
    for stem in _STEMS:
        if len(by_stem.get(stem, ())) > 1:
            return tuple(sorted(by_stem[stem], key=_place))
    several = [names for names in by_stem.values() if len(names) > 1]
    if len(several) == 1:
        return tuple(sorted(several[0], key=_place))
    if not several and isinstance(data.get("response"), str):
        return ("response",)
    raise RowError(
        f"cannot tell which fields are the responses; the task has the texts {_listed(data)}. Name them with "
        "response_fields=[FIRST,SECOND]"
    )


def find_prompt(data: Fields, options: ImportOptions, responses: Sequence[str]) -> PromptContent:
    """The prompt of a task. Raises `RowError` when there is none."""
    if options.prompt_field is not None:
        names = [options.prompt_field]
    else:
        names = [name for name in PROMPT_NAMES if name not in responses]
    for name in names:
        value = data.get(name)
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, list):
            return messages_of(value, name)
    raise RowError(f"no field holds the prompt; the task has the texts {_listed(data)}. Name it with prompt_field=NAME")


def read_choice(value: str, names: Sequence[str], ids: Sequence[str]) -> Answer | None:
    """The answer that a choice stands for: the name or number of a response, a side, tie, both bad or skip; or None."""
    place = place_of(value, names)
    if place is not None:
        return Choice(ids[place])
    return _OTHER.get(_plain(value))


def place_of(value: str, names: Sequence[str]) -> int | None:
    """Which response a word names, from 0: by its field, its side, or the number at its end; None for no such word."""
    text = _plain(value)
    plain = [_plain(name) for name in names]
    if text in plain:
        return plain.index(text)
    for ending in (" is better", " better", " wins"):
        text = text.removesuffix(ending)
    if text in plain:
        return plain.index(text)
    found = _NUMBERED.fullmatch(text)
    if found is None or not (found["stem"] in _STEMS or any(name.startswith(found["stem"]) for name in plain)):
        return None
    end = found["end"].lower()
    ends = [_end(name) for name in names]
    if end in ends:
        return ends.index(end)
    place = _SIDES.get(end, int(end) - 1 if end.isdigit() else -1)
    return place if 0 <= place < len(names) else None


def read_flag(value: str) -> FlagKind | None:
    """The flag that a choice stands for, if any."""
    return FLAG_NAMES.get(_plain(value))


def _plain(text: str) -> str:
    return " ".join(re.split(r"[-_\s]+", text.strip().lower()))


def _end(name: str) -> str:
    found = _NUMBERED.fullmatch(name)
    return found["end"].lower() if found else ""


def _place(name: str) -> tuple[int, str]:
    end = _end(name)
    return (int(end), "") if end.isdigit() else (0, end)


def _listed(data: Fields) -> str:
    return ", ".join(name for name, value in data.items() if isinstance(value, str | list)) or "none"
