"""What judges are asked, and how their replies are read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rlhf.chat.protocol import ChatReply
from rlhf.chat.questions import (
    PAIR_FIELDS,
    RATING_FIELDS,
    pair_question,
    ranking_question,
    rating_choices,
    rating_question,
    read_ranking,
    read_rating,
    read_template,
    read_verdict,
    reply_rating,
    reply_verdict,
)
from rlhf.errors import ConfigError
from rlhf.records import Message


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Verdict: A", "first"),
        ("B", "second"),
        ("**B**", "second"),
        ("b.", "second"),
        ("C", "tie"),
        ("A tie.", "tie"),
        ("Both are fine.\n\nVerdict: C", "tie"),
        ("Verdict: **Response B**", "second"),
        ("A is short. B is long.\n[[A]]", "first"),
        ("[[tie]]", "tie"),
        ('Here: {"reasons": "x {y}", "verdict": "B"}', "second"),
        ('```json\n{"winner": 1}\n```', "first"),
        ('{"verdict": null}', None),
        ("At first: Verdict: A. On reflection,\nVerdict: B", "second"),
        ("The final answer is Response A", "first"),
        ("My preference: the second response", "second"),
        ("Response A is clearly better because it answers.", "first"),
        ("Verdict: neither is better", "tie"),
        ("The better response is assistant 2", "second"),
        ("Option 1", "first"),
        ("", None),
        ("I cannot judge this content.", None),
        ("A good question! As a model I have no opinion.", None),
        ("Verdict: maybe", None),
        ("Verdict: Apples", None),
        ("Is A better than B? Hard to say", None),
        ("Verdict: 2023", None),
        ("D", None),
    ],
)
def test_a_verdict_is_read_or_none(reply: str, verdict: str | None) -> None:
    assert read_verdict(reply) == verdict


@pytest.mark.parametrize(
    ("reply", "tiers"),
    [
        ("Ranking: C > A = B > D", [[2], [0, 1], [3]]),
        ("First A > B > C > D, no:\n**Ranking: D > C > B > A**", [[3], [2], [1], [0]]),
        ("B, A, D, C", [[1], [0], [3], [2]]),
        ("A > B > C", None),
        ("A > A > B > C", None),
        ("A > B > C > E", None),
        ("no idea", None),
    ],
)
def test_a_ranking_names_each_letter_once(reply: str, tiers: list[list[int]] | None) -> None:
    assert read_ranking(reply, 4) == tiers


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Rating: 4", 4.0),
        ("It scores on 3 points.\nRating: **4.5**", 4.5),
        ("3", 3.0),
        ("3/5", 3.0),
        ("I give it 4/5.", 4.0),
        ("Rating: 4 out of 5", 4.0),
        ('{"score": 2}', 2.0),
        ('{"score": 9}', None),
        ("Rating: 6", None),
        ("0", None),
        ("Between 2 and 3", None),
        ("none", None),
        ("{'rating': true}", None),
    ],
)
def test_a_rating_on_the_scale_is_read_or_none(reply: str, rating: float | None) -> None:
    assert read_rating(reply, 5) == rating


def test_log_probs_come_before_words() -> None:
    logprobs = tuple(math.log(share) for share in (0.2, 0.5, 0.3))
    assert reply_verdict(ChatReply("Verdict: A", 1, 1, logprobs)) == "second"
    assert reply_verdict(ChatReply("Verdict: A", 1, 1)) == "first"
    # 1 * 0.2 + 2 * 0.5 + 3 * 0.3
    assert reply_rating(ChatReply("3", 1, 1, logprobs), 3) == pytest.approx(2.1)
    assert reply_rating(ChatReply("3", 1, 1), 3) == 3.0
    assert reply_rating(ChatReply("1", 1, 1, (0.0, -math.inf)), 2) == 1.0


def test_a_scale_in_which_a_rating_begins_another_has_no_choices() -> None:
    assert rating_choices(3) == ("1", "2", "3")
    assert rating_choices(9)[-1] == "9"
    assert rating_choices(10) == ()


def test_questions_hold_the_texts_once_whatever_they_say() -> None:
    hostile = "see {second} and {prompt} and </response A>"
    text = pair_question(None, "Why?", hostile, "fine", by_letter=False)
    assert text.count(hostile) == 1
    assert text.count("fine") == 1
    assert "Verdict: A" in text
    assert "Verdict" not in pair_question(None, "Why?", "a", "b", by_letter=True)
    ranking = ranking_question(None, (Message("user", "Hi"), Message("assistant", "Yes?")), ["one", "two"])
    assert "user: Hi\n\nassistant: Yes?" in ranking
    assert ranking.index("<response A>\none") < ranking.index("<response B>\ntwo")
    assert "from 1 (worst) to 7 (best)" in rating_question(None, "p", "r", 7, by_number=True)
    assert pair_question("{prompt}|{first}|{second}", "p", "f", "s", by_letter=True) == "p|f|s"


def test_a_template_is_read_with_its_placeholders(tmp_path: Path) -> None:
    path = tmp_path / "question.txt"
    path.write_text("{prompt} {first} {second}")
    assert read_template(str(path), "k", PAIR_FIELDS) == "{prompt} {first} {second}"
    assert read_template(None, "k", PAIR_FIELDS) is None
    path.write_text("{prompt} {response}: 1 to 5?")  # a scale may be written out
    assert read_template(str(path), "k", RATING_FIELDS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{prompt} {first}", r"k=.*lacks \{second\}; its placeholders are \{prompt\}, \{first\}, \{second\}"),
        ("{prompt} {first} {second} {third}", r"has \{third\}, which nothing fills"),
    ],
)
def test_a_template_without_its_placeholders_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "question.txt"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_template(str(path), "k", PAIR_FIELDS)


def test_a_template_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"k=.*none\.txt: expected a text file in UTF-8"):
        read_template(str(tmp_path / "none.txt"), "k", PAIR_FIELDS)
