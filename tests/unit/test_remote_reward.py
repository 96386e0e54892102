"""The remote reward: the numbers of the model in memory, order under concurrency, and servers that misbehave."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import rlhf
from rlhf.config import load_config
from rlhf.config.data import EmbeddedData
from rlhf.config.model import ModelConfig
from rlhf.config.rewards import ModelReward, RegexReward, RemoteReward, RewardConfig
from rlhf.errors import ConfigError
from rlhf.records import Message
from rlhf.rewards import checks, remote_client
from rlhf.rewards.build import build_rewards, folder_loader
from rlhf.rewards.protocol import RewardBatch, RewardError
from rlhf.rewards.remote import RemoteScorer
from rlhf.stages.ppo.loop import run
from tests.ppo_example import WORDS, ppo_config, ppo_context, write_models
from tests.reward_example import make_batch
from tests.serving_example import Running, scripted, serving

TEXTS = [" was " + " ".join(WORDS[(i + k) % len(WORDS)] for k in range(1 + i % 5)) for i in range(21)]
KEY = "ppo.rewards.away"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_client, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_models(tmp_path_factory.mktemp("models"))["reward_model"]


@pytest.fixture(scope="module")
def server(model: str) -> Iterator[Running]:
    with serving(f"reward.model={model}", "serve.max_request_rows=8") as running:
        yield running


def batch_of(texts: Sequence[str]) -> RewardBatch:
    prompts: list[Any] = ["the film"] * len(texts)
    prompts[0] = (Message("user", "the film"),)
    return make_batch(texts, prompts=prompts, columns={"source": list(range(len(texts)))})


def local(model: str, **config: Any) -> Any:
    load = folder_loader(None, ModelConfig(), dtype=torch.float32, device=torch.device("cpu"), policy_tokenizer=None)
    return lambda use: build_rewards({"away": ModelReward(path=model, **config)}, load_model=load, use_statistics=use)


def no_models(path: str | None, key: str) -> Any:
    raise AssertionError("a remote reward loads no model")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("use_statistics", [True, False])
@pytest.mark.parametrize(("batch_size", "concurrency"), [(64, 1), (2, 4)])
def test_remote_scores_are_those_of_the_model_in_memory(
    server: Running, model: str, normalize: bool, use_statistics: bool, batch_size: int, concurrency: int
) -> None:
    away = RemoteReward(
        address=server.address, normalize=normalize, weight=1.5, batch_size=batch_size, concurrency=concurrency
    )
    remote = build_rewards({"away": away}, load_model=no_models, use_statistics=use_statistics)
    before, batch = server.batcher.counts.requests, batch_of(TEXTS)
    found = remote.score(batch)
    expected = local(model, normalize=normalize, weight=1.5)(use_statistics).score(batch)
    assert torch.allclose(found.total, expected.total, atol=1e-6)
    # The raw scores, which the metrics show, too.
    assert torch.allclose(found.parts["away"], expected.parts["away"], atol=1e-6)
    assert len(set(found.total.tolist())) > 10
    # The server takes 8 rows at once, whatever the client would like to send.
    assert server.batcher.counts.requests - before == math.ceil(21 / min(batch_size, 8))


def test_ppo_learns_the_same_from_a_rule_here_and_behind_a_server(tmp_path: Path) -> None:
    inputs, rule = write_models(tmp_path), RegexReward(pattern="(?s).{6}")

    def train(name: str, reward: RewardConfig) -> list[dict[str, Any]]:
        run(ppo_context(ppo_config(num_updates=1, rewards={"r": reward}), tmp_path / name, inputs))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        return [{key: value for key, value in step.items() if key.startswith("ppo/")} for step in steps]

    here = train("here", rule)
    with serving('reward={type: regex, pattern: "(?s).{6}"}') as running:
        there = train("there", RemoteReward(address=running.address, batch_size=3))
        assert running.batcher.counts.responses == 8
    assert here == there
    assert here[0]["ppo/reward/r"] > 0


def test_a_weighted_set_is_normalised_by_the_server(model: str) -> None:
    rewards = (
        f"rewards={{a: {{type: model, path: {model}}}, b: {{type: length, unit: words, maximum: 2, tolerance: 4}}}}"
    )
    batch = batch_of(TEXTS[:5])
    with serving(rewards) as running:
        config = RemoteReward(address=running.address)
        found = build_rewards({"away": config}, load_model=no_models).score(batch).total
        raw = build_rewards({"away": config}, load_model=no_models, use_statistics=False).score(batch).total
    expected = local(model)(True).score(batch).total
    excess = torch.tensor([max(len(text.split()) - 2, 0) / 4 for text in TEXTS[:5]])
    assert torch.allclose(found, expected - excess.clamp(max=1), atol=1e-6)
    assert torch.allclose(raw, local(model)(False).score(batch).total - excess.clamp(max=1), atol=1e-6)


def test_columns_that_the_server_wants_are_sent() -> None:
    with serving("reward={type: math}") as running:
        config = RemoteReward(address=running.address)
        scorer = RemoteScorer.connect(config, KEY)
        assert scorer.columns == ("answer",)
        assert scorer.may_abstain
        batch = make_batch(["4", "4", "4"], columns={"answer": ["4", "5", None], "other": [object()] * 3})
        scores = scorer.score(batch)
        assert scores[:2].tolist() == [1.0, 0.0]
        assert bool(scores[2].isnan())
        with pytest.raises(ConfigError, match="needs the column answer, which the data lacks; its columns are: other"):
            checks.check_columns({"away": config}, ["other"])
        with pytest.raises(RewardError, match=r"status 422: .*which the data does not have"):
            scorer.score(make_batch(["4"]))


def test_the_token_comes_from_the_environment(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(f"reward.model={model}", token="open sesame") as running:
        with pytest.raises(ConfigError, match=rf"asks for a token.*{KEY}\.token_variable"):
            RemoteScorer.connect(RemoteReward(address=running.address), KEY)
        config = RemoteReward(address=running.address, token_variable="REWARD_TOKEN")
        with pytest.raises(ConfigError, match=rf"{KEY}\.token_variable=REWARD_TOKEN: there is no such"):
            RemoteScorer.connect(config, KEY)
        monkeypatch.setenv("REWARD_TOKEN", "wrong")
        with pytest.raises(ConfigError, match="refuses the token of REWARD_TOKEN"):
            RemoteScorer.connect(config, KEY)
        monkeypatch.setenv("REWARD_TOKEN", "open sesame")
        assert RemoteScorer.connect(config, KEY).score(batch_of(["good"])).shape == (1,)


def test_the_fingerprint_is_of_what_is_served_not_of_where(server: Running, model: str) -> None:
    def hashed(address: str, **config: Any) -> str:
        return checks.content_hash({"away": RemoteReward(address=address, **config)})

    same = hashed(server.address)
    assert hashed(server.address, timeout_seconds=3.0, batch_size=2, num_retries=1, concurrency=1) == same
    assert hashed(server.address, normalize=False) != same
    assert hashed(server.address, weight=2.0) != same
    with serving(f"reward.model={model}", "serve.max_request_rows=8") as twin:
        assert hashed(twin.address) == same
    with serving("reward={type: math}") as other:
        assert hashed(other.address) != same
    with pytest.raises(ConfigError, match=r"cannot be reached.*is `rlhf serve` running there\?"):
        hashed(twin.address, num_retries=0)


# --- servers that misbehave -------------------------------------------------------------------------------------------

INFO: dict[str, Any] = {
    "service": "rlhf-reward",
    "protocol": 1,
    "version": rlhf.__version__,
    "hash": "a" * 64,
    "may_abstain": False,
    "statistics": None,
    "columns": [],
    "limits": {"max_request_rows": 100},
}
MODEL = {"hash": "a" * 64}


def script(*answers: tuple[int, Any], info: Any = INFO) -> Callable[[str, dict[str, Any], int], tuple[int, Any]]:
    """`/info` always; each `/score` the next of `answers`, the last for ever."""
    left = list(answers)
    return lambda path, task, number: (200, info) if path == "/info" else left.pop(0) if len(left) > 1 else left[0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {"scores": [1.0], "model": MODEL}), "gave 1 scores for 2 responses"),
        ((200, {"model": MODEL}), "gave no list of scores for 2 responses"),
        ((200, '{"scores": [1.0, NaN], "model": {"hash": "%s"}}' % ("a" * 64)), "gave nan as the score of response 1"),
        ((200, {"scores": [1.0, "2"], "model": MODEL}), "gave '2' as the score of response 1"),
        ((200, {"scores": [1.0, None], "model": MODEL}), "reward away gave nan for the response"),
        ((200, {"scores": [1.0, 2.0], "model": {"hash": "b" * 64}}), "serves another reward than when this run began"),
        ((200, "<html>"), "gave an answer that is no JSON"),
        ((404, "nothing"), r"has no /score \(status 404\)"),
        ((302, ""), r"has no /score \(status 302\)"),
        ((422, {"error": "row 1: too long"}), "status 422: row 1: too long"),
        ((500, {"error": "scoring failed"}), "status 500: scoring failed"),
        ((503, {"error": "full"}), rf"status 503: full \(3 tries, {KEY}\.num_retries\)"),
    ],
)
def test_wrong_answers_are_errors_that_name_the_server(answer: tuple[int, Any], message: str) -> None:
    with scripted(script(answer)) as address:
        rewards = build_rewards({"away": RemoteReward(address=address, num_retries=2)}, load_model=no_models)
        with pytest.raises(RewardError, match=message) as caught:
            rewards.score(make_batch(["a", "b"]))
        if "reward away gave" not in message:
            assert f"{KEY}.address={address}" in str(caught.value)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"hello": 1}, "is no server of `rlhf serve`"),
        ([1], "no JSON object"),
        ({**INFO, "protocol": 2, "version": "9"}, r"speaks protocol 2 \(rlhf 9\), and this is protocol 1"),
        ({**INFO, "limits": {}}, r"/info that cannot be read \(KeyError"),
    ],
)
def test_what_is_no_server_of_ours_is_known_before_anything_runs(info: Any, message: str) -> None:
    with scripted(script((200, {}), info=info)) as address:
        config = RemoteReward(address=address)
        with pytest.raises(ConfigError, match=message):
            checks.preflight({"away": config}, EmbeddedData())
        with pytest.raises(ConfigError, match=message):
            RemoteScorer.connect(config, KEY)


def test_what_passes_is_tried_again() -> None:
    good = (200, {"scores": [1.0, 2.0], "model": MODEL})
    with scripted(script((503, {"error": "full"}), (502, "proxy"), good)) as address:
        config = RemoteReward(address=address, num_retries=2)
        assert RemoteScorer.connect(config, KEY).score(make_batch(["a", "b"])).tolist() == [1.0, 2.0]


def test_a_silent_server_is_given_up_in_time() -> None:
    over = threading.Event()

    def silent(path: str, task: dict[str, Any], number: int) -> tuple[int, Any]:
        if path != "/info":
            over.wait(120)
        return 200, INFO

    with scripted(silent) as address:
        scorer = RemoteScorer.connect(RemoteReward(address=address, timeout_seconds=1.0, num_retries=1), KEY)
        start = time.monotonic()
        try:
            with pytest.raises(RewardError, match=rf"did not answer within 1 s; {KEY}\.timeout_seconds is the limit"):
                scorer.score(make_batch(["a"]))
            assert time.monotonic() - start < 60
        finally:
            over.set()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:8010", "must look like http://HOST:PORT"),
        ("ftp://a", "must look like http://HOST:PORT"),
        ("http://a:99999", "(?i)port"),
        ("http://me:secret@a", "must not hold a password"),
    ],
)
def test_an_address_is_checked_in_the_config(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([f"ppo.rewards={{away: {{type: remote, address: '{address}'}}}}"])
