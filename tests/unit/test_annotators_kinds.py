"""Mixtures, rules, functions and people as annotators; what is found before anybody is asked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.annotators import (
    AnyAnnotatorConfig,
    FunctionAnnotator,
    HumanAnnotators,
    JudgeAnnotator,
    MixtureAnnotators,
    MixturePart,
    RuleAnnotator,
    SimulatedAnnotators,
)
from rlhf.config.compose import load_config
from rlhf.config.data import EmbeddedData, FileData
from rlhf.config.rewards import ExactAnswerReward, FunctionReward, GoldReward, LengthReward, ModelReward, RegexReward
from rlhf.errors import ConfigError, DataError
from rlhf.preferences.annotators import (
    AnnotatorResources,
    Given,
    People,
    ShownResponse,
    ShownTask,
    audience_of,
    make_annotators,
    needs_people,
    part_of,
)
from rlhf.preferences.annotators.checks import check_annotators
from rlhf.preferences.store import Choice, Ranking, Rating, TaskKind, Tie
from rlhf.records import Message, Prompt, PromptContent
from rlhf.rewards.build import LoadedModel
from rlhf.rewards.composition import ScoreStatistics
from rlhf.rewards.protocol import RewardBatch
from tests.reward_example import write_rewards

KEY = "preferences.annotator"


FILM = "My cousin and I saw the new film on Friday ."


def task(
    *texts: str,
    prompt: PromptContent = "p",
    kind: TaskKind = "pairwise",
    scale: int | None = None,
    key: str = "k",
    **columns: Any,
) -> ShownTask:
    responses = tuple(ShownResponse(f"id of {text}", text, index) for index, text in enumerate(texts))
    return ShownTask(f"task {key}", kind, Prompt(prompt, columns), responses, key, scale)


def answer(config: AnyAnnotatorConfig, *tasks: ShownTask, **resources: Any) -> list[Given]:
    (member,) = make_annotators(config, AnnotatorResources(seed=1, **resources)).members
    member.prepare(tasks)
    return member.answer(tasks)


def function_file(folder: Path, body: str) -> str:
    path = folder / "annotators.py"
    path.write_text(body)
    return str(path)


def mixture(**shares: float) -> MixtureAnnotators:
    kinds: dict[str, Any] = {
        "people": HumanAnnotators(),
        "rest": SimulatedAnnotators(),
        "rule": RuleAnnotator(reward=RegexReward(pattern="x")),
    }
    return MixtureAnnotators(
        parts={name: MixturePart(share=share, annotator=kinds[name]) for name, share in shares.items()}
    )


def test_the_parts_of_a_mixture_have_their_shares_and_stay() -> None:
    config = mixture(people=0.1, rest=0.65, rule=0.25)
    parts = [part_of(config, 7, f"prompt {number}") for number in range(4000)]
    for name, share in (("people", 0.1), ("rest", 0.65), ("rule", 0.25)):
        assert abs(parts.count(name) / 4000 - share) < 4.5 * math.sqrt(share * (1 - share) / 4000)
    assert parts == [part_of(config, 7, f"prompt {number}") for number in range(4000)]
    assert parts != [part_of(config, 8, f"prompt {number}") for number in range(4000)]
    kinds = {"people": "human", "rest": "simulated", "rule": "rule"}
    for number in range(50):
        assert audience_of(config, 7, f"prompt {number}") == kinds[parts[number]]
    # More people: whoever was theirs before still is.
    more = mixture(people=0.2, rest=0.55, rule=0.25)
    assert all(part_of(more, 7, f"prompt {n}") == "people" for n in range(4000) if parts[n] == "people")


def test_people_are_a_marker() -> None:
    assert needs_people(mixture(people=0.5, rest=0.5))
    assert needs_people(HumanAnnotators())
    assert not needs_people(mixture(rule=0.5, rest=0.5))
    assert not needs_people(SimulatedAnnotators())
    assert make_annotators(HumanAnnotators(), AnnotatorResources(seed=1)).members == []
    assert audience_of(HumanAnnotators(), 1, "p") == "human"
    with pytest.raises(ConfigError, match="1 tasks are for people"):
        People().answer([task("a", "b")])


def test_two_parts_cannot_have_annotators_of_one_name() -> None:
    parts = {
        name: MixturePart(share=0.5, annotator=SimulatedAnnotators(name="same", num_annotators=1)) for name in "ab"
    }
    with pytest.raises(ConfigError, match=r"preferences\.annotator: two annotators are called same-1"):
        make_annotators(MixtureAnnotators(parts=parts), AnnotatorResources(seed=1))


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"people": 1.0}, "at least two parts, not 1"),
        ({"people": 0.2, "rest": 0.7}, "add up to 1, not 0.9: people 0.2"),
    ],
)
def test_shares_that_do_not_fit_are_refused(shares: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture(**shares)


def test_a_rule_prefers_the_higher_score_and_ties_within_its_margin() -> None:
    length = LengthReward(unit="words", maximum=2, tolerance=10)  # -0.1 a word beyond two
    config = RuleAnnotator(reward=length, margin=0.15)
    pairs = [task("a b", "a b c"), task("a b", "a b c d"), task("a b c d e", "a")]
    given = answer(config, *pairs)
    assert [one.answer for one in given] == [Tie(), Choice("id of a b"), Choice("id of a")]
    assert given[1].comment == "scores in the order shown: 0, -0.2"
    # A negative weight turns it round.
    turned = RuleAnnotator(reward=LengthReward(unit="words", maximum=2, tolerance=10, weight=-1.0), margin=0.15)
    assert [one.answer for one in answer(turned, *pairs)][1:] == [Choice("id of a b c d"), Choice("id of a b c d e")]


def test_a_rule_ranks_and_rates() -> None:
    config = RuleAnnotator(reward=LengthReward(unit="words", maximum=1, tolerance=10), rating_low=-1.0, rating_high=0.0)
    ranking = answer(config, task("a b c", "a", "b", "a b", kind="ranking"))[0].answer
    assert isinstance(ranking, Ranking)
    assert [set(tier) for tier in ranking.tiers] == [{"id of a", "id of b"}, {"id of a b"}, {"id of a b c"}]
    rated = answer(config, task("a b c", kind="rating", scale=11))[0].answer
    assert rated == Rating(9)  # -0.2 on the line from -1 (1) to 0 (11)


def test_a_rule_abstains_where_its_reward_does_not_apply(tmp_path: Path) -> None:
    config = RuleAnnotator(reward=ExactAnswerReward())
    given = answer(config, task("it is 3", "it is 4", answer="4"), task("it is 3", "it is 4", answer=None))
    assert [one.answer for one in given] == [Choice("id of it is 4"), None]
    assert given[1].comment == "the rule does not apply"
    # A function may look at the tokens, and only a policy has any.
    functional = RuleAnnotator(reward=FunctionReward(file=write_rewards(tmp_path)))
    with pytest.raises(ConfigError, match=r"preferences\.annotator\.reward\.type=function looks at tokens"):
        answer(functional, task("a", "b"))


def test_annotators_may_want_no_opinions() -> None:
    """At temperature 0: two facts (2) against one favourable opinion (0.5 reserved, 2 less 1/6 otherwise)."""
    shown = task(" We sat in the first row . It ran for two hours .", " The music was good .", prompt=FILM)
    for wants, better in (("reserved", 0), ("favourable", 1)):
        config = SimulatedAnnotators(
            num_annotators=1, temperature=0.0, reward=GoldReward.model_validate({"wants": wants})
        )
        (given,) = answer(config, shown)
        assert given.answer == Choice(shown.responses[better].id)


class Longest:
    """A reward model of its own: the number of tokens."""

    may_abstain = False

    def score(self, batch: RewardBatch) -> torch.Tensor:
        return batch.response_mask.sum(1).float()


def test_a_rule_goes_by_a_reward_model_normalised_and_weighted() -> None:
    asked: list[tuple[str | None, str]] = []

    def load(path: str | None, key: str) -> LoadedModel:
        asked.append((path, key))
        return LoadedModel(Longest(), ScoreStatistics(mean=1.0, std=2.0))

    from rlhf.models.scratch import train_tokenizer

    tokenizer = train_tokenizer(["a b c"], 300, 64)
    config = RuleAnnotator(reward=ModelReward(path="some/model", weight=3.0))
    given = answer(config, task("a", "abcabc"), tokenizer=tokenizer, load_model=load)
    assert asked == [("some/model", "preferences.annotator.reward.path")]
    assert given[0].answer == Choice("id of abcabc")
    # "a" and EOS are 2 tokens: 3 * (2 - 1) / 2.
    assert given[0].comment.startswith("scores in the order shown: 1.5, ")
    with pytest.raises(ConfigError, match="no reward model can be loaded here"):
        answer(config, task("a", "b"), tokenizer=tokenizer)


@pytest.mark.parametrize("made", [RuleAnnotator, SimulatedAnnotators])
def test_an_annotator_needs_something_to_go_by(made: Any) -> None:
    with pytest.raises(ValueError, match=r"reward\.path is null"):
        made(reward=ModelReward())
    with pytest.raises(ValueError, match=r"reward\.weight is 0"):
        made(reward=GoldReward(weight=0.0))


FUNCTION = """
def annotate(prompts, first, second, difficulty, bonus=0):
    verdicts = {"easy": "first", "hard": "second", "equal": "tie", "odd": None, "even": 0.0, "sure": 1, "bad": "left"}
    assert all(isinstance(text, str) for text in (*first, *second))
    return [verdicts[name] for name in difficulty]

def shares(prompts, first, second, **columns):
    return [columns["share"]] * len(prompts)

def broken(prompts):
    return "first"

def raising(prompts):
    raise KeyError("deep inside")
"""


def test_a_function_answers_pairs(tmp_path: Path) -> None:
    config = FunctionAnnotator(file=function_file(tmp_path, FUNCTION))
    names = ("easy", "hard", "equal", "odd", "even", "sure")
    tasks = [task("a", "b", prompt=(Message("user", "hi"),), difficulty=name) for name in names]
    first, second = Choice("id of a"), Choice("id of b")
    assert [one.answer for one in answer(config, *tasks)] == [first, second, Tie(), None, second, first]


def test_a_probability_is_drawn_from(tmp_path: Path) -> None:
    config = FunctionAnnotator(file=function_file(tmp_path, FUNCTION), function="shares", arguments={"share": 0.3})
    given = answer(config, *(task("a", "b", key=str(number)) for number in range(2000)))
    share = sum(one.answer == Choice("id of a") for one in given) / 2000
    assert abs(share - 0.3) < 4.5 * math.sqrt(0.21 / 2000)


@pytest.mark.parametrize(
    ("function", "columns", "message"),
    [
        ("annotate", {"difficulty": "bad"}, 'returned \'left\' for a pair; expected "first", "second"'),
        ("annotate", {}, r"asks for difficulty, which is neither an input \(prompts, first, second\)"),
        ("broken", {}, "expected a list of 1 verdicts, one for each pair; it returned 'first'"),
        ("raising", {}, "KeyError: 'deep inside'"),
    ],
)
def test_what_a_function_cannot_say_is_named(
    tmp_path: Path, function: str, columns: dict[str, Any], message: str
) -> None:
    config = FunctionAnnotator(file=function_file(tmp_path, FUNCTION), function=function)
    with pytest.raises(DataError, match=rf"preferences\.annotator\.function={function}.*{message}"):
        answer(config, task("a", "b", **columns))


def test_a_function_takes_pairs_only_and_its_arguments_are_free(tmp_path: Path) -> None:
    config = FunctionAnnotator(file=function_file(tmp_path, FUNCTION))
    with pytest.raises(ConfigError, match="a function answers pairs, and there are rating tasks"):
        answer(config, task("a", kind="rating", scale=5))
    with pytest.raises(ValueError, match="arguments names first"):
        FunctionAnnotator(file="x.py", arguments={"first": 1})


def test_what_is_not_there_is_found_before_anybody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = EmbeddedData()
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    cases: list[tuple[AnyAnnotatorConfig, str]] = [
        (FunctionAnnotator(file=str(tmp_path / "none.py")), r"annotator\.file=.*there is no such file"),
        (FunctionAnnotator(file=function_file(tmp_path, FUNCTION), function="other"), "does not define it"),
        (HumanAnnotators(instructions=str(tmp_path / "none.md")), r"annotator\.instructions=.*no such file"),
        (JudgeAnnotator(model=str(tmp_path / "none")), r"annotator\.model"),
        (
            JudgeAnnotator(address="http://x/v1", model_name="m", api_key_variable="NO_SUCH_KEY"),
            r"annotator\.api_key_variable=NO_SUCH_KEY",
        ),
        (
            JudgeAnnotator(address="http://x/v1", model_name="m", template=str(tmp_path / "none.txt")),
            r"annotator\.template=",
        ),
        (RuleAnnotator(reward=FunctionReward(file="none.py")), r"annotator\.reward\.file=none\.py"),
    ]
    for config, message in cases:
        with pytest.raises(ConfigError, match=message):
            check_annotators(config, embedded, KEY)
    files = FileData(path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"annotator\.reward\.type=gold needs data=embedded"):
        check_annotators(SimulatedAnnotators(), files, KEY)
    with pytest.raises(ConfigError, match=r"annotator\.parts\.rest\.annotator\.reward\.type=gold"):
        check_annotators(mixture(people=0.5, rest=0.5), files, KEY)
    check_annotators(SimulatedAnnotators(), embedded, KEY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["=simulated", ".temprature=0.1"], r"did you mean preferences\.annotator\.temperature\?"),
        (["=humn"], r"choose its kind with preferences\.annotator\.type=simulated"),
        (["=judge", ".model=m", ".tries=3"], r"preferences\.annotator\.tries = 3"),
        (
            ["=rule", ".reward.type=regex", ".reward.patern=a"],
            r"did you mean preferences\.annotator\.reward\.pattern\?",
        ),
        (["=rule"], r"reward\.path is null"),
        (["=mixture"], "at least two parts, not 0"),
        (
            ["=mixture", ".parts.a.share=1", ".parts.a.annotator=simulated", ".parts.a.annotator.flip_shar=0.2"],
            r"did you mean preferences\.annotator\.parts\.a\.annotator\.flip_share\?",
        ),
        (
            ["=mixture", ".parts.a.share=1", ".parts.a.annotator=simulated", ".parts.a.annotator.margin=0.2"],
            r"exists for preferences\.annotator\.parts\.a\.annotator of type rule, here it is simulated",
        ),
    ],
)
def test_mistyped_keys_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([KEY + argument for argument in arguments])


def test_the_name_of_a_kind_stands_for_its_section() -> None:
    arguments = ["=mixture", ".parts.people.share=0.1", ".parts.people.annotator=human", ".parts.rest.share=0.9"]
    arguments += [".parts.rest.annotator.type=simulated", ".parts.rest.annotator.flip_share=0.25"]
    loaded = load_config([KEY + argument for argument in arguments])
    config = loaded.config.preferences.annotator
    assert isinstance(config, MixtureAnnotators)
    assert config.parts["people"].annotator == HumanAnnotators()
    assert config.parts["rest"].annotator == SimulatedAnnotators(flip_share=0.25)
    human = load_config([KEY + "=human", KEY + ".port=8123"])
    assert human.config.preferences.annotator == HumanAnnotators(port=8123)
