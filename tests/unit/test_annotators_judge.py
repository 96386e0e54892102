"""The language-model judge: both orders, ties, abstentions, bias, comments, cost, a kill in the middle; and local."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.chat.address import OpenAIChat
from rlhf.chat.protocol import ChatError
from rlhf.config.annotators import JudgeAnnotator
from rlhf.errors import ConfigError
from rlhf.preferences.annotators import AnnotatorResources, Given, ShownResponse, ShownTask, make_annotators
from rlhf.preferences.annotators.judge import LanguageModelJudge
from rlhf.preferences.labelling import label_tasks
from rlhf.preferences.store import (
    BothBad,
    Choice,
    PreferenceStore,
    Ranking,
    Rating,
    Response,
    TaskKind,
    TaskPlan,
    Tie,
)
from rlhf.records import Prompt
from tests.chat_server import Reply, Script, chat_server, said
from tests.unit.test_chat_local import save_model

BLOCK = re.compile(r"<response ([A-I])>\n(.*?)\n</response", re.DOTALL)


def task(*texts: str, kind: TaskKind = "pairwise", scale: int | None = None, key: str = "k") -> ShownTask:
    responses = tuple(ShownResponse(f"id of {text}", text, index) for index, text in enumerate(texts))
    return ShownTask(key, kind, Prompt(f"prompt {key}"), responses, key, scale)


def judge_for(address: str, **fields: Any) -> LanguageModelJudge:
    config = JudgeAnnotator(**({"address": address, "model_name": "m", "cache": None, "num_retries": 1} | fields))
    (judge,) = make_annotators(config, AnnotatorResources(seed=1)).members
    assert isinstance(judge, LanguageModelJudge)
    assert isinstance(judge.chat.model, OpenAIChat)
    judge.chat.model.pause = lambda seconds: None
    return judge


def by_text(verdict: Callable[[dict[str, str]], str]) -> Script:
    """A judge who sees the letters with their texts and says something."""

    def script(body: dict[str, Any], number: int) -> Reply:
        return said(verdict(dict(BLOCK.findall(body["messages"][0]["content"]))))

    return script


def prefers(wanted: str) -> Script:
    """A judge without a bias, who knows what is good."""

    def verdict(letters: dict[str, str]) -> str:
        return "Some reasons. Verdict: " + next(letter for letter, text in letters.items() if text == wanted)

    return by_text(verdict)


def answers(script: Script, *tasks: ShownTask, **fields: Any) -> tuple[list[Given], dict[str, Any]]:
    with chat_server(script) as server:
        judge = judge_for(server.address, **fields)
        return judge.answer(tasks), judge.figures()


def test_both_orders_are_asked_and_agree() -> None:
    given, figures = answers(prefers("good"), task("good", "bad"), task("bad", "good", key="l"))
    assert [one.answer for one in given] == [Choice("id of good")] * 2
    assert given[0].comment == "Some reasons. Verdict: A\n---\nSome reasons. Verdict: B"
    assert (figures["requests"], figures["pairs"], figures["orders_disagreed"]) == (4, 2, 0)
    # Without a bias the first one is taken half of the time.
    assert (figures["choices"], figures["took_first"], figures["first_share"]["value"]) == (4, 2, 0.5)


def test_orders_that_disagree_are_a_tie_and_show_the_bias() -> None:
    tasks = [task("good", "bad", key=str(number)) for number in range(10)]
    given, figures = answers(by_text(lambda letters: "Verdict: A"), *tasks)
    assert {one.answer for one in given} == {Tie()}
    assert (figures["orders_disagreed"], figures["took_first"], figures["choices"]) == (10, 20, 20)
    share = figures["first_share"]
    # Wilson's interval of 20 of 20: from 20 / (20 + 1.96 ** 2) to 1.
    assert share["value"] == 1.0
    assert share["low"] == pytest.approx(20 / (20 + 1.959964**2), abs=1e-6)


def test_one_order_is_enough_where_the_config_says_so() -> None:
    given, figures = answers(by_text(lambda letters: "Verdict: A"), task("good", "bad"), both_orders=False)
    assert given[0].answer == Choice("id of good")
    assert figures["requests"] == 1


def test_a_tie_in_both_orders_and_in_one() -> None:
    given, _ = answers(by_text(lambda letters: "Verdict: C"), task("a", "b"))
    assert given[0].answer == Tie()
    given, figures = answers(
        by_text(lambda letters: "Verdict: C" if letters["A"] == "a" else "Verdict: B"), task("a", "b")
    )
    assert given[0].answer == Tie()
    assert figures["orders_disagreed"] == 1
    assert BothBad() not in [one.answer for one in given]


@pytest.mark.parametrize("text", ["I cannot help with that.", "", "{'json': broken"])
def test_what_cannot_be_read_is_an_abstention(text: str) -> None:
    def verdict(letters: dict[str, str]) -> str:
        return text if letters["A"] == "odd" else "Verdict: A"

    given, figures = answers(by_text(verdict), task("odd", "fine"), task("x", "y", key="l"), both_orders=False)
    assert [one.answer for one in given] == [None, Choice("id of x")]
    assert given[0].comment == text.strip()
    assert (figures["unreadable"], figures["pairs"], figures["choices"]) == (1, 1, 1)


def test_one_unreadable_order_is_an_abstention_too() -> None:
    given, figures = answers(by_text(lambda letters: "no" if letters["A"] == "b" else "Verdict: A"), task("a", "b"))
    assert given[0].answer is None
    assert figures["choices"] == 0


def test_the_comment_is_bounded() -> None:
    long = by_text(lambda letters: "x" * 500 + "\nVerdict: A")
    given, _ = answers(long, task("a", "b"), both_orders=False, comment_characters=20)
    assert given[0].comment == "x" * 19 + "…"
    given, _ = answers(long, task("a", "b"), comment_characters=20)
    assert given[0].comment == "x" * 9 + "…\n---\n" + "x" * 9 + "…"
    given, _ = answers(long, task("a", "b"), comment_characters=0)
    assert given[0].comment == ""


def test_a_ranking_has_the_mean_rank_of_both_orders() -> None:
    quality = {"one": 1, "two": 2, "three": 3, "four": 4}

    def best_first(letters: dict[str, str]) -> str:
        order = sorted(letters, key=lambda letter: quality[letters[letter]])
        return "Ranking: " + " > ".join(order)

    ranking = task("three", "one", "four", "two", kind="ranking")
    given, figures = answers(by_text(best_first), ranking)
    assert given[0].answer == Ranking((("id of one",), ("id of two",), ("id of three",), ("id of four",)))
    assert (figures["requests"], figures["orders_disagreed"]) == (2, 0)
    # Always A > B > C > D: every response has the mean rank 1.5, so all are equally good.
    given, figures = answers(by_text(lambda letters: "A > B > C > D"), ranking)
    assert isinstance(given[0].answer, Ranking)
    assert len(given[0].answer.tiers) == 1
    assert figures["orders_disagreed"] == 1
    given, _ = answers(by_text(lambda letters: "A is best"), ranking)
    assert given[0].answer is None


def test_a_rating_is_asked_once() -> None:
    given, figures = answers(lambda body, number: said("Rating: 4"), task("fine", kind="rating", scale=5))
    assert given[0].answer == Rating(4.0)
    assert figures["requests"] == 1
    given, _ = answers(lambda body, number: said("Rating: 9"), task("fine", kind="rating", scale=5))
    assert given[0].answer is None


def test_log_probs_of_an_address_make_an_expected_rating() -> None:
    top = [{"token": "2", "logprob": math.log(0.25)}, {"token": "4", "logprob": math.log(0.75)}]

    def script(body: dict[str, Any], number: int) -> Reply:
        assert "Reply with the number alone" in body["messages"][0]["content"]
        return said("4", logprobs={"content": [{"token": "4", "logprob": 0.0, "top_logprobs": top}]})

    given, _ = answers(script, task("fine", kind="rating", scale=5), logprobs=True)
    assert isinstance(given[0].answer, Rating)
    assert given[0].answer.value == pytest.approx(3.5)
    assert given[0].comment == "4 (0.000, 0.250, 0.000, 0.750, 0.000)"


def test_a_template_of_ones_own_is_what_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "question.txt"
    path.write_text("{prompt}: <response A>\n{first}\n</response> or <response B>\n{second}\n</response>?")
    with chat_server(prefers("b")) as server:
        judge = judge_for(server.address, template=str(path))
        assert judge.answer([task("a", "b")])[0].answer == Choice("id of b")
        assert server.bodies[0]["messages"][0]["content"].startswith("prompt k: <response A>\n")
        settings = dict(judge.settings)
    assert settings["template"] == path.read_text()
    assert not {"concurrency", "cache", "api_key_variable", "max_cost"} & set(settings)


@pytest.fixture
def store(tmp_path: Path) -> PreferenceStore:
    return PreferenceStore.create(tmp_path / "store.sqlite", seed=5)


def add_tasks(store: PreferenceStore, number: int) -> list[str]:
    prompts = store.add_prompts(Prompt(f"prompt {index}") for index in range(number))
    good = store.add_responses(Response(prompt, "good", number=0) for prompt in prompts)
    bad = store.add_responses(Response(prompt, "bad", number=1) for prompt in prompts)
    return store.add_tasks(TaskPlan("pairwise", pair, audience="judge") for pair in zip(good, bad, strict=True))


def test_the_cost_is_said_before_and_reported_after(store: PreferenceStore, tmp_path: Path) -> None:
    tasks = add_tasks(store, 6)
    lines: list[str] = []
    with chat_server(prefers("good")) as server:
        config = JudgeAnnotator(
            address=server.address,
            model_name="m",
            cache=str(tmp_path / "cache"),
            max_tokens=50,
            input_price=1.0,
            output_price=2.0,
        )
        annotators = make_annotators(config, AnnotatorResources(seed=1))
        summary = label_tasks(
            store, annotators, tasks, report=lambda line: lines.append(f"{line} [{len(server.bodies)} sent]")
        )
        assert len(server.bodies) == 12
    assert re.fullmatch(
        r"judge: 12 requests; about [\d,]+ tokens to send and at most 600 to receive; "
        r"cost at most about \S+ \[0 sent\]",
        lines[0],
    )
    assert summary.num_labels == 6
    assert summary.cost == pytest.approx((12 * 10 * 1.0 + 12 * 5 * 2.0) / 1e6)
    assert summary.figures["judge"]["first_share"]["value"] == 0.5
    responses = store.responses()
    for label in store.current_labels():
        assert isinstance(label.answer, Choice)
        assert responses[label.answer.preferred].text == "good"
        assert "Some reasons" in label.comment
        assert label.seconds is not None


def test_a_cost_over_the_limit_sends_nothing(store: PreferenceStore) -> None:
    tasks = add_tasks(store, 3)
    with chat_server(prefers("good")) as server:
        config = JudgeAnnotator(
            address=server.address, model_name="m", cache=None, input_price=1.0, output_price=1.0, max_cost=1e-6
        )
        with pytest.raises(ConfigError, match=r"preferences\.annotator\.max_cost=1e-06: 6 requests"):
            label_tasks(store, make_annotators(config, AnnotatorResources(seed=1)), tasks)
        assert server.bodies == []
        assert store.current_labels() == []


def test_a_server_that_fails_in_the_middle_costs_no_label_twice(store: PreferenceStore, tmp_path: Path) -> None:
    tasks = add_tasks(store, 9)
    broken = True

    def script(body: dict[str, Any], number: int) -> Reply:
        return Reply(400, b"quota") if broken and number >= 9 else prefers("good")(body, number)

    with chat_server(script) as server:
        config = JudgeAnnotator(
            address=server.address, model_name="m", cache=str(tmp_path / "cache"), concurrency=1, both_orders=False
        )
        with pytest.raises(ChatError, match="status 400: quota"):
            label_tasks(
                store, make_annotators(config, AnnotatorResources(seed=1)), add_more(store, tasks), chunk_size=6
            )
        # One chunk of six is labelled; the replies of the next are in the cache.
        assert len(store.current_labels()) == 6
        sent = len(server.bodies)
        broken = False
        summary = label_tasks(store, make_annotators(config, AnnotatorResources(seed=1)), add_more(store, tasks))
        questions = [body["messages"][0]["content"] for body in server.bodies]
    assert summary.num_labels == 6
    assert summary.figures["judge"]["cached"] == 3
    # Of 12 questions, those that were refused are all that was sent twice.
    assert len(questions) - sent == 3
    assert len(set(questions)) == 12


def add_more(store: PreferenceStore, tasks: list[str]) -> list[str]:
    return [*tasks, *(task for task in add_tasks(store, len(tasks) + 3) if task not in tasks)]


def test_a_local_judge_chooses_by_log_probs_and_by_words(tmp_path: Path) -> None:
    config = JudgeAnnotator(model=str(save_model(tmp_path, max_positions=1024)), cache=None, logprobs=True)
    (judge,) = make_annotators(config, AnnotatorResources(seed=1)).members
    pair = task("the film is good", "bad")
    (given,) = judge.answer([pair])
    figures = judge.figures()
    assert given.answer is not None
    assert figures["response_tokens"] == 2
    shares = [[float(n) for n in re.findall(r"0\.\d+|1\.0+", part)] for part in given.comment.split("\n---\n")]
    assert [sum(part) for part in shares] == pytest.approx([1.0, 1.0], abs=0.002)
    # The verdict of each order is its likeliest letter, that of the second seen from the other side.
    verdicts = [["first", "second", "tie"][max(range(3), key=part.__getitem__)] for part in shares]
    turned = {"first": "second", "second": "first", "tie": "tie"}[verdicts[1]]
    ids = {"first": Choice("id of the film is good"), "second": Choice("id of bad"), "tie": Tie()}
    assert given.answer == (ids[verdicts[0]] if verdicts[0] == turned else Tie())
    # In words a model with random weights says nothing that can be read.
    words = JudgeAnnotator(model=config.model, cache=None, max_tokens=8)
    (judge,) = make_annotators(words, AnnotatorResources(seed=1)).members
    assert judge.answer([pair])[0].answer is None
    assert judge.figures()["unreadable"] == 1
