"""A language model as a reward: ratings and comparisons by log-probs and by words, costs, mistakes, and PPO's sum."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.data import DataConfig, EmbeddedData, FileData
from rlhf.config.rewards import JudgeReward
from rlhf.errors import ConfigError
from rlhf.rewards.build import LoadedModel, build_rewards
from rlhf.rewards.checks import check_columns, content_hash, preflight
from rlhf.rewards.composition import RewardSet
from rlhf.rewards.protocol import RewardError
from tests.chat_server import Reply, chat_server, said
from tests.reward_example import make_batch
from tests.unit.test_annotators_judge import BLOCK
from tests.unit.test_chat_local import save_model


def no_model(path: str | None, key: str) -> LoadedModel:
    raise AssertionError(f"{key} is no reward model")


def rewards_for(address: str, **fields: Any) -> RewardSet:
    config = JudgeReward(**({"address": address, "model_name": "m", "cache": None} | fields))
    return build_rewards({"judge": config}, load_model=no_model)


def scores(rewards: RewardSet, responses: list[str], columns: dict[str, list[Any]] | None = None) -> list[float]:
    values: list[float] = rewards.score(make_batch(responses, columns=columns)).parts["judge"].tolist()
    return values


def test_a_rating_by_words_is_the_number(capsys: pytest.CaptureFixture[str]) -> None:
    def script(body: dict[str, Any], number: int) -> Reply:
        text = body["messages"][0]["content"]
        assert "from 1 (worst) to 7 (best)" in text
        assert "logprobs" not in body
        return said("Because. Rating: 6" if "<response>\ngood\n</response>" in text else "Rating: 2.5")

    with chat_server(script) as server:
        rewards = rewards_for(server.address, logprobs=False, scale=7, weight=2.0)
        result = rewards.score(make_batch(["good", "bad"]))
        assert result.parts["judge"].tolist() == [6.0, 2.5]
        assert result.total.tolist() == [12.0, 5.0]
        rewards.score(make_batch(["good"]))
    # What it costs is said once, before the first request.
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.match(r"reward judge, the first 2 responses: 2 requests; about", lines[0])


def test_a_rating_by_log_probs_is_the_mean() -> None:
    top = [{"token": "1", "logprob": math.log(0.1)}, {"token": "5", "logprob": math.log(0.4)}]

    def script(body: dict[str, Any], number: int) -> Reply:
        return said("5", logprobs={"content": [{"token": "5", "logprob": 0.0, "top_logprobs": top}]})

    with chat_server(script) as server:
        assert scores(rewards_for(server.address), ["x"]) == pytest.approx([(0.1 * 1 + 0.4 * 5) / 0.5])


def test_without_log_probs_the_number_is_read() -> None:
    with chat_server(lambda body, number: said("4")) as server:
        assert scores(rewards_for(server.address), ["x"]) == [4.0]


def test_a_comparison_is_the_mean_of_both_orders() -> None:
    """By words: right, wrong, a judge who always takes the first, a tie in one order; and a row without a reference."""

    def script(body: dict[str, Any], number: int) -> Reply:
        letters = dict(BLOCK.findall(body["messages"][0]["content"]))
        if "biased" in letters.values():
            return said("Verdict: A")
        if letters["A"] == "half":
            return said("Verdict: C")
        wanted = "good" if "good" in letters.values() else "reference" if "bad" in letters.values() else "half"
        return said(f"Verdict: {next(letter for letter, text in letters.items() if text == wanted)}")

    columns = {"reference": ["reference"] * 4 + [None]}
    with chat_server(script) as server:
        config = JudgeReward(
            address=server.address, model_name="m", cache=None, logprobs=False, reference_column="reference"
        )
        (entry,) = build_rewards({"judge": config}, load_model=no_model).rewards
        batch = make_batch(["good", "bad", "biased", "half", "good"], columns=columns)
        values = entry.reward.score(batch).tolist()
        assert values[:4] == [1.0, 0.0, 0.5, 0.75]
        assert math.isnan(values[4])
        assert len(server.bodies) == 8
        once = rewards_for(server.address, logprobs=False, reference_column="reference", both_orders=False)
        assert scores(once, ["biased"], {"reference": ["reference"]}) == [1.0]


def test_a_comparison_by_log_probs_counts_ties_half() -> None:
    shares = {"A": 0.5, "B": 0.3, "C": 0.2}
    top = [{"token": token, "logprob": math.log(share)} for token, share in shares.items()]

    def script(body: dict[str, Any], number: int) -> Reply:
        return said("A", logprobs={"content": [{"token": "A", "logprob": 0.0, "top_logprobs": top}]})

    with chat_server(script) as server:
        rewards = rewards_for(server.address, reference_column="r")
        # 0.5 + 0.1 as the first, 1 - 0.6 as the second.
        assert scores(rewards, ["x"], {"r": ["y"]}) == pytest.approx([(0.6 + 0.4) / 2])
        once = rewards_for(server.address, reference_column="r", both_orders=False)
        assert scores(once, ["x"], {"r": ["y"]}) == pytest.approx([0.6])


def test_what_cannot_be_read_scores_what_the_config_says() -> None:
    with chat_server(lambda body, number: said("I cannot say.")) as server:
        assert scores(rewards_for(server.address, unreadable=-1.5), ["x"]) == [-1.5]
        with pytest.raises(RewardError, match="none of the rewards judge applies to the response 'x'"):
            scores(rewards_for(server.address), ["x"])


def test_a_cost_over_the_limit_sends_nothing() -> None:
    with chat_server(lambda body, number: said("4")) as server:
        rewards = rewards_for(server.address, input_price=1.0, output_price=1.0, max_cost=1e-6)
        with pytest.raises(ConfigError, match=r"ppo\.rewards\.judge\.max_cost=1e-06: 2 requests"):
            scores(rewards, ["x", "y"])
        assert server.bodies == []


def test_replies_are_kept(tmp_path: Path) -> None:
    with chat_server(lambda body, number: said("4")) as server:
        for _ in range(2):
            assert scores(rewards_for(server.address, cache=str(tmp_path)), ["x", "y", "x"]) == [4.0, 4.0, 4.0]
        assert len(server.bodies) == 2


def test_a_local_model_gives_the_mean_of_its_ratings(tmp_path: Path) -> None:
    path = str(save_model(tmp_path, max_positions=1024))
    config = JudgeReward(model=path, cache=None, scale=3)
    rewards = build_rewards({"judge": config}, load_model=no_model)
    values = scores(rewards, ["the film is good", "bad"])
    assert all(1.0 < value < 3.0 for value in values)
    assert values[0] != values[1]
    # Scored alone or together: what stands beside a response changes nothing but rounding.
    assert scores(rewards, ["bad"]) == pytest.approx(values[1:], abs=1e-4)
    batch = make_batch(["x"])
    assert rewards.score(batch).total.dtype == torch.float32


def test_mistakes_are_found_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    there: dict[str, Any] = {"address": "http://x/v1", "model_name": "m"}
    files = FileData(path=str(tmp_path))
    template = tmp_path / "question.txt"
    template.write_text("{prompt} {response}")
    cases: list[tuple[dict[str, Any], DataConfig, str]] = [
        ({"model": str(tmp_path / "none")}, files, r"ppo\.rewards\.j\.model"),
        (there | {"api_key_variable": "NO_SUCH_KEY"}, files, r"ppo\.rewards\.j\.api_key_variable=NO_SUCH_KEY"),
        (there | {"template": str(tmp_path / "none")}, files, r"ppo\.rewards\.j\.template="),
        (there | {"template": str(template), "reference_column": "r"}, files, r"lacks \{first\}"),
        (there | {"reference_column": "r"}, EmbeddedData(), r"reference_column=r: data\.type=embedded has no columns"),
    ]
    for fields, data, message in cases:
        with pytest.raises(ConfigError, match=message):
            preflight({"j": JudgeReward(**fields)}, data)
    preflight({"j": JudgeReward(**there, template=str(template))}, files)
    with pytest.raises(ConfigError, match=r"reference_column=r needs the column r, which the data lacks"):
        check_columns({"j": JudgeReward(**there, reference_column="r")}, ["other"])
    with pytest.raises(RewardError, match="compares with the column r, which the data does not have"):
        scores(rewards_for("http://127.0.0.1:9/v1", reference_column="r"), ["x"], {"other": ["y"]})


def test_a_fingerprint_knows_what_decides_scores(tmp_path: Path) -> None:
    template = tmp_path / "question.txt"
    template.write_text("{prompt} {response}")

    def fingerprint(**fields: Any) -> str:
        return content_hash({"j": JudgeReward(address="http://x/v1", model_name="m", template=str(template), **fields)})

    base = fingerprint()
    assert fingerprint(concurrency=1, cache=None, timeout_seconds=1.0) == base
    assert len({base, fingerprint(scale=7), fingerprint(logprobs=False), fingerprint(weight=2.0)}) == 4
    template.write_text("{prompt} {response}!")
    assert fingerprint() != base


@pytest.mark.parametrize(("fields", "message"), [({"scale": 1}, "scale"), ({}, "neither is set")])
def test_settings_that_mean_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JudgeReward(**fields)
