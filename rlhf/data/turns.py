"""The turns of a conversation, whatever they are called in a row, as messages."""

from __future__ import annotations

from typing import Any

from rlhf.data.readers import json_type
from rlhf.records import Message, Role

ROLE_NAMES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}


class RowError(ValueError):
    """A row that does not fit its format."""


def messages_of(value: Any, name: str) -> tuple[Message, ...]:
    """A list of turns as messages. Turns are `role`/`content` or `from`/`value`; empty system turns are dropped."""
    if not isinstance(value, list):
        raise RowError(f"field '{name}' is a list of messages, found {json_type(value)}")
    messages = []
    for turn in value:
        if not isinstance(turn, dict):
            raise RowError(f"a message of '{name}' is an object with role and content, found {json_type(turn)}")
        role = role_of(turn["role"] if "role" in turn else turn.get("from"), name)
        messages.append(Message(role, _content(turn["content"] if "content" in turn else turn.get("value"), name)))
    return without_empty_system(messages, name)


def role_of(value: Any, name: str) -> Role:
    """The role that a turn of field `name` has. Raises `RowError` for one that is not known."""
    role = ROLE_NAMES.get(value.lower()) if isinstance(value, str) else None
    if role is None:
        raise RowError(f"'{name}' has a turn with role {value!r}; expected system, user or assistant")
    return role


def _content(value: Any, name: str) -> str:
    """Text, or a list of parts of type text."""
    if isinstance(value, list):
        return text_of_parts({"parts": value}, name)
    if not isinstance(value, str):
        raise RowError(f"a message of '{name}' has text as its content, found {json_type(value)}")
    return value


def text_of_parts(turn: Any, name: str) -> str:
    """The texts of a turn's `parts`, joined by line breaks. Raises `RowError` for anything but text."""
    parts = turn.get("parts") if isinstance(turn, dict) else None
    if not isinstance(parts, list):
        raise RowError(f"a turn of '{name}' has a list of parts, found {json_type(parts)}")
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    kept = [text for text in texts if isinstance(text, str)]
    if len(kept) != len(texts):
        raise RowError(f"'{name}' has a part that is not text; only text is supported")
    return "\n".join(kept)


def without_empty_system(messages: list[Message], name: str) -> tuple[Message, ...]:
    """The messages but empty system turns. Raises `RowError` where another turn is empty."""
    kept = tuple(message for message in messages if message.role != "system" or message.content.strip())
    if any(not message.content.strip() for message in kept):
        raise RowError(f"'{name}' has an empty turn")
    return kept
