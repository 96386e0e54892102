"""A chat model behind an address: retries, refusals, the key, the cache, the limit of cost, against a stub server."""

from __future__ import annotations

import math
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from rlhf.chat.address import OpenAIChat, choice_logprobs
from rlhf.chat.asking import Chat, make_chat
from rlhf.chat.protocol import ChatError, ChatReply, ChatRequest
from rlhf.config.chat import ChatModelConfig
from rlhf.errors import ConfigError
from rlhf.records import Message
from tests.chat_server import Reply, chat_server, said

KEY = "sk-very-secret-17"


def config_for(address: str, **fields: Any) -> ChatModelConfig:
    return ChatModelConfig(**({"address": address, "model_name": "m", "cache": None, "num_retries": 2} | fields))


def question(text: str, **fields: Any) -> ChatRequest:
    return ChatRequest((Message("user", text),), **fields)


def chat_for(address: str, **fields: Any) -> tuple[Chat, list[float]]:
    """A chat whose waits are recorded and not waited for."""
    chat = make_chat(config_for(address, **fields), "preferences.annotator")
    waits: list[float] = []
    assert isinstance(chat.model, OpenAIChat)
    chat.model.pause = waits.append
    return chat, waits


def test_a_request_is_what_the_interface_wants() -> None:
    with chat_server(lambda body, number: said("yes")) as server:
        chat, _ = chat_for(server.address + "/", max_tokens=9)
        replies = chat.ask([question("hi", max_tokens=9), question("warm", temperature=0.7, seed=3)])
    assert [reply.text for reply in replies] == ["yes", "yes"]
    assert server.paths == ["/v1/chat/completions"] * 2
    plain = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "temperature": 0.0}
    bodies = sorted(server.bodies, key=lambda body: float(body["temperature"]))
    assert bodies[0] == plain
    assert bodies[1]["temperature"] == 0.7
    assert bodies[1]["seed"] == 3
    assert not any("Authorization" in header for header in server.headers)


def test_too_many_requests_then_a_reply() -> None:
    def script(body: dict[str, Any], number: int) -> Reply:
        return Reply(429, {"error": "slow down"}, {"Retry-After": "7"}) if number == 0 else said("done")

    with chat_server(script) as server:
        chat, waits = chat_for(server.address)
        assert chat.ask([question("q")])[0].text == "done"
    assert waits == [7.0]
    assert len(server.bodies) == 2


def test_retry_after_may_be_a_date() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)

    def script(body: dict[str, Any], number: int) -> Reply:
        return Reply(503, b"busy", {"Retry-After": date}) if number == 0 else said("done")

    with chat_server(script) as server:
        chat, waits = chat_for(server.address)
        chat.ask([question("q")])
    assert 25 < waits[0] <= 30


def test_a_server_that_wants_an_hour_is_not_waited_for() -> None:
    with chat_server(lambda body, number: Reply(429, b"quota", {"Retry-After": "3600"})) as server:
        chat, waits = chat_for(server.address)
        with pytest.raises(ChatError, match="asked again in 3600 seconds: quota"):
            chat.ask([question("q")])
    assert waits == []
    assert len(server.bodies) == 1


def test_errors_of_the_server_are_tried_again_with_growing_waits() -> None:
    with chat_server(lambda body, number: Reply(500, b"out of\n memory")) as server:
        chat, waits = chat_for(server.address, num_retries=4)
        with pytest.raises(ChatError, match=r"failed 5 times; the last time: status 500: out of memory"):
            chat.ask([question("q")])
    assert len(server.bodies) == 5
    for wait, longest in zip(waits, (0.5, 1.0, 2.0, 4.0), strict=True):
        assert longest / 2 <= wait <= longest


def test_a_broken_connection_and_a_timeout_are_tried_again() -> None:
    over = threading.Event()

    def script(body: dict[str, Any], number: int) -> Reply:
        if number == 0:
            over.wait(120)
        return said("done")

    with chat_server(script) as server:
        chat, waits = chat_for(server.address, timeout_seconds=2)
        try:
            assert chat.ask([question("q")])[0].text == "done"
        finally:
            over.set()
        gone = server.address
    assert len(waits) == 1
    chat, waits = chat_for(gone, num_retries=1)
    with pytest.raises(ChatError, match="ConnectError"):
        chat.ask([question("q")])
    assert len(waits) == 1


@pytest.mark.parametrize("body", [b"<html>busy</html>", b"{}", b'{"choices": []}', b'{"choices": [{"message": 3}]}'])
def test_a_reply_that_is_none_is_tried_again(body: bytes) -> None:
    with chat_server(lambda sent, number: Reply(200, body) if number == 0 else said("done")) as server:
        chat, waits = chat_for(server.address)
        assert chat.ask([question("q")])[0].text == "done"
    assert len(waits) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 301])
def test_a_refused_request_is_not_sent_again(status: int) -> None:
    with chat_server(lambda body, number: Reply(status, {"error": "no such model"})) as server:
        chat, waits = chat_for(server.address)
        with pytest.raises(ChatError, match=rf"status {status}: .*no such model.*Check address, model_name"):
            chat.ask([question("q")])
    assert waits == []
    assert len(server.bodies) == 1


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with chat_server(lambda body, number: Reply(401, {"error": f"wrong key {KEY}"})) as server:
        chat, _ = chat_for(server.address, api_key_variable="JUDGE_KEY", cache=str(tmp_path))
        with pytest.raises(ChatError) as caught:
            chat.ask([question("q")])
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in str(caught.value)
    assert "wrong key ***" in str(caught.value)
    assert KEY not in repr(chat.model)
    assert KEY not in repr(vars(chat)["config"])
    for file in tmp_path.iterdir():
        assert KEY.encode() not in file.read_bytes()


def test_a_key_that_is_not_set_is_found_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"preferences\.annotator\.api_key_variable=JUDGE_KEY: .*export JUDGE_KEY"):
        chat_for("http://127.0.0.1:9/v1", api_key_variable="JUDGE_KEY")


def test_no_more_requests_at_a_time_than_allowed_and_replies_in_order() -> None:
    three = threading.Barrier(3)

    def script(body: dict[str, Any], number: int) -> Reply:
        three.wait(60)
        time.sleep(0.02)  # in which a fourth one could come
        return said(body["messages"][0]["content"].upper())

    with chat_server(script) as server:
        chat, _ = chat_for(server.address, concurrency=3)
        replies = chat.ask([question(f"q{number}") for number in range(12)])
    assert [reply.text for reply in replies] == [f"Q{number}" for number in range(12)]
    assert server.most_busy == 3


def test_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Reply:
        return said(f"reply {number}", prompt_tokens=100, response_tokens=20)

    with chat_server(script) as server:
        first, _ = chat_for(server.address, cache=str(tmp_path), input_price=2.0, output_price=10.0)
        replies = first.ask([question("q"), question("q"), question("other")])
        assert replies[0] == replies[1]
        assert len(server.bodies) == 2
        assert first.figures() == {
            "requests": 3,
            "cached": 1,
            "prompt_tokens": 200,
            "response_tokens": 40,
            "cost": pytest.approx((200 * 2 + 40 * 10) / 1e6),
        }
        again, _ = chat_for(server.address, cache=str(tmp_path), input_price=2.0, output_price=10.0)
        assert again.ask([question("q")]) == [replies[0]]
        assert again.figures()["cost"] == 0
        assert len(server.bodies) == 2
        # Another model, temperature or length is another question.
        chat_for(server.address, cache=str(tmp_path), model_name="n")[0].ask([question("q")])
        again.ask([question("q", temperature=0.5), question("q", max_tokens=3)])
        assert len(server.bodies) == 5


def test_replies_before_a_failure_are_kept(tmp_path: Path) -> None:
    def script(body: dict[str, Any], number: int) -> Reply:
        return Reply(400, b"bad") if body["messages"][0]["content"] == "bad" else said("fine")

    with chat_server(script) as server:
        chat, _ = chat_for(server.address, cache=str(tmp_path), concurrency=1)
        with pytest.raises(ChatError):
            chat.ask([question("good"), question("bad"), question("never sent")])
        num_sent = len(server.bodies)
        assert chat.ask([question("good")])[0].text == "fine"
    # After the failure at most one more was under way.
    assert num_sent <= 3
    assert len(server.bodies) == num_sent


def test_a_cost_over_the_limit_stops_it_before_anything_is_sent() -> None:
    with chat_server(lambda body, number: said("x", prompt_tokens=4, response_tokens=10)) as server:
        # Two requests of 4 + ceil(300 / 3) = 104 tokens, and 10 each to receive at most.
        requests = [question(letter * 300, max_tokens=10) for letter in "ab"]
        fields: dict[str, Any] = {"input_price": 1_000.0, "output_price": 100_000.0}
        exact = (208 * 1_000 + 20 * 100_000) / 1e6
        chat, _ = chat_for(server.address, max_cost=exact * 0.999, **fields)
        estimate = chat.estimate(requests)
        assert (estimate.num_requests, estimate.prompt_tokens, estimate.max_response_tokens) == (2, 208, 20)
        assert estimate.cost == pytest.approx(exact)
        assert str(estimate) == (
            "2 requests; about 208 tokens to send and at most 20 to receive; cost at most about 2.208"
        )
        with pytest.raises(ConfigError, match=r"preferences\.annotator\.max_cost=.*Nothing of it was sent"):
            chat.ask(requests)
        assert server.bodies == []
        enough, _ = chat_for(server.address, max_cost=exact, **fields)
        enough.ask(requests)
        assert len(server.bodies) == 2
        # What is spent counts: 2 * (4 * 1000 + 10 * 100000) / 1e6 = 2.008.
        with pytest.raises(ConfigError, match=r"besides 2\.008 that is spent"):
            enough.ask([question("c" * 300, max_tokens=10)])
        assert len(server.bodies) == 2


def test_a_refusal_has_no_text_and_usage_may_be_missing() -> None:
    refusal = Reply(200, {"choices": [{"message": {"role": "assistant", "content": None, "refusal": "no"}}]})
    with chat_server(lambda body, number: refusal) as server:
        chat, _ = chat_for(server.address)
        # 2 bytes are about 1 token, and 4 for the message.
        assert chat.ask([question("hi")]) == [ChatReply("", 5, 0)]


def test_log_probs_are_asked_for_and_read() -> None:
    top = [{"token": "A", "logprob": math.log(0.3)}, {"token": " A", "logprob": math.log(0.3)}]
    top += [{"token": "B", "logprob": math.log(0.2)}, {"token": "x", "logprob": math.log(0.2)}]
    content = [{"token": "\n", "logprob": 0.0, "top_logprobs": []}, {"token": "A", "logprob": 0.0, "top_logprobs": top}]

    def script(body: dict[str, Any], number: int) -> Reply:
        assert (body["logprobs"], body["top_logprobs"]) == (True, 20)
        return said("A", logprobs={"content": content})

    with chat_server(script) as server:
        chat, _ = chat_for(server.address, logprobs=True)
        (reply,) = chat.ask([question("q", choices=("A", "B", "C"))])
    assert server.bodies
    assert reply.choice_logprobs is not None
    # 0.3 + 0.3 for A and 0.2 for B, of 0.8; C was not among the likeliest.
    assert [math.exp(value) for value in reply.choice_logprobs] == pytest.approx([0.75, 0.25, 0.0])


@pytest.mark.parametrize("logprobs", [None, {}, {"content": None}, {"content": [{"token": "hm", "logprob": -1.0}]}])
def test_without_log_probs_of_a_choice_there_are_none(logprobs: Any) -> None:
    assert choice_logprobs(logprobs, ("A", "B")) is None


def test_a_cache_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"preferences\.annotator\.cache=.*file: replies cannot be kept there"):
        chat_for("http://127.0.0.1:9/v1", cache=str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "neither is set"),
        ({"model": "m", "address": "http://x"}, "both is set"),
        ({"address": "http://x"}, "needs model_name"),
        ({"address": "x:80", "model_name": "m"}, "starts with http"),
        ({"address": "http://me:pw@x/v1", "model_name": "m"}, "no user, password"),
        ({"address": "http://x/v1?key=1", "model_name": "m"}, "no user, password"),
        ({"model": "m", "model_name": "n"}, "model_name belongs to an address"),
        ({"model": "m", "max_cost": 1.0}, "max_cost needs input_price and output_price"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatModelConfig(**fields)


def test_a_failure_for_good_ends_what_waits_and_what_was_not_sent() -> None:
    """The second request waits for a minute to try again, and twenty more stand behind it."""

    def script(body: dict[str, Any], number: int) -> Reply:
        if body["messages"][0]["content"] == "slow":
            return Reply(503, b"busy", {"Retry-After": "60"})
        time.sleep(0.1 if number < 2 else 1)  # in which those behind it are called off
        return Reply(400, b"bad")

    with chat_server(script) as server:
        chat = make_chat(config_for(server.address, concurrency=2), "judge")
        start = time.monotonic()
        with pytest.raises(ChatError, match="status 400"):
            chat.ask([question("bad"), question("slow"), *(question(f"more {n}") for n in range(20))])
        assert time.monotonic() - start < 50
        assert len(server.bodies) <= 4
