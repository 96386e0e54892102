"""Simulated annotators: Bradley-Terry frequencies, exact labels at temperature 0, keyed random streams."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from rlhf.preferences.annotators import Judgement, SimulatedAnnotator
from rlhf.records import Message, PromptContent

QUALITY = {"good": 1.0, "fair": 0.5, "bad": 0.0, "also bad": 0.0}


def gold(prompt: PromptContent, response: str) -> float:
    return QUALITY[response]


def annotator(temperature: float = 0.5, seed: int = 1, name: str = "anna") -> SimulatedAnnotator:
    return SimulatedAnnotator(name=name, gold=gold, temperature=temperature, seed=seed)


@pytest.mark.parametrize(
    ("first", "second", "temperature", "expected"),
    [
        ("good", "bad", 1.0, 0.7310586),  # 1 / (1 + exp(-1))
        ("bad", "good", 1.0, 0.2689414),
        ("good", "bad", 0.5, 0.8807971),  # 1 / (1 + exp(-2))
        ("good", "fair", 0.25, 0.8807971),
        ("bad", "also bad", 0.5, 0.5),
        ("good", "bad", 1e-300, 1.0),
        ("bad", "good", 0.0, 0.0),
    ],
)
def test_probability_is_bradley_terry(first: str, second: str, temperature: float, expected: float) -> None:
    assert annotator(temperature).compare("p", first, second, key="0").probability == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("first", "second"), [("good", "bad"), ("fair", "good"), ("bad", "also bad")])
def test_choices_occur_as_often_as_their_probability(first: str, second: str) -> None:
    someone = annotator()
    judgements = [someone.compare("p", first, second, key=str(number)) for number in range(4000)]
    probability = judgements[0].probability
    share = sum(judgement.chosen_first for judgement in judgements) / len(judgements)
    assert abs(share - probability) < 4 * math.sqrt(probability * (1 - probability) / len(judgements))


def test_without_noise_the_better_response_always_wins() -> None:
    someone = annotator(temperature=0.0)
    for number in range(200):
        assert someone.compare("p", "good", "fair", key=str(number)) == Judgement(True, 1.0)
        assert someone.compare("p", "fair", "good", key=str(number)) == Judgement(False, 0.0)


def test_without_noise_a_tie_is_decided_by_the_key() -> None:
    choices = [annotator(temperature=0.0).compare("p", "bad", "also bad", key=str(n)).chosen_first for n in range(400)]
    assert choices == [
        annotator(temperature=0.0).compare("p", "bad", "also bad", key=str(n)).chosen_first for n in range(400)
    ]
    assert 140 < sum(choices) < 260


def test_a_label_depends_on_seed_name_prompt_and_key_only() -> None:
    conversation: PromptContent = (Message("user", "p"),)

    def choices(someone: SimulatedAnnotator, prompt: PromptContent = "p", prefix: str = "") -> list[bool]:
        return [someone.compare(prompt, "good", "fair", key=f"{prefix}{n}").chosen_first for n in range(60)]

    base = choices(annotator())
    assert choices(annotator()) == base
    assert choices(annotator(), "  p ") == base  # equal prompts by their key
    others = [
        choices(annotator(seed=2)),
        choices(annotator(name="ben")),
        choices(annotator(), "q"),
        choices(annotator(), conversation),
        choices(annotator(), prefix="x"),
    ]
    assert all(other != base for other in others)


def test_a_recorded_value_of_the_stream() -> None:
    """The stream is part of a run's reproducibility: this list changes only with a new label for every old run."""
    chosen = [int(annotator().compare("p", "good", "fair", key=str(n)).chosen_first) for n in range(16)]
    assert chosen == [1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1]


def test_label_records_the_side_on_which_the_chosen_response_was_shown() -> None:
    someone = annotator()
    sides: Counter[tuple[str, bool | None]] = Counter()
    for number in range(2000):
        record = someone.label("p", "good", "fair", key=str(number))
        assert (record.prompt, record.annotator, {record.chosen, record.rejected}) == ("p", "anna", {"good", "fair"})
        shown = (record.chosen, record.rejected) if record.chosen_shown_first else (record.rejected, record.chosen)
        # What the annotator saw, asked again, gives the recorded choice.
        assert someone.compare("p", *shown, key=str(number)).chosen_first == record.chosen_shown_first
        sides[record.chosen, record.chosen_shown_first] += 1
    for chosen, share in (("good", 0.7310586), ("fair", 0.2689414)):
        total = sides[chosen, True] + sides[chosen, False]
        assert total / 2000 == pytest.approx(share, abs=0.04)
        assert sides[chosen, True] / total == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("temperature", [-0.1, math.nan, math.inf])
def test_a_temperature_that_means_nothing_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        annotator(temperature)


def test_a_gold_reward_that_is_not_finite_is_refused() -> None:
    broken = SimulatedAnnotator(name="anna", gold=lambda prompt, response: math.nan, temperature=1.0, seed=0)
    with pytest.raises(ValueError, match="nan"):
        broken.compare("p", "a", "b", key="0")
