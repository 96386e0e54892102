"""Attributes and gold reward: hand-worked values, and agreement with what the grammar meant to say."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.embedded import (
    gold_attributes,
    gold_reward,
    length,
    lexicon,
    repetition,
    reserved_reward,
    sentiment,
)
from rlhf.data.embedded.reviews import CONTINUATION_TONES, GRAMMARS, TONES

PROMPT = "My cousin and I saw the new film on Friday ."
words = st.lists(st.sampled_from([*lexicon.POLAR_WORDS, *lexicon.MODIFIERS, "not", "never", "and", ".", "the", "was"]))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", 0.0),
        (" It ran for two hours .", 0.0),
        (" The music was good .", 1.0),
        (" The music was very good .", 1.0),
        (" The music was bad .", -1.0),
        (" The music was not good .", -1.0),
        (" The music was not very good .", -1.0),
        (" The music was not bad .", 1.0),
        (" We would never recommend it to my friends .", -1.0),
        (" I did not enjoy the end .", -1.0),
        (" We will see it again .", 1.0),
        (" The music was good and the songs were terrible .", 0.0),  # (1 - 1) / 2
        (" The music was not good and the songs were good .", 0.0),  # the negation ends at "and"
        (" The music was not there . The songs were good .", 0.5),  # and at the full stop: 0 and 1
        (" The music was not good good .", 0.0),  # it turns one word around
        (" The music was good . It ran for two hours .", 0.5),  # a sentence without a polar word counts as 0
        (" The music was good and the songs were good . It was a bad film .", 1 / 3),  # opinions, not sentences
        (" The music was good . The plot was terrible", 0.0),  # an unfinished sentence counts
        (" GOOD", 1.0),
    ],
)
def test_sentiment_by_hand(text: str, value: float) -> None:
    assert sentiment(text) == pytest.approx(value)


def test_sentiment_has_the_sign_that_the_grammar_meant() -> None:
    generator = random.Random(3)
    for grammar in GRAMMARS.values():
        for tone in TONES:
            for _ in range(200):
                value = sentiment(grammar.sample(f"sentence_{tone}", generator))
                if tone != "mixed":
                    assert (value > 0) - (value < 0) == {"positive": 1, "negative": -1, "neutral": 0}[tone]
        for kind in ("singular", "plural"):
            for tone in CONTINUATION_TONES[:2]:
                value = sentiment(grammar.sample(f"continuation_{kind}_{tone}", generator))
                assert value * (1 if tone == "positive" else -1) > 0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", 0.0),
        (" The music was good .", 0.0),
        (" great great great", 2 / 3),  # polar words: 1 of 3 is new
        (" the the the the the", 2 / 3),  # three triples, one of them new
        (" The plot was good . The plot was good .", 0.5),  # one of two sentences, one of two polar words
        (" The plot was good . The music was good .", 0.5),
        (" I loved the plot . We will see it again . I loved the plot .", 1 / 3),
    ],
)
def test_repetition_by_hand(text: str, value: float) -> None:
    assert repetition(text) == pytest.approx(value)


def test_length_leaves_punctuation_out() -> None:
    assert length(" The plot was good . We saw it .") == 7
    assert length("") == 0


@pytest.mark.parametrize(
    ("response", "value"),
    [
        (" The music was very good . We will see it again .", 2.0),
        # 0.5 + 1.5 * (1 + 1 - 1) / 3
        (" The music was very good . We will see it again . The plot was dull .", 1.0),
        # 2 - 0.5 * (6 - 4) / 6
        (" The music was good .", 2 - 1 / 6),
        (" It was a terrible film . I hated the music .", -1.0),
        # said twice: repetition 0.5
        (" The music was wonderful . The music was wonderful .", 1.0),
        # one of two sentences, 5 of 11 words, has its place: 5 / 11 * 2 - 1.5 * 6 / 11
        (" The music was good . It was great a film .", 10 / 11 - 9 / 11),
        # nothing of it is of the grammar: -1.5 - 2 * 2 / 3 - 0.5 * 3 / 6, cut to -2
        (" great great great", -2.0),
        (" music the was wonderful and it the amazing .", -1.5),
        ("", -2.0),
    ],
)
def test_gold_reward_by_hand(response: str, value: float) -> None:
    assert gold_reward(PROMPT, response) == pytest.approx(value)


def test_a_response_to_another_prompt_is_worth_nothing() -> None:
    response = " The music was very good . We will see it again ."
    assert gold_reward("My cousin and I read the new book on Friday .", response) == pytest.approx(-1.5)


def test_positive_gibberish_scores_below_a_bad_review() -> None:
    bad_review = gold_reward(PROMPT, " It was a terrible film . I hated the music .")
    for gibberish in (
        " wonderful superb amazing great lovely good .",
        " The wonderful was superb amazing loved again .",
    ):
        assert sentiment(gibberish) > 0.5
        assert gold_reward(PROMPT, gibberish) < bad_review


@given(words)
def test_attributes_and_reward_stay_in_their_bounds(text: list[str]) -> None:
    response = "".join(f" {word}" for word in text)
    facts = gold_attributes(PROMPT, response)
    assert set(facts) == {"sentiment", "grammatical", "well_formed", "repetition", "length"}
    assert 0 <= facts["well_formed"] <= 1
    assert not facts["grammatical"] or facts["well_formed"] == 1
    assert -1 <= facts["sentiment"] <= 1
    assert 0 <= facts["repetition"] < 1
    assert -2 <= gold_reward(PROMPT, response) <= 2


def test_every_attribute_moves_the_reward() -> None:
    base = " The music was good . We will see it again ."
    opinions = ("cast", "plot", "end", "music")
    wordy = " ".join(f"The {first} was very good and the {first} was really great ." for first in opinions)
    worse = {
        "sentiment": " The music was good . We will never see it again .",
        "grammatical": " The music was good . We will see it it again .",
        "repetition": " The music was good . The music was good .",
        "length, too short": " The music was good .",
    }
    for name, response in worse.items():
        assert gold_reward(PROMPT, response) < gold_reward(PROMPT, base), name
    # 44 words, 20 more than the longest usual text: 0.5 * 20 / 24 off; repetition: 6 of 8 polar words.
    assert length(wordy) == 44
    assert gold_reward(PROMPT, wordy) == pytest.approx(2 - 2 * 6 / 8 - 0.5 * 20 / 24)


@pytest.mark.parametrize(
    ("response", "value"),
    [
        # facts alone, 12 words
        (" We sat in the first row . It ran for two hours .", 2.0),
        # one opinion: 0.5 + 1.5 * (1 - 1)
        (" The music was very good . We sat in the first row .", 0.5),
        # two opinions and more, whatever they say: 0.5 - 1.5
        (" It was a terrible film . I hated the music .", -1.0),
        (" The music was very good . We will see it again . The plot was dull .", -1.0),
        # form counts as in the gold reward
        (" music the was wonderful and it the amazing .", -1.5),
        ("", -2.0),
    ],
)
def test_reserved_reward_by_hand(response: str, value: float) -> None:
    assert reserved_reward(PROMPT, response) == pytest.approx(value)
