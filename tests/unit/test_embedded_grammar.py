"""The grammar of the embedded corpus: what it says, what it recognises, and that both are the same language."""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Iterator

import pytest

from rlhf.data.embedded import lexicon, reviews
from rlhf.data.embedded.grammar import Grammar
from rlhf.data.embedded.reviews import GRAMMARS, KINDS, Opening, is_grammatical, parse_opening, sample_sentences
from rlhf.records import Message

TOY = Grammar({"text": ("a <tail>", "<tail> <tail>"), "tail": ("b", "b c", "c")})
FILM = "My cousin and I saw the new film on Friday ."
UNFINISHED_SINGULAR = "My cousin thought the music of the new film"
UNFINISHED_PLURAL = "My cousin thought the songs of the new film"


def texts_of(grammar: Grammar, name: str) -> Iterator[str]:
    """All texts of a rule with their derivations, by brute force over the rules' own lines."""
    for alternative in grammar.rules[name]:
        parts = [
            list(texts_of(grammar, part[1:-1])) if part.startswith("<") else [f" {part}"]
            for part in alternative.split()
        ]
        for chosen in itertools.product(*parts):
            yield "".join(chosen)


def test_pattern_matches_the_language_of_a_toy_grammar_and_nothing_else() -> None:
    language = {
        " a b",
        " a b c",
        " a c",
        " b b",
        " b b c",
        " b c",
        " b c b",
        " b c b c",
        " b c c",
        " c b",
        " c b c",
        " c c",
    }
    assert set(texts_of(TOY, "text")) == language
    matches = re.compile(TOY.pattern("text")).fullmatch
    for size in range(6):
        for words in itertools.product("abc", repeat=size):
            text = "".join(f" {word}" for word in words)
            assert bool(matches(text)) == (text in language), text


def test_count_is_the_number_of_derivations() -> None:
    assert TOY.count("tail") == 3
    assert TOY.count("text") == 3 + 3 * 3 == len(list(texts_of(TOY, "text")))


def test_samples_reach_the_whole_language() -> None:
    generator = random.Random(0)
    assert {TOY.sample("text", generator) for _ in range(500)} == set(texts_of(TOY, "text"))


def test_every_opening_is_distinct_and_is_recognised_as_what_it_is() -> None:
    openings: dict[str, Opening] = {}
    for topic, grammar in GRAMMARS.items():
        for kind in KINDS:
            for text in texts_of(grammar, f"opening_{kind}"):
                assert openings.setdefault(text, Opening(topic, kind)) == Opening(topic, kind)
    assert len(openings) == reviews.num_openings() >= 20_000
    generator = random.Random(0)
    for text in generator.sample(sorted(openings), 2000):
        assert parse_opening(text[1:]) == openings[text]


@pytest.mark.parametrize("topic", list(GRAMMARS))
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sampled_is_recognised_for_its_own_opening_only(topic: str, kind: reviews.Kind) -> None:
    generator = random.Random(f"{topic}{kind}")
    prompts = {
        (name, other): grammar.sample(f"opening_{other}", generator)[1:]
        for name, grammar in GRAMMARS.items()
        for other in KINDS
    }
    for number in range(200):
        text = "".join(sample_sentences(generator, Opening(topic, kind), 1 + number % 4, 0.5))
        assert is_grammatical(prompts[topic, kind], text)
        for other in KINDS:
            assert is_grammatical(prompts[topic, other], text) == (other == kind)


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        (FILM, " The music was very good ."),
        (FILM, " The songs were quite bad ."),
        (FILM, " It was a great film ."),
        (FILM, " It was an awful movie . We will never see it again ."),
        (FILM, " It was a very awful movie ."),
        (
            FILM,
            " I loved the plot . We would not recommend it to everyone . The cast was dull and the songs were good .",
        ),
        (UNFINISHED_SINGULAR, " was bad ."),
        (UNFINISHED_SINGULAR, " was good and the songs were funny . I did not enjoy the end ."),
        (UNFINISHED_PLURAL, " were good ."),
    ],
)
def test_accepts(prompt: str, response: str) -> None:
    assert is_grammatical(prompt, response)


@pytest.mark.parametrize(
    ("prompt", "response", "why"),
    [
        (FILM, "", "nothing was said"),
        (FILM, " The music was very good", "no full stop"),
        (FILM, " The music was very good .The plot was bad .", "no space after the full stop"),
        (FILM, " the music was very good .", "no capital"),
        (FILM, " The music were good .", "number"),
        (FILM, " The songs was good .", "number"),
        (FILM, " It was a awful film .", "article"),
        (FILM, " It was an great film .", "article"),
        (FILM, " It was a great book .", "another topic"),
        (FILM, " The soup was good .", "another topic"),
        (FILM, " The music was tasty .", "another topic"),
        (FILM, " We will eat there again .", "another topic"),
        (FILM, " The music was great great great .", "no such phrase"),
        (FILM, " great great great", "no sentence"),
        (FILM, " The music was not good .", "nothing negates an adjective"),
        (FILM, " was good .", "the opening is complete"),
        (FILM, " The plot was good ." * 5, "five sentences"),
        (UNFINISHED_SINGULAR, " were good .", "number"),
        (UNFINISHED_PLURAL, " was good .", "number"),
        (UNFINISHED_SINGULAR, " The music was good .", "the opening is not complete"),
        (UNFINISHED_SINGULAR, " was good ." + " The plot was good ." * 4, "five sentences"),
        ("Tell me about the film .", " The music was very good .", "not an opening"),
        ("My cousin and I saw the new book on Friday .", " I loved the story .", "a book is not seen"),
    ],
)
def test_refuses(prompt: str, response: str, why: str) -> None:
    assert not is_grammatical(prompt, response), why


@pytest.mark.parametrize(
    ("prompt", "response", "share"),
    [
        (FILM, " The music was good . I loved the plot .", 1.0),
        (FILM, " The music were good . I loved the plot .", 0.5),  # each sentence has five words with its full stop
        (FILM, " The music was good . I loved the plot", 5 / 9),
        (UNFINISHED_SINGULAR, " was good . I loved the plot .", 1.0),
        (UNFINISHED_PLURAL, " was good . I loved the plot .", 5 / 8),
        (FILM, " was good . I loved the plot .", 5 / 8),
        (FILM, " The plot was good ." * 5, 1.0),  # each sentence has its place, and there are too many
        (FILM, "", 0.0),
        (FILM, " .", 0.0),
        ("Tell me about the film .", " The music was good .", 0.0),
    ],
)
def test_share_of_words_in_well_formed_sentences(prompt: str, response: str, share: float) -> None:
    assert reviews.recognise(prompt, response).well_formed == pytest.approx(share)


def test_a_conversation_is_not_an_opening() -> None:
    assert not is_grammatical((Message("user", FILM),), " The music was good .")


def test_words_count_and_white_space_around_them_does_not() -> None:
    assert is_grammatical(f"  {FILM} ", "The music  was good .\n")


def test_the_recogniser_is_fast_enough_for_rollouts() -> None:
    generator = random.Random(1)
    pairs = []
    for _ in range(2000):
        prompt = reviews.sample_opening(generator)
        opening = parse_opening(prompt)
        assert opening is not None
        pairs.append((prompt, "".join(sample_sentences(generator, opening, 3, 0.5))))
    parse_opening.cache_clear()
    start = time.process_time()
    assert all(is_grammatical(prompt, response) for prompt, response in pairs)
    assert len(pairs) / (time.process_time() - start) > 5000


def test_vocabulary_is_small_and_no_neutral_fact_has_a_polar_word() -> None:
    words = {word for grammar in GRAMMARS.values() for name in grammar.rules for line in grammar.rules[name]
             for word in line.split() if not word.startswith("<")}  # fmt: skip
    assert 150 < len(words) < 400
    for topic in lexicon.TOPICS:
        assert not {word for fact in topic.facts for word in fact.split()} & set(lexicon.POLAR_WORDS)
