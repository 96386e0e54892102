"""The simulated pool against closed-form probabilities; bounds are those of the binomial at 4.5 standard deviations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from statistics import NormalDist
from typing import Any

import pytest

from rlhf.config.annotators import SimulatedAnnotators
from rlhf.config.rewards import RegexReward
from rlhf.errors import DataError
from rlhf.preferences.annotators import AnnotatorResources, PoolAnnotator, ShownResponse, ShownTask, make_annotators
from rlhf.preferences.annotators.pool import rating_on_scale
from rlhf.preferences.store import BothBad, Choice, Ranking, Rating, TaskKind, Tie
from rlhf.records import Prompt

NUM_TASKS = 2000
SCORES = {"good": 1.0, "fair": 0.5, "bad": 0.0, "also bad": 0.0, "awful": -1.5}


def scores_of(tasks: Sequence[ShownTask]) -> list[list[float]]:
    return [[SCORES[response.text] for response in task.responses] for task in tasks]


def someone(name: str = "s-1", seed: int = 1, **fields: Any) -> PoolAnnotator:
    return PoolAnnotator(name, SimulatedAnnotators(**fields), scores_of, seed, {})


def task(
    number: int, texts: Sequence[str], *, turned: bool = False, kind: TaskKind = "pairwise", scale: int | None = None
) -> ShownTask:
    """Task `number` of its own prompt; the ids are the texts. `turned` shows the responses the other way round."""
    responses = tuple(ShownResponse(text, text, index) for index, text in enumerate(texts))
    return ShownTask(
        f"t{number}", kind, Prompt(f"prompt {number}"), responses[::-1] if turned else responses, f"k{number}", scale
    )


def answers(annotator: PoolAnnotator, *texts: str, **fields: Any) -> list[Any]:
    return [given.answer for given in annotator.answer([task(number, texts, **fields) for number in range(NUM_TASKS)])]


def require_share(hits: Sequence[bool], probability: float) -> None:
    deviation = math.sqrt(max(probability * (1 - probability), 1e-12) / len(hits))
    share = sum(hits) / len(hits)
    assert abs(share - probability) <= 4.5 * deviation, f"{share:.4f} for {probability:.4f}"


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize(
    ("fields", "turned", "probability"),
    [
        ({"temperature": 0.5}, False, sigmoid(2)),
        ({"temperature": 2.0}, False, sigmoid(0.5)),
        ({"temperature": 0.0}, False, 1.0),
        ({"temperature": 0.5, "flip_share": 0.25}, False, 0.75 * sigmoid(2) + 0.25 * (1 - sigmoid(2))),
        ({"temperature": 0.0, "flip_share": 0.25}, True, 0.75),
        ({"temperature": 0.5, "position_bias": 1.0}, False, sigmoid(2 + 1)),
        ({"temperature": 0.5, "position_bias": 1.0}, True, sigmoid(2 - 1)),
        ({"temperature": 0.5, "position_bias": -0.5}, True, sigmoid(2 + 0.5)),
        # A bias shifts the log-odds; without noise it has nothing to shift.
        ({"temperature": 0.0, "position_bias": 5.0}, True, 1.0),
        # Two tastes of deviation 0.7 differ with deviation 0.7 sqrt(2).
        ({"temperature": 0.0, "taste_spread": 0.7}, False, NormalDist().cdf(1.0 / (0.7 * math.sqrt(2)))),
    ],
)
def test_the_better_response_is_chosen_as_often_as_the_formula_says(
    fields: dict[str, Any], turned: bool, probability: float
) -> None:
    given = answers(someone(**fields), "good", "bad", turned=turned)
    require_share([answer == Choice("good") for answer in given], probability)


def test_without_a_bias_the_sides_change_nothing_and_with_one_they_do() -> None:
    assert answers(someone(), "good", "fair") == answers(someone(), "good", "fair", turned=True)
    biased = someone(position_bias=1.0)
    assert answers(biased, "good", "fair") != answers(biased, "good", "fair", turned=True)


def test_equal_responses_without_noise_follow_the_bias() -> None:
    given = answers(someone(temperature=0.0, position_bias=1.0), "bad", "also bad", turned=True)
    require_share([answer == Choice("also bad") for answer in given], sigmoid(1.0))


def test_ties_bad_pairs_and_strengths_follow_the_margins() -> None:
    assert set(answers(someone(tie_margin=0.5), "good", "fair")) == {Tie()}
    assert set(answers(someone(tie_margin=0.49, temperature=0.0), "good", "fair")) == {Choice("good")}
    assert Tie() not in answers(someone(), "bad", "also bad")
    assert set(answers(someone(tie_margin=0.0), "bad", "also bad")) == {Tie()}
    assert set(answers(someone(both_bad_below=0.1), "bad", "awful")) == {BothBad()}
    assert BothBad() not in answers(someone(both_bad_below=0.1), "good", "awful")
    strict: dict[str, Any] = {"temperature": 0.0, "strength_margins": (0.5, 1.5)}
    assert set(answers(someone(**strict), "good", "fair")) == {Choice("good", 2)}
    assert set(answers(someone(**strict), "good", "awful")) == {Choice("good", 3)}
    assert set(answers(someone(temperature=0.0, strength_margins=(0.6, 1.5)), "good", "fair")) == {Choice("good", 1)}


def test_abstention_has_its_share_and_only_within_its_margin() -> None:
    given = answers(someone(abstain_share=0.3), "good", "bad")
    require_share([answer is None for answer in given], 0.3)
    require_share([answer == Choice("good") for answer in given if answer is not None], sigmoid(2))
    assert None not in answers(someone(abstain_share=0.3, abstain_margin=0.9), "good", "bad")
    require_share([a is None for a in answers(someone(abstain_share=0.3, abstain_margin=0.9), "good", "fair")], 0.3)


def test_a_ranking_has_the_probabilities_of_plackett_and_luce() -> None:
    temperature = 0.8
    texts = ("good", "fair", "bad", "awful")
    given = answers(someone(temperature=temperature), *texts, kind="ranking")
    weights = {text: math.exp(SCORES[text] / temperature) for text in texts}
    total = 0.0
    for order in permutations(texts):
        probability, left = 1.0, dict(weights)
        for text in order:
            probability *= left[text] / sum(left.values())
            del left[text]
        total += probability
        require_share([answer == Ranking(tuple((text,) for text in order)) for answer in given], probability)
    assert total == pytest.approx(1.0)


def test_rankings_have_ties_flips_and_a_bias() -> None:
    texts = ("bad", "good", "also bad", "fair")
    exact = someone(temperature=0.0, tie_margin=0.0)
    ranked = answers(exact, *texts, kind="ranking")[0]
    assert [set(tier) for tier in ranked.tiers] == [{"good"}, {"fair"}, {"bad", "also bad"}]
    flipped = answers(someone(temperature=0.0, tie_margin=0.0, flip_share=1.0), *texts, kind="ranking")[0]
    assert flipped.tiers == ranked.tiers[::-1]
    # Equal responses: the bias of the first of four is 3 and falls by 1 a place, so that log-odds differ by 1 a place.
    biased = someone(temperature=1.0, position_bias=3.0)
    same = [
        given.answer
        for given in PoolAnnotator("s", biased.config, lambda tasks: [[0.0] * 4 for _ in tasks], 1, {}).answer(
            [task(number, texts, kind="ranking") for number in range(NUM_TASKS)]
        )
    ]
    first = math.exp(3) / (math.exp(3) + math.exp(2) + math.exp(1) + 1)
    require_share([answer.tiers[0] == ("bad",) for answer in same if isinstance(answer, Ranking)], first)


@pytest.mark.parametrize(
    ("score", "rating"), [(-9.0, 1), (-2.0, 1), (-1.51, 1), (-1.49, 2), (0.0, 3), (1.5, 5), (7.0, 5)]
)
def test_a_rating_is_the_nearest_on_the_line(score: float, rating: int) -> None:
    assert rating_on_scale(score, -2.0, 2.0, 5) == rating


def test_ratings_have_noise_of_mean_zero_and_flips() -> None:
    exact = answers(someone(temperature=0.0, rating_low=-1.0, rating_high=1.0), "fair", kind="rating", scale=5)
    assert set(exact) == {Rating(4)}
    turned = someone(temperature=0.0, rating_low=-1.0, rating_high=1.0, flip_share=1.0)
    assert set(answers(turned, "fair", kind="rating", scale=5)) == {Rating(2)}
    noisy = answers(someone(temperature=0.1, rating_low=-10.0, rating_high=10.0), "fair", kind="rating", scale=2001)
    mean = sum(answer.value for answer in noisy) / len(noisy)
    # 1 + 2000 * (0.5 + 10) / 20 = 1051; Gumbel noise of scale 0.1 has deviation 0.1 pi / sqrt(6), 100 ratings a unit.
    assert abs(mean - 1051) < 4.5 * 100 * 0.1 * math.pi / math.sqrt(6) / math.sqrt(NUM_TASKS)
    assert len(set(noisy)) > 10


def test_the_pool_differs_where_it_is_told_to() -> None:
    same = [someone(f"s-{number}") for number in range(5)]
    assert {annotator.temperature for annotator in same} == {0.5}
    names = [f"s-{number}" for number in range(2000)]
    logs = [math.log(someone(name, temperature_spread=0.4).temperature / 0.5) for name in names]
    mean = sum(logs) / len(logs)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in logs) / len(logs))
    assert abs(mean) < 4.5 * 0.4 / math.sqrt(len(logs))
    assert deviation == pytest.approx(0.4, rel=0.1)
    # A taste lasts: without noise an annotator says the same of the same pair in another task.
    pair = [task(number, ("good", "fair")) for number in (7, 8)]
    again = [ShownTask("other", "pairwise", one.prompt, one.responses, "another key") for one in pair]
    for name in names[:200]:
        fan = someone(name, temperature=0.0, taste_spread=1.0)
        assert fan.answer(pair) == fan.answer(again)
    differing = {
        tuple(given.answer for given in someone(name, temperature=0.0, taste_spread=1.0).answer(pair))
        for name in names[:200]
    }
    assert len(differing) == 4


def test_a_label_depends_on_its_task_alone() -> None:
    annotator = someone(flip_share=0.1, abstain_share=0.1, taste_spread=0.1)
    tasks = [task(number, ("good", "fair")) for number in range(60)]
    whole = annotator.answer(tasks)
    assert annotator.answer(tasks[::-1]) == whole[::-1]
    assert [annotator.answer([one])[0] for one in tasks] == whole
    assert someone(seed=2, flip_share=0.1, abstain_share=0.1, taste_spread=0.1).answer(tasks) != whole


def test_a_recorded_value_of_every_stream() -> None:
    """The streams are part of a run's reproducibility: this changes only with a new label for every old run."""
    annotator = someone(flip_share=0.2, abstain_share=0.2, taste_spread=0.5, temperature_spread=0.5)
    signs = "".join(
        "-" if given.answer is None else given.answer.preferred[0] if isinstance(given.answer, Choice) else "?"
        for given in annotator.answer([task(number, ("good", "fair")) for number in range(24)])
    )
    assert signs == "ggggf--fgfgfgfggfg-gggg-"


def test_settings_tell_annotators_apart_but_not_pools() -> None:
    assert someone(temperature=0.5).settings != someone(temperature=0.6).settings
    assert someone(num_annotators=3).settings == someone(num_annotators=4).settings
    assert someone(seed=1).settings != someone(seed=2).settings


def test_a_reward_that_does_not_apply_is_refused() -> None:
    broken = PoolAnnotator("s", SimulatedAnnotators(), lambda tasks: [[math.nan, 1.0]], 1, {})
    with pytest.raises(DataError, match="finite reward of every response, and got nan for 'good'"):
        broken.answer([task(0, ("good", "bad"))])


def test_a_pool_may_want_another_reward() -> None:
    config = SimulatedAnnotators(temperature=0.0, num_annotators=1, reward=RegexReward(pattern="oo", weight=-2.0))
    (member,) = make_annotators(config, AnnotatorResources(seed=1)).members
    assert [given.answer for given in member.answer([task(0, ("good", "bad"))])] == [Choice("bad")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": (1.0,)}, r"weights has one number for each of num_annotators \(3\), not 1"),
        ({"strength_margins": (1.0,)}, "two ascending numbers"),
        ({"strength_margins": (2.0, 1.0)}, "two ascending numbers"),
        ({"rating_low": 1.0, "rating_high": 1.0}, "less than rating_high"),
        ({"temperature": -1.0}, "temperature"),
        ({"flip_share": 1.1}, "flip_share"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulatedAnnotators(**fields)
