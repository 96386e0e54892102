"""The reward server: scores of the model whatever the batch, several clients in one pass, limits, stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from rlhf.config import load_config
from rlhf.config.model import ModelConfig
from rlhf.config.rewards import LengthReward, MathReward, ModelReward
from rlhf.errors import ConfigError
from rlhf.listening import listen
from rlhf.rewards.learned import LearnedReward
from rlhf.serving.command import check, served_hash, served_keys
from rlhf.serving.requests import ScoreRequest
from rlhf.serving.scoring import learned_rewards
from tests.command import command, environment
from tests.ppo_example import WORDS, write_models
from tests.reward_example import write_rewards
from tests.serving_example import Running, serving, wait_until

TEXTS = [" was " + " ".join(WORDS[(i + k) % len(WORDS)] for k in range(1 + 5 * (i % 7))) for i in range(40)]
PROMPTS = ["the film" + " the book" * (i % 4) for i in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_models(tmp_path_factory.mktemp("models"))["reward_model"]


@pytest.fixture(scope="module")
def server(model: str) -> Iterator[Running]:
    with serving(f"reward.model={model}", "serve.max_batch_size=16", "serve.max_request_rows=50") as running:
        yield running


@pytest.fixture(scope="module")
def expected(model: str) -> list[float]:
    """Each text alone through the model."""
    learned = LearnedReward.load(
        model, ModelConfig(), dtype=torch.float32, device=torch.device("cpu"), policy_tokenizer=None
    )
    return learned.score_texts(PROMPTS, TEXTS, batch_size=1)


def post(running: Running, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return httpx.post(f"{running.address}/score", content=content, headers=given, timeout=60)


def ask(running: Running, rows: slice, **more: Any) -> list[float]:
    body = {"prompts": PROMPTS[rows], "responses": TEXTS[rows], "normalized": False, **more}
    answer = post(running, body)
    assert answer.status_code == 200, answer.text
    scores: list[float] = answer.json()["scores"]
    return scores


def test_scores_do_not_depend_on_the_batch(server: Running, expected: list[float]) -> None:
    assert len({round(score, 3) for score in expected}) > 10
    whole = ask(server, slice(0, 40))  # three passes of at most 16
    assert whole == pytest.approx(expected, abs=1e-5)
    assert ask(server, slice(3, 4)) == pytest.approx(expected[3:4], abs=1e-5)
    # write_models stores mean 0.5 and standard deviation 2; normalised is the default.
    body = {"prompts": PROMPTS[:5], "responses": TEXTS[:5]}
    normalized = post(server, body).json()["scores"]
    assert normalized == pytest.approx([(score - 0.5) / 2 for score in expected[:5]], abs=1e-5)


def test_clients_at_once_share_passes_and_keep_their_rows(model: str, expected: list[float]) -> None:
    with serving(f"reward.model={model}", "serve.max_batch_size=40", "serve.max_wait_ms=500") as running:
        with ThreadPoolExecutor(10) as clients:
            found = list(clients.map(lambda n: ask(running, slice(4 * n, 4 * n + 4)), range(10)))
        assert [score for piece in found for score in piece] == pytest.approx(expected, abs=1e-5)
        # 40 rows fill one pass; requests that came before the others did may have had one of their own.
        assert running.batcher.counts.passes <= 5
        assert (running.batcher.counts.requests, running.batcher.counts.responses) == (10, 40)
        served = httpx.get(f"{running.address}/info").json()["served"]
        assert served["responses"] == 40


def test_one_clients_mistake_is_not_the_others(tmp_path: Path) -> None:
    source = (
        "import sys\ndef reward(prompts, completions, **columns):\n"
        "    return [sys.exit() if text == 'leave' else 1 / (len(text) - 3) for text in completions]\n"
    )
    path = write_rewards(tmp_path, source)
    arguments = [f"reward={{type: function, file: {path}}}", "serve.max_wait_ms=300"]
    with serving(*arguments) as running, ThreadPoolExecutor(4) as clients:
        texts = ["good", "bad", "great", "leave"]
        answers = list(clients.map(lambda text: post(running, {"prompts": ["p"], "responses": [text]}), texts))
        assert post(running, {"prompts": ["p"], "responses": ["fine"]}).json()["scores"] == [1.0]  # it goes on
    assert [answer.status_code for answer in answers] == [200, 422, 200, 500]
    assert [answers[0].json()["scores"], answers[2].json()["scores"]] == [[1.0], [0.5]]
    assert "ZeroDivisionError" in answers[1].json()["error"]


def test_requests_with_other_columns_are_scored_apart(tmp_path: Path) -> None:
    source = (
        "def reward(prompts, completions, bonus=None):\n    return [0.0 if bonus is None else 1.0 for _ in prompts]\n"
    )
    arguments = ["reward.type=function", f"reward.file={write_rewards(tmp_path, source)}", "serve.max_wait_ms=300"]
    asked = [ScoreRequest(["p"], ["r"], columns, True) for columns in ({}, {"bonus": [2]}, {"bonus": [3]})]
    with serving(*arguments) as running:
        futures = [running.batcher.submit(request) for request in asked]
        assert [future.result(timeout=30) for future in futures] == [[0.0], [1.0], [1.0]]
        assert running.batcher.counts.passes == 2


def test_rules_and_weighted_sets_are_served_with_columns() -> None:
    rewards = "rewards={right: {type: math, correct: 3}, short: {type: length, unit: words, maximum: 2, tolerance: 2}}"
    with serving(rewards, "rewards.short.weight=2.0") as running:
        info = httpx.get(f"{running.address}/info").json()
        assert info["columns"] == ["answer"]
        assert info["may_abstain"]
        assert info["statistics"] is None
        body = {"prompts": ["p"] * 3, "responses": ["4", "it is 5", "a b c d"], "columns": {"answer": ["4", "4", None]}}
        # 3 + 0; 0 + 2 * -0.5; the length alone: 2 * -1.
        assert post(running, body).json()["scores"] == [3.0, -1.0, -2.0]
        missing = post(running, {**body, "columns": {}})
        assert missing.status_code == 422
        assert "which the data does not have" in missing.json()["error"]
    with serving("reward={type: exact_answer}") as running:
        body = {"prompts": ["p"] * 2, "responses": ["4", "4"], "columns": {"answer": [4, None]}}
        assert post(running, body).json()["scores"] == [1.0, None]


@pytest.mark.parametrize(
    ("body", "status", "message", "row"),
    [
        (b"{", 400, "not valid JSON", None),
        (b"[" * 100_000, 400, "nested too deeply", None),
        (b'{"prompts": ["a"], "responses": ["b"], "columns": {"x": [NaN]}}', 400, "NaN is no JSON value", None),
        ([], 422, "expected a JSON object", None),
        ({"prompts": ["a"]}, 422, "responses is missing", None),
        ({"prompts": ["a"], "responses": "b"}, 422, "responses is a list, not a text", None),
        ({"prompts": ["a"], "responses": []}, 422, "1 prompts, but 0 responses", None),
        ({"prompts": [], "responses": []}, 422, "nothing to score", None),
        ({"prompts": ["a", "b"], "responses": ["b", 7]}, 422, "row 1: a response is a text, not a number", 1),
        ({"prompts": ["a", 7], "responses": ["b", "c"]}, 422, "row 1: a prompt is a string or a list", 1),
        ({"prompts": [[]], "responses": ["b"]}, 422, "row 0: the conversation has no message", 0),
        ({"prompts": [[{"role": "x"}]], "responses": ["b"]}, 422, "row 0: a message has a role", 0),
        ({"prompts": ["a"], "responses": ["\ud800"]}, 422, "row 0: the response holds half of a surrogate", 0),
        ({"prompts": ["a", "a"], "responses": ["b", "good " * 300]}, 422, "and the model reads at most 128", 1),
        ({"prompts": ["a"], "responses": ["b"], "columns": {"x": [1, 2]}}, 422, "columns.x has 2 values for 1", None),
        ({"prompts": ["a"], "responses": ["b"], "columns": [1]}, 422, "columns is an object of lists", None),
        ({"prompts": ["a"], "responses": ["b"], "normalized": 1}, 422, "normalized is true or false", None),
        ({"prompts": ["a"], "responses": ["b"], "batch": 1}, 422, "unknown key 'batch'", None),
        ({"prompts": ["a"] * 51, "responses": ["b"] * 51}, 413, "serve.max_request_rows is 50", None),
    ],
)
def test_mistakes_get_a_status_and_the_row(
    server: Running, body: Any, status: int, message: str, row: int | None
) -> None:
    answer = post(server, body)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]
    assert answer.json().get("row") == row
    assert ask(server, slice(0, 1))  # it goes on


def test_conversations_are_scored_where_the_model_has_a_template(server: Running) -> None:
    body = {"prompts": [[{"role": "user", "content": "the film"}]], "responses": ["was good"]}
    assert post(server, body).status_code == 200
    tokenizer = next(learned_rewards(server.served.rewards)).tokenizer
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        answer = post(server, body)
    finally:
        tokenizer.chat_template = template
    assert (answer.status_code, answer.json()["row"]) == (422, 0)
    assert "no chat template" in answer.json()["error"]


def test_what_is_no_score_request(server: Running) -> None:
    assert post(server, b"x", Content_Type="text/plain").status_code == 415
    assert httpx.get(f"{server.address}/score").status_code == 405
    missing = httpx.get(f"{server.address}/docs")
    assert missing.status_code == 404
    assert "there are POST /score, GET /info, GET /health" in missing.json()["error"]
    assert httpx.get(f"{server.address}/health").json() == {"status": "ok", "waiting": 0}
    info = httpx.get(f"{server.address}/info").json()
    assert info["limits"] == {
        "max_request_rows": 50,
        "max_body_bytes": 16 * 2**20,
        "max_batch_size": 16,
        "max_tokens": 128,
    }
    assert info["statistics"] == {"mean": 0.5, "std": 2.0}
    assert len(info["hash"]) == 64


def test_limits_of_size_token_and_waiting(tmp_path: Path) -> None:
    source = (
        "import time\ndef reward(prompts, completions, **columns):\n"
        "    time.sleep(0.3)\n    return [0.0] * len(completions)\n"
    )
    reward = f"reward={{type: function, file: {write_rewards(tmp_path, source)}}}"
    limits = ["serve.max_body_mib=0.01", "serve.max_waiting_rows=3", "serve.max_wait_ms=0"]
    with serving(reward, *limits, token="secret") as running:
        body = {"prompts": ["a", "b"], "responses": ["c", "d"]}
        for headers in (
            {},
            {"Authorization": "Bearer secrets"},
            {"Authorization": "Basic secret"},
            {"Host": "a/health?"},
        ):
            answer = post(running, body, **headers)
            assert (answer.status_code, answer.json()) == (401, {"error": "wrong or missing token"})
            assert httpx.get(f"{running.address}/info", headers=headers).status_code == 401
        known = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{running.address}/health").status_code == 200
        assert post(running, b" " * 20_000, **known).status_code == 413

        def pieces() -> Iterator[bytes]:
            for _ in range(20):
                yield b" " * 1000

        url, kind = f"{running.address}/score", {**known, "Content-Type": "application/json"}
        assert httpx.post(url, content=pieces(), headers=kind).status_code == 413
        with ThreadPoolExecutor(6) as clients:
            statuses = list(clients.map(lambda _: post(running, body, **known), range(6)))
        refused = [answer for answer in statuses if answer.status_code == 503]
        # One is being scored and one waits; what comes meanwhile is told to come again.
        assert 0 < len(refused) < 6
        assert refused[0].headers["Retry-After"] == "1"
        assert "serve.max_waiting_rows=3" in refused[0].json()["error"]


def test_short_forms_of_the_command_line() -> None:
    assert served_keys(["reward.model=x", "--reward.weight=2", "a.b=c", "rewards={}", "reward={type: math}"]) == [
        "serve.rewards.reward.type=model",
        "serve.rewards.reward.path=x",
        "--serve.rewards.reward.weight=2",
        "a.b=c",
        "serve.rewards={}",
        "serve.rewards.reward={type: math}",
    ]
    config = load_config(served_keys(["reward.model=some/model", "reward.normalize=false"])).config.serve
    assert config.rewards == {"reward": ModelReward(path="some/model", normalize=False)}
    both = load_config(served_keys(["reward.type=math", "rewards.b={type: length, unit: words}"])).config.serve
    assert both.rewards == {"reward": MathReward(), "b": LengthReward(unit="words")}


def test_what_cannot_be_served(tmp_path: Path) -> None:
    def problem(*arguments: str) -> str:
        with pytest.raises(ConfigError) as caught:
            check(load_config(served_keys(arguments)).config.serve)
        return str(caught.value)

    assert "needs something to serve: reward.model=FOLDER_OR_HUB_ID" in problem()
    assert "serve.rewards.reward.path" in problem(f"reward.model={tmp_path / 'nothing'}")
    assert "the server belongs to no run" in problem("reward.type=model")
    assert "serve.rewards.reward.unit=tokens: the server is given texts" in problem("reward.type=length")
    path = write_rewards(tmp_path, "def reward(prompts, completions, completion_ids):\n    return []\n")
    assert "asks for completion_ids" in problem("reward.type=function", f"reward.file={path}")
    assert "serve.rewards.reward.file" in problem("reward.type=function", "reward.file=nowhere.py")


def test_the_hash_is_of_what_decides_the_scores(model: str, tmp_path: Path) -> None:
    def hashed(*arguments: str, precision: str = "fp32") -> str:
        return served_hash(load_config(served_keys(arguments)).config, precision)

    same = hashed(f"reward.model={model}")
    assert hashed(f"reward.model={model}", "serve.max_batch_size=3", "seed=4") == same
    assert hashed(f"reward.model={model}", "reward.weight=2") != same
    assert hashed(f"reward.model={model}", precision="bf16") != same
    template, with_template = tmp_path / "chat.jinja", f"model.chat_template={tmp_path / 'chat.jinja'}"
    templates = []
    for text in ("{{ messages }}", "{{ messages }}.", "{{ messages }}"):
        template.write_text(text)
        templates.append(hashed(f"reward.model={model}", with_template))
    assert templates[0] == templates[2] != templates[1] != same
    other = write_models(tmp_path, score_scale=3.0)["reward_model"]
    assert hashed(f"reward.model={other}") != same


def test_a_port_that_is_taken_is_named(server: Running) -> None:
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"serve.port={port} is taken on 127"):
        listen("127.0.0.1", port, "serve.")
    with pytest.raises(ConfigError, match=r"serve\.host=no\.such\.host\.invalid is no address"):
        listen("no.such.host.invalid", 0, "serve.")


def test_a_stop_answers_what_was_asked(tmp_path: Path) -> None:
    """The command itself: the line for programs, a request under way when the signal comes, the exit code."""
    source = (
        "import pathlib, time\ndef reward(prompts, completions, mark, **columns):\n"
        "    pathlib.Path(mark).touch()\n    time.sleep(0.7)\n    return [7.0] * len(completions)\n"
    )
    reward = {"type": "function", "file": write_rewards(tmp_path, source), "arguments": {"mark": str(tmp_path / "m")}}
    process = subprocess.Popen(
        command("serve", f"reward={json.dumps(reward)}", "serve.port=0", "--json"),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert (ready["event"], ready["process"], ready["service"]) == ("ready", process.pid, "rlhf-reward")
        assert ready["address"].startswith("http://127.0.0.1:")
        with ThreadPoolExecutor(1) as client:
            body = {"prompts": ["a"], "responses": ["b"]}
            answer = client.submit(httpx.post, f"{ready['address']}/score", json=body, timeout=30)
            wait_until((tmp_path / "m").exists)
            os.kill(process.pid, signal.SIGTERM)
            assert answer.result().json()["scores"] == [7.0]
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 143
        assert "rlhf serve: stopped by SIGTERM; requests under way were answered" in errors
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.communicate()
