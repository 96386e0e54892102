"""Row formats: what each gives, how it is recognised, and what is wrong with rows that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.formats import FORMATS, RowError, as_kind, detect_format, split_shared_start
from rlhf.errors import ConfigError
from rlhf.records import Comparison, Demonstration, Message, Prompt, Record

SYSTEM, HI, HELLO, MORE = (
    Message("system", "Be brief."),
    Message("user", "Hi"),
    Message("assistant", "Hello"),
    Message("user", "More"),
)


def turns(*messages: Message) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def from_value(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": sender, "value": value} for sender, value in pairs]


def parts(role: str | None, *texts: str) -> dict[str, Any]:
    body: dict[str, Any] = {"parts": [{"text": text} for text in texts]}
    return body if role is None else {"role": role, **body}


HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: More\n\nAssistant:"
ROWS: list[tuple[str, dict[str, Any], Record]] = [
    ("prompt_response", {"prompt": "p", "response": " r"}, Demonstration("p", " r")),
    ("prompt_response", {"prompt": "p", "completion": " r"}, Demonstration("p", " r")),
    ("prompt_response", {"prompt": "p"}, Prompt("p")),
    ("prompt_response", {"prompt": "p", "response": None}, Prompt("p")),
    ("prompt_response", {"instruction": "do", "output": "done"}, Demonstration("do", "done")),
    ("prompt_response", {"instruction": "do", "input": "it", "output": "done"}, Demonstration("do\n\nit", "done")),
    (
        "prompt_response",
        {"instruction": "do", "input": "", "output": "done", "text": "all of it"},
        Demonstration("do", "done"),
    ),
    ("prompt_response", {"input": "q", "output": "a"}, Demonstration("q", "a")),
    ("prompt_response", {"question": "q", "answer": "a"}, Demonstration("q", "a")),
    ("prompt_response", {"prompt": turns(SYSTEM, HI)}, Prompt((SYSTEM, HI))),
    ("prompt_response", {"prompt": turns(HI), "completion": turns(HELLO)}, Demonstration((HI,), "Hello")),
    ("messages", {"messages": turns(SYSTEM, HI, HELLO)}, Demonstration((SYSTEM, HI), "Hello")),
    (
        "messages",
        {"prompt": "ignored", "messages": turns(HI, HELLO, MORE, Message("assistant", "No"))},
        Demonstration((HI, HELLO, MORE), "No"),
    ),
    ("messages", {"messages": turns(HI)}, Prompt((HI,))),
    ("messages", {"messages": [{"role": "system", "content": ""}, *turns(HI, HELLO)]}, Demonstration((HI,), "Hello")),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, *turns(HELLO)]},
        Demonstration((HI,), "Hello"),
    ),
    (
        "messages",
        {"conversations": from_value(("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello"))},
        Demonstration((SYSTEM, HI), "Hello"),
    ),
    ("preference", {"prompt": "p", "chosen": " c", "rejected": " r"}, Comparison("p", " c", " r")),
    ("preference", {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 2}, Comparison("p", "c", "r", 2.0)),
    ("preference", {"prompt": "p", "chosen": "c", "rejected": "r", "margin": "0.5"}, Comparison("p", "c", "r", 0.5)),
    (
        "preference",
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        Comparison("The sky is", " blue.", " black."),
    ),
    (
        "preference",
        {"prompt": turns(HI), "chosen": turns(HELLO), "rejected": [{"role": "assistant", "content": "Bye"}]},
        Comparison((HI,), "Hello", "Bye"),
    ),
    (
        "preference",
        {"chosen": turns(SYSTEM, HI, HELLO), "rejected": turns(SYSTEM, HI, Message("assistant", "Bye"))},
        Comparison((SYSTEM, HI), "Hello", "Bye"),
    ),
    (
        "preference",
        {"prompt": "Hi ", "chosen": turns(HI, HELLO), "rejected": turns(HI, Message("assistant", "Bye"))},
        Comparison((HI,), "Hello", "Bye"),
    ),
    ("preference", {"prompt": turns(HI), "chosen": "Hello", "rejected": "Bye"}, Comparison((HI,), "Hello", "Bye")),
    ("hh", {"chosen": HH + " yes", "rejected": HH + " no"}, Comparison(HH, " yes", " no")),
    ("input_output", {"input_text": "i", "output_text": "o"}, Demonstration("i", "o")),
    ("input_output", {"input_text": "i"}, Prompt("i")),
    (
        "input_output",
        {"input_text": "i", "candidate_0": "a", "candidate_1": "b", "choice": 1},
        Comparison("i", "b", "a"),
    ),
    (
        "contents",
        {
            "systemInstruction": parts("system", "Be", "brief."),
            "contents": [parts("user", "Hi"), parts("model", "Hello")],
        },
        Demonstration((Message("system", "Be\nbrief."), HI), "Hello"),
    ),
    (
        "contents",
        {"systemInstruction": parts(None, "Be brief."), "contents": [parts("user", "Hi", "there")]},
        Prompt((SYSTEM, Message("user", "Hi\nthere"))),
    ),
    ("contents", {"contents": [parts(None, "Hi"), parts("model", "Hello")]}, Demonstration((HI,), "Hello")),
    ("text", {"text": "whole", "id": 3}, Demonstration("", "whole")),
]


@pytest.mark.parametrize(("name", "row", "expected"), ROWS, ids=[f"{i}-{name}" for i, (name, _, _) in enumerate(ROWS)])
def test_rows_are_recognised_and_parsed(name: str, row: dict[str, Any], expected: Record) -> None:
    assert detect_format(row) == name
    assert FORMATS[name].parse(row) == expected
    assert type(expected) in FORMATS[name].gives


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("prompt_response", {"response": "r"}, "field 'prompt' is missing"),
    ("prompt_response", {"prompt": 3, "response": "r"}, "field 'prompt' is text, found a number"),
    ("prompt_response", {"prompt": " \n", "response": "r"}, "field 'prompt' is empty"),
    ("prompt_response", {"prompt": "p", "response": ""}, "field 'response' is empty"),
    ("prompt_response", {"prompt": "p", "response": {"a": 1}}, "field 'response' is text, found an object"),
    ("prompt_response", {"prompt": turns(HI, HELLO)}, "ends with a user turn"),
    ("prompt_response", {"prompt": b"p"}, "field 'prompt' is text, found bytes"),
    ("messages", {"messages": []}, "field 'messages' is empty"),
    ("messages", {"messages": "Hi"}, "is a list of messages, found text"),
    ("messages", {"messages": ["Hi"]}, "is an object with role and content, found text"),
    ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "role 'tool'"),
    ("messages", {"messages": [{"role": "user"}]}, "has text as its content, found null"),
    ("messages", {"messages": turns(HI, Message("assistant", " "))}, "has an empty turn"),
    ("messages", {"messages": turns(HELLO)}, "no user turn before"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "part that is not text"),
    ("preference", {"chosen": "c"}, "field 'rejected' is missing"),
    ("preference", {"prompt": "p", "chosen": "same", "rejected": "same"}, "chosen and rejected are the same"),
    ("preference", {"prompt": "p", "chosen": "c", "rejected": "r", "margin": "wide"}, "margin"),
    ("preference", {"prompt": "p", "chosen": "c", "rejected": "r", "margin": float("nan")}, "margin"),
    ("preference", {"chosen": turns(HI, HELLO), "rejected": turns(MORE, HELLO)}, "differ before the last"),
    ("preference", {"prompt": "p", "chosen": turns(HI, HELLO), "rejected": turns(HI, HELLO)}, "does not contain"),
    ("hh", {"chosen": HH + " yes", "rejected": HH.replace("Hi", "Ho") + " no"}, "differ before the last"),
    ("hh", {"chosen": HH + " yes\n\nHuman: ok", "rejected": HH + " no"}, "'chosen' does not end with an assistant"),
    ("hh", {"chosen": HH + " ", "rejected": HH + " no"}, "'chosen' has an empty last turn"),
    ("input_output", {"input_text": "i", "output_text": ["o"]}, "'output_text' is text, found a list"),
    ("input_output", {"input_text": "i", "candidate_0": "a", "candidate_1": "b", "choice": 2}, "'choice' is 0 or 1"),
    ("contents", {"contents": "x"}, "is a list of turns, found text"),
    ("contents", {"contents": [{"role": "user", "parts": [{"inlineData": {}}]}]}, "part that is not text"),
    ("contents", {"contents": [{"role": "user", "text": "x"}]}, "has a list of parts, found null"),
    ("text", {"text": ""}, "field 'text' is empty"),
]


@pytest.mark.parametrize(("name", "row", "reason"), BAD, ids=[f"{i}-{name}" for i, (name, _, _) in enumerate(BAD)])
def test_rows_that_do_not_fit_say_why(name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        FORMATS[name].parse(row)


def test_unknown_keys_list_the_formats() -> None:
    with pytest.raises(ConfigError) as caught:
        detect_format({"premise": "a", "hypothesis": "b"})
    message = str(caught.value)
    assert "premise, hypothesis" in message
    assert all(name in message for name in FORMATS)


def test_less_is_derived_from_more() -> None:
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "source": "x", "when": b"1"}
    comparison = FORMATS["preference"].parse(row)
    fields = FORMATS["preference"].prompt_fields
    assert as_kind(comparison, Demonstration, row, fields) == Demonstration("p", "c")
    assert as_kind(comparison, Prompt, row, fields) == Prompt("p", {"source": "x", "when": "b'1'"})
    assert as_kind(Demonstration("p", "r"), Comparison, {}, ()) is None
    assert as_kind(Prompt("p"), Demonstration, {}, ()) is None


def test_prompts_keep_the_answer_for_reward_functions() -> None:
    row = {"question": "2+2?", "answer": "4", "level": 1}
    known = FORMATS["prompt_response"]
    assert as_kind(known.parse(row), Prompt, row, known.prompt_fields) == Prompt("2+2?", {"answer": "4", "level": 1})


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("It costs 12 euros", "It costs 13 euros", ("It costs", " 12 euros", " 13 euros")),
        ("yes", "no", ("", "yes", "no")),
        ("a b", "a b c", ("a", " b", " b c")),
        ("a b ", "a b c", ("a", " b ", " b c")),
        ("Q:\n\nyes", "Q:\n\nno", ("Q:", "\n\nyes", "\n\nno")),
        ("a b", "a\nc", ("a", " b", "\nc")),
    ],
)
def test_shared_start_is_cut_at_a_word(chosen: str, rejected: str, expected: tuple[str, str, str]) -> None:
    assert split_shared_start(chosen, rejected) == expected


@given(st.text("ab \n", min_size=1), st.text("ab \n", min_size=1))
def test_shared_start_puts_both_texts_together_again(chosen: str, rejected: str) -> None:
    if not (chosen.strip() and rejected.strip()):
        return
    prompt, one, other = split_shared_start(chosen, rejected)
    assert (prompt + one, prompt + other) == (chosen, rejected)
    assert one.strip()
    assert other.strip()
    assert not prompt or (one[0].isspace() and other[0].isspace())
