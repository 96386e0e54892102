"""The math reward: answers that are equal as mathematics, hostile responses, threads, and real problems."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhf.config.rewards import MathReward
from rlhf.errors import ConfigError
from rlhf.rewards.checks import check_columns, content_hash
from rlhf.rewards.maths import Checker, MathRule, _tail
from rlhf.rewards.protocol import RewardError
from tests.reward_example import make_batch

SHARED = Path(os.environ.get("RLHF_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")


@pytest.fixture(scope="module")
def checker() -> Iterator[Checker]:
    """One process for all of these tests: starting it takes longer than they do."""
    one = Checker(1.0)
    yield one
    one.close()


def scores(rule: MathRule, responses: list[str], answers: Sequence[object]) -> list[float]:
    return [float(value) for value in rule.score(make_batch(responses, columns={"answer": answers}))]


@pytest.mark.parametrize(
    ("expected", "response", "verdict"),
    [
        # Numbers, however they are written.
        ("so 6*12 = 72 #### 72", "6 * 12 = 72\n#### 72", "correct"),
        ("so 6*12 = 72 #### 72", "6 * 12 = 70\n#### 70", "wrong"),
        ("72", r"It is \boxed{72}.", "correct"),
        ("72", "so 3 and then 72", "correct"),
        ("1,000", r"\boxed{1000}", "correct"),
        ("#### 1,234", "#### $1234", "correct"),
        ("-3", "the answer is -3", "correct"),
        ("-3", "the answer is 3", "wrong"),
        ("18 dollars", "#### 18", "correct"),
        ("$18", "#### 18", "correct"),
        # Fractions, roots, expressions.
        (r"\frac{1}{2}", r"$\frac{2}{4}$", "correct"),
        ("1/2", r"\boxed{0.5}", "correct"),
        (r"\boxed{\frac12}", "the final answer is $0.5$. I hope it is right.", "correct"),
        (r"2\sqrt{2}", r"$\sqrt{8}$", "correct"),
        ("x^2 + 2x + 1", "$(x+1)^2$", "correct"),
        ("x^2 + 2x + 1", "$(x-1)^2$", "wrong"),
        # Sets, intervals, units, percent.
        (r"\{1, 2\}", r"$\{2, 1\}$", "correct"),
        (r"\{1, 2\}", r"$\{2, 3\}$", "wrong"),
        ("(1, 2]", "$(1,2]$", "correct"),
        ("(1, 2]", "$[1,2]$", "wrong"),
        (r"3\text{ cm}", "$3$ cm", "correct"),
        (r"50\%", r"\boxed{50\%}", "correct"),
        # Two boxes are two answers; no answer at all is something else than a wrong one.
        ("5", r"\boxed{4} or \boxed{5}", "wrong"),
        ("5", "I do not know", "unparsable"),
        ("5", "", "unparsable"),
        ("blue or green", r"\boxed{5}", "unknown"),
    ],
)
def test_answers_are_compared_as_mathematics(checker: Checker, expected: str, response: str, verdict: str) -> None:
    assert checker.check(expected, response) == verdict


def test_scores_come_from_the_config() -> None:
    rule = MathRule(MathReward(correct=2.0, wrong=-1.0, unparsable=-3.0, num_workers=2))
    found = scores(rule, [r"\boxed{1}", r"\boxed{2}", "none", "1"], ["1", 1, "1", None])
    assert found[:3] == [2.0, -1.0, -3.0]
    assert math.isnan(found[3])
    assert rule._pool.num_made <= 2
    # Only the end of a response is looked at.
    short = MathRule(MathReward(max_characters=10))
    assert scores(short, [r"\boxed{1} and then a long text without any"], ["1"]) == [0.0]
    with pytest.raises(RewardError, match=r"column answer holds .it is blue., in which math-verify finds no answer"):
        scores(short, ["1"], ["it is blue"])
    with pytest.raises(RewardError, match="column answer, which the data does not have; its columns are: level"):
        short.score(make_batch(["1"], columns={"level": [1]}))
    with pytest.raises(ConfigError, match=r"ppo\.rewards\.m\.column=answer needs the column answer"):
        check_columns({"m": MathReward()}, ["level"])
    # How many processes compare decides nothing.
    hashes = [content_hash({"m": MathReward(num_workers=n, wrong=w)}) for n, w in ((1, 0.0), (2, 0.0), (1, -1.0))]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    "response",
    [
        "$9^{9^{9^{9}}}$",
        r"\boxed{10^{10^{10}}}",
        r"$\int_0^1 \sin(x^{x^{x}}) dx \cdot \sum_{k=1}^{10^9} \frac{1}{k^k}$",
        r"\boxed{" * 3000,
        "(" * 4000 + "1" + ")" * 4000,
        "$" + r"\frac{1}{" * 400 + "2" + "}" * 400 + "$",
        "1" * 5000,
        "\x00\ud800 \\boxed{\n\n}",
        "__import__('os').abort()",
    ],
)
def test_hostile_responses_neither_hang_nor_win(checker: Checker, response: str) -> None:
    """Each ends in bounded time, and the next response is judged as if nothing had been."""
    start = time.monotonic()
    assert checker.check("7", _tail(response, 8192)) != "correct"
    assert checker.check("7", r"\boxed{7}") == "correct"
    # 1 s of CPU; 8 s where the process has to end itself; the rest is for a busy machine.
    assert time.monotonic() - start < 75


def test_it_works_in_threads_and_leaves_the_alarm_alone() -> None:
    """math-verify's own limit of time is a signal, which only a main thread can have, and it takes over SIGALRM."""
    before = (signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGTERM))
    rule = MathRule(MathReward(num_workers=2))
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda n: scores(rule, [f"\\boxed{{{n}}}", "8"], ["3", "8"]), range(6)))
    assert found == [[float(n == 3), 1.0] for n in range(6)]
    assert (signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGTERM)) == before
    assert threading.active_count() < 20


def test_a_killed_process_is_started_again(checker: Checker) -> None:
    assert checker.check("1", "1") == "correct"
    assert checker._process is not None
    # What a job's manager sends to every process of it is not meant for this one.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(checker._process.pid, number)
    first = checker._process.pid
    assert checker.check("1", "1") == "correct"
    assert checker._process.pid == first
    checker._process.kill()
    checker._process.wait()
    assert checker.check("1", "2") == "wrong"
    assert checker._process.pid != first


def test_cpu_time_ends_a_comparison_and_the_clock_one_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = Checker(0.3)
    assert quick.check("1", "1") == "correct"
    assert quick._process is not None
    first = quick._process.pid
    # sympy works on this integral for minutes; the process lives on.
    assert quick.check("7", r"$\int_0^1 \sin(x^{x^{x}}) dx$") == "timeout"
    assert quick._process.pid == first
    assert quick.check("1", "1") == "correct"
    # A process that was stopped from outside uses no CPU time.
    os.kill(first, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr("rlhf.rewards.maths.HARD_LIMIT_SECONDS", 0.1)
        assert quick.check("1", "1") == "timeout"
    assert quick.check("1", "1") == "correct"
    assert quick._process.pid != first
    quick.close()


def test_an_interrupted_question_does_not_answer_the_next(checker: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rlhf.rewards.maths.select.select", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checker.check("1", "1")
    assert checker.check("1", "2") == "wrong"


@pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason=f"needs the gsm8k problems in RLHF_SHARED_DATA or {SHARED}")
def test_real_problems() -> None:
    """Every solution of a sample is right by its own answer, in three spellings, and wrong by another problem's."""
    lines = (SHARED / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:120]
    answers = [json.loads(line)["answer"] for line in lines]
    last = [answer.rpartition("####")[2].strip() for answer in answers]
    rule = MathRule(MathReward())
    assert scores(rule, answers, answers) == [1.0] * len(answers)
    boxed = [f"So it is $\\boxed{{{number.replace(',', '')}}}$." for number in last]
    assert scores(rule, boxed, answers) == [1.0] * len(answers)
    plain = [f"The answer is {number}." for number in last]
    assert scores(rule, plain, answers) == [1.0] * len(answers)
    shifted = last[1:] + last[:1]
    equal = [float(a.replace(",", "") == b.replace(",", "")) for a, b in zip(last, shifted, strict=True)]
    assert scores(rule, answers[1:] + answers[:1], answers) == equal
