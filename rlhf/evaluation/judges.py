"""Judges: they score responses for the evaluation and are never part of a training signal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rlhf.data.embedded import gold_reward
from rlhf.errors import DataError
from rlhf.records import PromptContent
from rlhf.statistics import Interval, wilson

LabelledText = tuple[str, bool]
DECISION_THRESHOLD = 0.5


class Judge(Protocol):
    """Gives every response a number; more is better. `name` is shown in reports."""

    name: str

    def score(self, prompts: list[PromptContent], responses: list[str]) -> list[float]:
        """One score for each prompt and response, in their order."""


class GoldJudge:
    """The embedded corpus's gold reward."""

    name = "gold"

    def score(self, prompts: list[PromptContent], responses: list[str]) -> list[float]:
        """Gold rewards, in [-2, 2]."""
        return [gold_reward(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


class ClassifierJudge:
    """TF-IDF of word n-grams and a logistic regression, trained on labelled texts that no other stage sees.

    A score is the probability that the whole text, prompt and response together, is of the preferred class. Words are
    what white space separates, in lower case, so a word's score does not depend on a tokenizer. The training is
    deterministic. Raises `DataError` when the texts do not show both classes.
    """

    name = "classifier"

    def __init__(
        self, texts: Sequence[LabelledText], *, ngram_max: int = 2, inverse_regularization: float = 4.0
    ) -> None:
        labels = {preferred for _, preferred in texts}
        if labels != {True, False}:
            raise DataError(
                f"the classifier judge needs training texts of both classes; got {len(texts)} texts"
                + (f", all of them {'preferred' if True in labels else 'not preferred'}" if labels else "")
                + ". Check the data's labels, its preferred label and the share of texts kept for the judge."
            )
        # Imported here: scikit-learn takes a second, and most runs have another judge.
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import Pipeline, make_pipeline

        self._pipeline: Pipeline = make_pipeline(
            TfidfVectorizer(ngram_range=(1, ngram_max), token_pattern=r"\S+", lowercase=True, sublinear_tf=True),
            LogisticRegression(C=inverse_regularization, max_iter=1000),
        )
        self._pipeline.fit([text for text, _ in texts], [preferred for _, preferred in texts])
        self._preferred_column = list(self._pipeline.classes_).index(True)

    def score(self, prompts: list[PromptContent], responses: list[str]) -> list[float]:
        """Probabilities of the preferred class."""
        return self.score_texts([whole_text(p, r) for p, r in zip(prompts, responses, strict=True)])

    def score_texts(self, texts: Sequence[str]) -> list[float]:
        """Probabilities of the preferred class of whole texts."""
        if not texts:
            return []
        probabilities: Any = self._pipeline.predict_proba(list(texts))
        return [float(value) for value in probabilities[:, self._preferred_column]]

    def preferred_share(
        self, prompts: list[PromptContent], responses: list[str], *, confidence: float = 0.95
    ) -> Interval:
        """The share of texts that the judge calls preferred, with Wilson's interval."""
        scores = self.score(prompts, responses)
        return wilson(sum(score > DECISION_THRESHOLD for score in scores), len(scores), confidence=confidence)

    def held_out_accuracy(self, texts: Sequence[LabelledText], *, confidence: float = 0.95) -> Interval:
        """The share of labelled texts that the judge gets right, with Wilson's interval."""
        if not texts:
            raise DataError("the classifier judge's accuracy needs held-out labelled texts; there is none")
        scores = self.score_texts([text for text, _ in texts])
        right = sum(
            (score > DECISION_THRESHOLD) == preferred for score, (_, preferred) in zip(scores, texts, strict=True)
        )
        return wilson(right, len(texts), confidence=confidence)


def whole_text(prompt: PromptContent, response: str) -> str:
    """Prompt and response as one text; the turns of a conversation are joined by spaces."""
    if isinstance(prompt, str):
        return prompt + response
    return " ".join([*(message.content for message in prompt), response])
