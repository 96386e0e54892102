"""Judges: the gold judge is the gold reward; the classifier learns, is deterministic and loads lazily."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from rlhf.data.embedded import gold_reward
from rlhf.errors import DataError
from rlhf.evaluation.judges import ClassifierJudge, GoldJudge, Judge, whole_text
from rlhf.records import Message, PromptContent
from rlhf.statistics.intervals import wilson

PROMPT = "My cousin and I saw the new film on Friday ."
LIKED, NEUTRAL, DISLIKED = ("warm", "bright", "witty"), ("film", "scene", "story", "end"), ("cold", "dull", "stale")


def labelled(count: int, seed: int) -> list[tuple[str, bool]]:
    """Texts of neutral words with one word that decides the label."""
    generator = random.Random(seed)
    texts = []
    for number in range(count):
        words = generator.choices(NEUTRAL, k=5)
        words.insert(generator.randrange(5), generator.choice(LIKED if number % 2 else DISLIKED))
        texts.append((" ".join(words), bool(number % 2)))
    return texts


def test_gold_judge_is_the_gold_reward() -> None:
    judge: Judge = GoldJudge()
    responses = [" The music was wonderful .", " great great great"]
    prompts: list[PromptContent] = [PROMPT, PROMPT]
    assert judge.name == "gold"
    assert judge.score(prompts, responses) == [gold_reward(PROMPT, response) for response in responses]


def test_judges_refuse_unequal_numbers() -> None:
    with pytest.raises(ValueError, match="zip"):
        GoldJudge().score([PROMPT], [])
    with pytest.raises(ValueError, match="zip"):
        ClassifierJudge(labelled(20, 0)).score([PROMPT], [])


def test_classifier_learns_what_decides_the_label() -> None:
    judge = ClassifierJudge(labelled(200, 0))
    assert judge.held_out_accuracy(labelled(100, 1)) == wilson(100, 100)
    low, high = judge.score(["film scene", "film scene"], [" cold story", " warm story"])
    assert 0 <= low < 0.2 < 0.8 < high <= 1


def test_classifier_accuracy_counts_what_is_right() -> None:
    judge = ClassifierJudge(labelled(200, 0))
    wrong = [(text, not preferred) for text, preferred in labelled(30, 2)]
    assert judge.held_out_accuracy([*labelled(70, 1), *wrong], confidence=0.9) == wilson(70, 100, confidence=0.9)


def test_preferred_share_counts_texts_above_one_half() -> None:
    judge = ClassifierJudge(labelled(200, 0))
    share = judge.preferred_share(["film"] * 4, [" warm", " cold", " witty", " bright"])
    assert share == wilson(3, 4)


def test_classifier_reads_prompt_and_response_together() -> None:
    judge = ClassifierJudge(labelled(200, 0))
    assert (
        judge.score(["warm film"], [" scene"])
        == judge.score(["warm"], [" film scene"])
        == judge.score_texts(["warm film scene"])
    )
    conversation: PromptContent = (Message("user", "warm film"), Message("assistant", "scene"))
    assert whole_text(conversation, "story") == "warm film scene story"
    assert judge.score([], []) == []


def test_classifier_is_deterministic() -> None:
    first, second = ClassifierJudge(labelled(100, 0)), ClassifierJudge(labelled(100, 0))
    texts = [text for text, _ in labelled(50, 3)]
    assert first.score_texts(texts) == second.score_texts(texts)


def test_every_option_of_the_classifier_matters() -> None:
    texts = [text for text, _ in labelled(20, 3)]
    base = ClassifierJudge(labelled(100, 0)).score_texts(texts)
    assert ClassifierJudge(labelled(100, 0), ngram_max=1).score_texts(texts) != base
    assert ClassifierJudge(labelled(100, 0), inverse_regularization=0.1).score_texts(texts) != base


def test_word_order_counts_with_longer_n_grams() -> None:
    texts = [("not bad", True), ("bad not", False)] * 20
    assert ClassifierJudge(texts, ngram_max=2).held_out_accuracy(texts).value == 1.0
    assert ClassifierJudge(texts, ngram_max=1).held_out_accuracy(texts).value == 0.5


@pytest.mark.parametrize("texts", [[], [("good", True)], [("bad", False), ("worse", False)]])
def test_classifier_needs_both_classes(texts: list[tuple[str, bool]]) -> None:
    with pytest.raises(DataError, match="both classes"):
        ClassifierJudge(texts)


def test_accuracy_needs_texts() -> None:
    with pytest.raises(DataError, match="held-out"):
        ClassifierJudge(labelled(20, 0)).held_out_accuracy([])


def test_scikit_learn_and_torch_are_not_imported_with_the_module() -> None:
    code = "import sys, rlhf.evaluation.judges; print(sorted({'sklearn', 'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
