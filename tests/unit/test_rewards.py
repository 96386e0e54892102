"""Rewards: each rule against numbers worked out by hand, their weighted sum, and the columns of the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf.config.data import FileData
from rlhf.config.model import ModelConfig
from rlhf.config.ppo import PPOConfig
from rlhf.config.rewards import (
    ExactAnswerReward,
    FunctionReward,
    GoldReward,
    KeywordReward,
    LengthReward,
    ModelReward,
    RegexReward,
    RepetitionReward,
    RewardConfig,
    SentimentReward,
)
from rlhf.data import load_prompts
from rlhf.data.embedded import gold_reward, reserved_reward
from rlhf.data.tokenization import encode_pair
from rlhf.errors import ConfigError
from rlhf.models.loading import load_tokenizer
from rlhf.rewards.build import LoadedModel, build_rewards, folder_loader
from rlhf.rewards.checks import preflight
from rlhf.rewards.composition import RewardSet, ScoreStatistics, WeightedReward, concatenate, part_means
from rlhf.rewards.learned import LearnedReward
from rlhf.rewards.protocol import RewardBatch, RewardError, columns_by_name
from rlhf.rewards.rules import NUMBER, RuleConfig, make_rule, same_answer
from rlhf.stages.sampling import decode_responses, load_encoded_prompts
from tests.ppo_example import write_models
from tests.reward_example import make_batch, write_rewards

NAN = math.nan


def scores(config: RuleConfig, batch: RewardBatch) -> list[float]:
    result = make_rule(config).score(batch)
    assert result.dtype == torch.float32
    return [round(value, 6) for value in result.tolist()]


# --- rules ------------------------------------------------------------------------------------------------------------


def test_a_number_before_a_unit_is_not_cut_at_its_fraction() -> None:
    found = [NUMBER.findall(text) for text in ("72.5kg", "1,000.50m", "1.5e3", "3.5.", "7, or 8")]
    assert found == [[], [], [], ["3.5"], ["7", "8"]]


def test_length_falls_in_a_straight_line_outside_its_limits() -> None:
    batch = make_batch(["a"] * 4, tokens=[[5] * n for n in (1, 4, 8, 30)])
    # Limits 3 to 6, one more at each 4 units: 2 below -> -0.5; inside -> 0; 2 above -> -0.5; 24 above -> -1.
    assert scores(LengthReward(minimum=3, maximum=6, tolerance=4), batch) == [-0.5, 0.0, -0.5, -1.0]
    words = make_batch(["one", "one two three", ""])
    assert scores(LengthReward(unit="words", maximum=1, tolerance=4), words) == [0.0, -0.5, 0.0]
    assert scores(LengthReward(unit="words", minimum=2, maximum=None, tolerance=4), words) == [-0.25, 0.0, -0.5]


def test_regex_searches_or_fits_the_whole_response() -> None:
    batch = make_batch(["say <b>x</b>", " <b>x</b>\n", "none"])
    assert scores(RegexReward(pattern="<b>.*</b>"), batch) == [1.0, 1.0, 0.0]
    assert scores(RegexReward(pattern="<b>.*</b>", whole=True, matched=2.0, unmatched=-1.0), batch) == [-1.0, 2.0, -1.0]


def test_keywords_are_whole_words() -> None:
    batch = make_batch(["Please, thank you", "pleased", "thank", ""])
    words = ("please", "thank you")
    assert scores(KeywordReward(words=words), batch) == [1.0, 0.0, 0.0, 0.0]
    assert scores(KeywordReward(words=("please", "thank")), batch) == [1.0, 0.0, 0.5, 0.0]
    assert scores(KeywordReward(words=("please", "thank"), count="any"), batch) == [1.0, 0.0, 1.0, 0.0]
    assert scores(KeywordReward(words=("please", "thank"), count="all"), batch) == [1.0, 0.0, 0.0, 0.0]
    assert scores(KeywordReward(words=("please",), case_sensitive=True), batch) == [0.0] * 4


def test_exact_answer_takes_the_last_number() -> None:
    responses = ["It is 3, no: 72.", "72 or 73", "about 1,000.0", "seventy-two", "x72", "-5"]
    answers = ["so 6*12 #### 72", 72, "1000", "72", "72", "-5"]
    batch = make_batch(responses, columns={"answer": answers})
    assert scores(ExactAnswerReward(), batch) == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    assert scores(ExactAnswerReward(correct=2.0, wrong=-1.0), batch) == [2.0, -1.0, 2.0, -1.0, -1.0, 2.0]


def test_exact_answer_takes_the_last_fit_of_a_pattern() -> None:
    batch = make_batch(
        ["Answer: B\nAnswer: A", "Answer:  the  cat", "no", "Answer: C"],
        columns={"right": ["A", "the cat", "A", None]},
    )
    result = make_rule(ExactAnswerReward(column="right", pattern="Answer: *(.+)")).score(batch)
    assert result[:3].tolist() == [1.0, 1.0, 0.0]
    assert bool(result[3].isnan())
    assert scores(
        ExactAnswerReward(column="right", pattern="[ABC]"), make_batch(["B A"], columns={"right": ["A"]})
    ) == [1]


def test_exact_answer_says_what_is_missing() -> None:
    with pytest.raises(RewardError, match="column answer, which the data does not have; its columns are: level"):
        make_rule(ExactAnswerReward()).score(make_batch(["1"], columns={"level": [1]}))
    with pytest.raises(RewardError, match="holds 'blue', in which there is no number"):
        make_rule(ExactAnswerReward()).score(make_batch(["1"], columns={"answer": ["blue"]}))


@pytest.mark.parametrize(
    ("given", "expected", "equal"),
    [("1,000", "1000.0", True), ("$5", "5", True), ("0.1", "0.10", True), ("a  b", "a b", True), ("A", "a", False)],
)
def test_answers_are_equal_as_numbers_or_as_text(given: str, expected: str, equal: bool) -> None:
    assert same_answer(given, expected) is equal


def test_repetition_is_the_share_of_repeated_ngrams() -> None:
    # "a b a b a b": 5 bigrams, of which ab and ba are distinct.
    batch = make_batch(["a b a b a b", "a b c", "a"], tokens=[[1, 1, 1, 1], [1, 2, 3], [4]])
    assert scores(RepetitionReward(size=2), batch) == [-0.6, 0.0, 0.0]
    # Tokens: three bigrams (1, 1), one distinct.
    assert scores(RepetitionReward(size=2, unit="tokens"), batch) == [-0.666667, 0.0, 0.0]


def test_gold_is_the_corpus_own() -> None:
    prompt, response = "I thought the songs of the new film", " were great ."
    assert scores(GoldReward(), make_batch([response], [prompt])) == [round(gold_reward(prompt, response), 6)]
    reserved = scores(GoldReward(wants="reserved"), make_batch([response], [prompt]))
    assert reserved == [round(reserved_reward(prompt, response), 6)] != [round(gold_reward(prompt, response), 6)]


def test_sentiment_counts_opinions_alone() -> None:
    """Two opinions of 1 and one of -1: (1 + 1/3) / 2; "not good" is one of -1; a sentence without one is 0."""
    batch = make_batch(["great great bad", "was not good .", "the film . great .", ""])
    assert scores(SentimentReward(), batch) == [0.666667, 0.0, 0.75, 0.5]


def test_sentiment_needs_the_words_of_the_corpus() -> None:
    with pytest.raises(ConfigError, match=r"ppo\.rewards\.p\.type=sentiment needs data=embedded, whose words it knows"):
        preflight({"p": SentimentReward()}, FileData(path="x.jsonl"))


# --- the weighted sum -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixed:
    values: tuple[float, ...]
    may_abstain: bool = True

    def score(self, batch: RewardBatch) -> Tensor:
        return torch.tensor(self.values)


def test_the_score_is_the_weighted_sum_of_what_applies() -> None:
    rewards = RewardSet(
        (
            # Normalised: (1-3)/2, (3-3)/2, (7-3)/2.
            WeightedReward("model", Fixed((1.0, 3.0, 7.0)), 0.5, ScoreStatistics(3.0, 2.0)),
            WeightedReward("rule", Fixed((10.0, NAN, -1.0)), -2.0),
            WeightedReward("watched", Fixed((99.0, 99.0, NAN)), 0.0),
        )
    )
    result = rewards.score(make_batch(["a", "b", "c"]))
    assert result.total.tolist() == [-20.5, 0.0, 3.0]
    assert result.parts["model"].tolist() == [1.0, 3.0, 7.0]
    assert result.contributions["model"].tolist() == [-0.5, 0.0, 1.0]
    assert result.contributions["rule"][[0, 2]].tolist() == [-20.0, 2.0]
    assert bool(result.parts["rule"][1].isnan())
    assert part_means(result.parts) == {"model": 11 / 3, "rule": 4.5, "watched": 99.0}
    assert rewards.weights == {"model": 0.5, "rule": -2.0, "watched": 0.0}
    twice = concatenate([result, result])
    assert twice.total.tolist() == [-20.5, 0.0, 3.0] * 2
    assert list(twice.parts) == ["model", "rule", "watched"]


def test_a_response_that_nothing_applies_to_is_named() -> None:
    rewards = RewardSet((WeightedReward("rule", Fixed((1.0, NAN))), WeightedReward("watched", Fixed((1.0, 1.0)), 0.0)))
    with pytest.raises(
        RewardError, match="none of the rewards rule, watched applies to the response 'b' to the prompt 'q'"
    ):
        rewards.score(make_batch(["a", "b"], ["p", "q"]))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (Fixed((1.0, math.inf)), "reward bad gave inf for the response 'b' to the prompt 'q'"),
        (Fixed((1.0, NAN), may_abstain=False), "reward bad gave nan for the response 'b'"),
        (Fixed((1.0,)), r"reward bad gave scores of shape \(1,\) for 2 responses"),
    ],
)
def test_scores_that_cannot_be_trained_on(reward: Fixed, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        RewardSet((WeightedReward("bad", reward),)).score(make_batch(["a", "b"], ["p", "q"]))


def test_sets_that_make_no_sense() -> None:
    entry = WeightedReward("a", Fixed((1.0,)))
    for entries, message in (
        ((), "at least one"),
        ((entry, entry), "one name"),
        ((WeightedReward("a", Fixed((1.0,)), 0.0),), "every reward has weight 0"),
        ((WeightedReward("a", Fixed((1.0,)), NAN),), "not a finite number"),
    ):
        with pytest.raises(ConfigError, match=message):
            RewardSet(entries)


def test_every_type_is_built_and_a_model_is_loaded_once(tmp_path: Path) -> None:
    asked: list[tuple[str | None, str]] = []

    def load(path: str | None, key: str) -> LoadedModel:
        asked.append((path, key))
        return LoadedModel(Fixed((3.0,)), ScoreStatistics(1.0, 4.0))

    configs: dict[str, RewardConfig] = {
        "own": ModelReward(),
        "raw": ModelReward(normalize=False, weight=2.0),
        "other": ModelReward(path="x"),
        "mine": FunctionReward(file=write_rewards(tmp_path)),
        "short": LengthReward(),
    }
    built = build_rewards(configs, load_model=load)
    assert built.names == ("own", "raw", "other", "mine", "short")
    assert asked == [(None, "ppo.reward_model"), ("x", "ppo.rewards.other.path")]
    result = built.score(make_batch(["ab"], columns={"answer": [1]}))
    # (3-1)/4 + 2*3 + (3-1)/4 + 2*1/2 + 0
    assert result.total.tolist() == [8.0]
    assert build_rewards({}, load_model=load).names == ("reward_model",)
    plain = build_rewards({"own": ModelReward()}, load_model=load, use_statistics=False)
    assert plain.score(make_batch(["ab"])).total.tolist() == [3.0]


def test_a_learned_reward_scores_tokens_and_texts_alike_and_is_normalised(tmp_path: Path) -> None:
    inputs = write_models(tmp_path)
    config = PPOConfig()
    assert config.rewards == {}
    tokenizer = load_tokenizer(inputs["policy"])
    loader = folder_loader(
        inputs["reward_model"],
        ModelConfig(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        policy_tokenizer=tokenizer,
    )
    pairs = [encode_pair(tokenizer, "the film", text) for text in (" was good", " was bad and poor")]
    base = make_batch(["", ""], tokens=[pair.response_ids for pair in pairs])
    prompt = pairs[0].prompt_ids
    ids = torch.cat([torch.tensor([prompt, prompt]), base.input_ids[:, 2:]], dim=1)
    mask = torch.cat([torch.ones(2, len(prompt), dtype=torch.bool), base.response_mask], dim=1)
    responses = decode_responses(tokenizer, ids[:, len(prompt) :], base.response_mask)
    batch = RewardBatch(["the film"] * 2, responses, {}, ids, mask, len(prompt), base.response_mask, base.stopped)
    result = build_rewards(config.rewards, load_model=loader).score(batch)
    learned = loader(None, "ppo.reward_model").reward
    assert isinstance(learned, LearnedReward)
    assert learned.same_tokens
    raw = learned.score_tokens(ids, mask, len(prompt))
    texts = learned.score_texts(batch.prompts, responses, batch_size=1)
    assert torch.equal(result.parts["reward_model"], raw)
    assert torch.allclose(raw, torch.tensor(texts), atol=1e-5)
    # write_models stores mean 0.5 and standard deviation 2.
    assert torch.equal(result.total, (raw - 0.5) / 2.0)
    assert raw[0] != raw[1]


# --- columns of the data ----------------------------------------------------------------------------------------------


def test_columns_of_rows_reach_the_batch(tmp_path: Path) -> None:
    rows = ['{"prompt": "the film", "answer": "4"}', '{"prompt": "the book", "level": 2}']
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "validation.jsonl").write_text('{"prompt": "the", "answer": "1"}\n')
    (tmp_path / "test.jsonl").write_text('{"prompt": "was", "source": "s"}\n')
    data = FileData(path=str(tmp_path))
    assert [prompt.columns for prompt in load_prompts(data).train] == [{"answer": "4"}, {"level": 2}]
    tokenizer = load_tokenizer(write_models(tmp_path / "models")["policy"])
    prompts = load_encoded_prompts(data, tokenizer, print)
    # Every prompt has every column of the data, so that no batch lacks one.
    assert [prompt.columns for prompt in prompts["train"]] == [
        {"answer": "4", "level": None, "source": None},
        {"answer": None, "level": 2, "source": None},
    ]
    assert columns_by_name([prompt.columns for prompt in prompts["train"]]) == {
        "answer": ["4", None],
        "level": [None, 2],
        "source": [None, None],
    }


@pytest.mark.parametrize(
    "row",
    [
        '{"prompt": "p", "response": " r", "answer": "4"}',
        '{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}], "answer": "4"}',
        '{"prompt": "p", "chosen": " c", "rejected": " r", "answer": "4"}',
        '{"chosen": "\\n\\nHuman: p\\n\\nAssistant: c", "rejected": "\\n\\nHuman: p\\n\\nAssistant: r", "answer": "4"}',
        '{"input_text": "p", "output_text": " r", "answer": "4"}',
        '{"contents": [{"role": "user", "parts": [{"text": "p"}]}], "answer": "4"}',
    ],
)
def test_prompts_of_every_format_keep_further_fields(tmp_path: Path, row: str) -> None:
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    data = FileData.model_validate({"path": str(tmp_path), "splits": {"validation": 0.0, "test": 0.0}})
    (prompt,) = load_prompts(data).train
    assert prompt.columns["answer"] == "4"
