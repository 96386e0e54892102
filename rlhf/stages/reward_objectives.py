"""From comparisons and ratings to the examples that a reward model is trained on, as `reward_model.loss` says.

An example is a prompt with its responses and what is known about them: labelled pairs of them, their order, or a
rating. A step takes `batch_size` examples; the loss is the mean over them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rlhf.config.reward_model import (
    BestOfKLoss,
    BradleyTerryLoss,
    KwiseLoss,
    PlackettLuceLoss,
    RatingLoss,
    RewardModelConfig,
)
from rlhf.data.tokenization import encode_pair
from rlhf.errors import DataError
from rlhf.records import Comparison, PromptContent, RatedResponse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Objective = Literal["pairs", "ranking", "choice", "rating"]
OrderLoss = PlackettLuceLoss | BestOfKLoss
_SHOWN = 80


@dataclass(frozen=True)
class Example:
    """A prompt and its different responses.

    `pairs` are (chosen, rejected) places among the responses, with the label's probability that chosen is better and
    its margin; `weights` are factors of the pairs' losses. A ranking has its responses in order, the best first, and
    one weight; a choice has the best first and the others in any order. A rated response has one response, one target
    and one weight.
    """

    prompt: PromptContent
    responses: tuple[str, ...]
    weights: tuple[float, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    probabilities: tuple[float, ...] = ()
    margins: tuple[float, ...] = ()
    targets: tuple[float, ...] = ()


@dataclass(frozen=True)
class RatingScale:
    """How ratings become targets: target = (rating - origin) / unit.

    For squared errors the mean and standard deviation of the training ratings, so that a score is a standardised
    rating; for the logistic form the lowest rating and the distance to the highest, so that sigmoid(score) is a
    rating's place between them.
    """

    form: Literal["squared", "logistic"]
    origin: float
    unit: float

    def target(self, rating: float) -> float:
        """What a score, or its sigmoid, is to be; held-out ratings beyond the training ratings count as the ends."""
        target = (rating - self.origin) / self.unit
        return min(max(target, 0.0), 1.0) if self.form == "logistic" else target

    def rating(self, score: float) -> float:
        """The rating that a score stands for."""
        if self.form == "logistic":
            score = 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))
        return self.origin + self.unit * score

    def to_json(self) -> dict[str, Any]:
        """For the file beside the model."""
        return {"form": self.form, "origin": self.origin, "unit": self.unit}


@dataclass(frozen=True)
class TrainingSet:
    """The examples of a loss, and what is to be known about them.

    `plain`: every example is one pair with a certain label and weight 1, all of it what TRL's trainer can do.
    `counts` are numbers for the stage's summary.
    """

    objective: Objective
    examples: list[Example]
    plain: bool = False
    scale: RatingScale | None = None
    counts: dict[str, int] = field(default_factory=dict)


def comparison_set(section: RewardModelConfig, comparisons: Sequence[Comparison]) -> TrainingSet:
    """The training comparisons as examples of a loss on comparisons.

    Raises `DataError` where they lack what the loss is made of: margins, agreement, a named source, prompts with
    several comparisons, rankings that are complete.
    """
    loss = section.loss
    assert not isinstance(loss, RatingLoss)
    if isinstance(loss, BradleyTerryLoss | KwiseLoss):
        _check_columns(loss, comparisons)
    source_weights = _source_weights(section, comparisons)
    kept, weights = [], []
    num_ties = 0
    for comparison in comparisons:
        tie = is_tie(comparison)
        num_ties += tie
        weight = source_weights.get(comparison.source or "", 1.0)
        if weight and not (tie and _leaves_out_ties(loss)):
            agreement = comparison.agreement if _by_agreement(loss) else None
            kept.append(comparison)
            weights.append(weight * (1.0 if agreement is None else agreement))
    counts = {"num_ties": num_ties, "num_train_left_out": len(comparisons) - len(kept)}
    weights = _with_mean_one(weights)
    if isinstance(loss, KwiseLoss):
        return TrainingSet("pairs", _grouped(loss, kept, weights), counts=counts)
    if isinstance(loss, PlackettLuceLoss):
        return TrainingSet("ranking", _rankings(loss, kept, weights), counts=counts)
    if isinstance(loss, BestOfKLoss):
        return TrainingSet("choice", _choices(loss, kept, weights), counts=counts)
    examples = [_pair_example(loss, row, weight) for row, weight in zip(kept, weights, strict=True)]
    certain = all(example.probabilities[0] == 1.0 and example.weights[0] == 1.0 for example in examples)
    plain = certain and not (loss.label_smoothing or loss.use_margin or loss.ties in ("davidson", "rao_kupper"))
    return TrainingSet("pairs", examples, plain, counts=counts)


def rating_set(section: RewardModelConfig, ratings: Sequence[RatedResponse]) -> TrainingSet:
    """The training ratings as examples. Raises `DataError` when all of them are equal, which leaves nothing to fit."""
    loss = section.loss
    assert isinstance(loss, RatingLoss)
    weights = _source_weights(section, ratings)
    kept = [row for row in ratings if weights.get(row.source or "", 1.0)]
    values = [row.rating for row in kept]
    if not values:
        return TrainingSet("rating", [])
    if min(values) == max(values):
        raise DataError(
            f"reward_model.loss.type=rating: all {len(values)} training ratings are {values[0]:g}, so there is nothing "
            "to tell apart; look at the ratings"
        )
    if loss.form == "logistic":
        scale = RatingScale("logistic", min(values), max(values) - min(values))
    else:
        mean = math.fsum(values) / len(values)
        scale = RatingScale("squared", mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values)))
    factors = _with_mean_one([weights.get(row.source or "", 1.0) for row in kept])
    examples = [
        Example(row.prompt, (row.response,), (factor,), targets=(scale.target(row.rating),))
        for row, factor in zip(kept, factors, strict=True)
    ]
    return TrainingSet("rating", examples, scale=scale, counts={"num_train_left_out": len(ratings) - len(kept)})


def bootstrap_order(num_examples: int, seed: int) -> list[int]:
    """As many examples' numbers, drawn with replacement as `seed` says."""
    return random.Random(f"{seed}/bootstrap").choices(range(num_examples), k=num_examples)


def is_tie(comparison: Comparison) -> bool:
    """Whether neither response is the better one."""
    return comparison.probability == 0.5


def rated_pairs(ratings: Sequence[RatedResponse]) -> list[Comparison]:
    """Comparisons of differently rated responses to one prompt: what the accuracy of a rating model is measured on."""
    prompts: dict[PromptContent, list[RatedResponse]] = {}
    for row in ratings:
        prompts.setdefault(row.prompt, []).append(row)
    pairs = []
    for rows in prompts.values():
        for place, first in enumerate(rows):
            for second in rows[place + 1 :]:
                if first.rating != second.rating and first.response != second.response:
                    better, worse = sorted((first, second), key=lambda row: -row.rating)
                    margin = better.rating - worse.rating
                    pairs.append(
                        Comparison(better.prompt, better.response, worse.response, margin, source=better.source)
                    )
    return pairs


def encoded_rows(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> dict[str, list[Any]]:
    """The columns of the tokenised examples, as `ExampleCollator` takes them."""
    columns: dict[str, list[Any]] = {name: [] for name in ("prompt_ids", "responses", "weights")}
    columns |= {name: [] for name in ("chosen", "rejected", "probabilities", "margins", "targets")}
    for example in examples:
        encoded = [encode_pair(tokenizer, example.prompt, response) for response in example.responses]
        columns["prompt_ids"].append(encoded[0].prompt_ids)
        columns["responses"].append([pair.response_ids for pair in encoded])
        columns["chosen"].append([chosen for chosen, _ in example.pairs])
        columns["rejected"].append([rejected for _, rejected in example.pairs])
        for name in ("weights", "probabilities", "margins", "targets"):
            columns[name].append(list(getattr(example, name)))
    return columns


def _leaves_out_ties(loss: BradleyTerryLoss | KwiseLoss | OrderLoss) -> bool:
    return not isinstance(loss, OrderLoss) and loss.ties == "leave_out"


def _by_agreement(loss: BradleyTerryLoss | KwiseLoss | OrderLoss) -> bool:
    return not isinstance(loss, OrderLoss) and loss.weight_by_agreement


def _check_columns(loss: BradleyTerryLoss | KwiseLoss, comparisons: Sequence[Comparison]) -> None:
    wanted = {"use_margin": (loss.use_margin, "margin"), "weight_by_agreement": (loss.weight_by_agreement, "agreement")}
    for knob, (is_set, column) in wanted.items():
        if is_set and comparisons and all(getattr(row, column) is None for row in comparisons):
            raise DataError(
                f"reward_model.loss.{knob}=true needs comparisons with a field `{column}`, and none of the "
                f"{len(comparisons):,} for training has one. Add it to the data, or set reward_model.loss.{knob}=false"
            )


def _source_weights(
    section: RewardModelConfig, rows: Sequence[Comparison] | Sequence[RatedResponse]
) -> dict[str, float]:
    sources = sorted({row.source for row in rows if row.source is not None})
    unknown = sorted(set(section.source_weights) - set(sources))
    if unknown:
        raise DataError(
            f"reward_model.source_weights names the source {unknown[0]!r}, and no training example has it; the sources "
            f"there are: {', '.join(sources) or 'none'}"
        )
    return section.source_weights


def _with_mean_one(weights: list[float]) -> list[float]:
    """Weights on the scale of plain examples, so that a learning rate means the same."""
    mean = math.fsum(weights) / max(len(weights), 1)
    return [weight / mean for weight in weights] if mean else weights


def _pair_example(loss: BradleyTerryLoss, row: Comparison, weight: float) -> Example:
    return Example(
        row.prompt, (row.chosen, row.rejected), (weight,), ((0, 1),), (_probability(row),), (_margin(loss, row),)
    )


def _probability(row: Comparison) -> float:
    return 1.0 if row.probability is None else row.probability


def _margin(loss: BradleyTerryLoss | KwiseLoss, row: Comparison) -> float:
    """A tie has none: neither response leads."""
    return row.margin if loss.use_margin and row.margin is not None and not is_tie(row) else 0.0


def _of_one_prompt(
    loss: KwiseLoss | OrderLoss, rows: Sequence[Comparison], weights: Sequence[float]
) -> list[tuple[list[Comparison], list[float], list[str]]]:
    """Comparisons of a prompt with their weights, and the different responses in them. Raises `DataError`."""
    groups: dict[PromptContent, tuple[list[Comparison], list[float], list[str]]] = {}
    for row, weight in zip(rows, weights, strict=True):
        comparisons, factors, responses = groups.setdefault(row.prompt, ([], [], []))
        comparisons.append(row)
        factors.append(weight)
        responses += [text for text in (row.chosen, row.rejected) if text not in responses]
    for prompt, (_, _, responses) in groups.items():
        if len(responses) > loss.max_responses:
            raise DataError(
                f"reward_model.loss.type={loss.type}: the prompt {_shown(prompt)} has {len(responses)} responses, and "
                f"all of a prompt's are read at once; reward_model.loss.max_responses is {loss.max_responses}. Raise "
                "it, or take loss.type=bradley_terry"
            )
    if groups and all(len(responses) < 3 for _, _, responses in groups.values()):
        raise DataError(
            f"reward_model.loss.type={loss.type} learns from several comparisons of a prompt at once, and each of the "
            f"{len(groups):,} prompts has two responses only. Set reward_model.loss.type=bradley_terry, or collect "
            "more responses a prompt"
        )
    return list(groups.values())


def _grouped(loss: KwiseLoss, rows: Sequence[Comparison], weights: Sequence[float]) -> list[Example]:
    """One example a prompt; a pair's weight is divided by the number of its prompt's pairs.

    Ouyang et al. 2022 (arXiv 2203.02155), section 3.5 and equation 1.
    """
    examples = []
    for comparisons, factors, responses in _of_one_prompt(loss, rows, weights):
        places = {text: place for place, text in enumerate(responses)}
        examples.append(
            Example(
                comparisons[0].prompt,
                tuple(responses),
                tuple(factor / len(comparisons) for factor in factors),
                tuple((places[row.chosen], places[row.rejected]) for row in comparisons),
                tuple(_probability(row) for row in comparisons),
                tuple(_margin(loss, row) for row in comparisons),
            )
        )
    return examples


def _rankings(loss: PlackettLuceLoss, rows: Sequence[Comparison], weights: Sequence[float]) -> list[Example]:
    """One example a prompt: the order that all its pairs give. Raises `DataError` where they give none."""
    examples = []
    for comparisons, factors, responses in _of_one_prompt(loss, rows, weights):
        outcomes = {(row.chosen, row.rejected) for row in comparisons}
        wins = {text: sum((text, other) in outcomes for other in responses) for text in responses}
        # In an order of K the best wins K - 1 times, the next K - 2 times, and so on; no other set of pairs does.
        complete = len(outcomes) == len(responses) * (len(responses) - 1) // 2
        ordered = sorted(wins.values()) == list(range(len(responses)))
        if not complete or not ordered or any(_probability(row) != 1.0 for row in comparisons):
            raise DataError(
                f"reward_model.loss.type=plackett_luce needs a complete order of every prompt's responses without "
                f"ties; the {len(outcomes)} pairs of the {len(responses)} responses to {_shown(comparisons[0].prompt)} "
                "give none. Set reward_model.loss.type=kwise, which takes any pairs"
            )
        weight = math.fsum(factors) / len(factors)
        order = tuple(sorted(responses, key=lambda text: -wins[text]))
        examples.append(Example(comparisons[0].prompt, order, (weight,)))
    return examples


def _choices(loss: BestOfKLoss, rows: Sequence[Comparison], weights: Sequence[float]) -> list[Example]:
    """One example a prompt: the response that won against each of the others, first. Raises `DataError` without one."""
    examples = []
    for comparisons, factors, responses in _of_one_prompt(loss, rows, weights):
        beaten: dict[str, set[str]] = {text: set() for text in responses}
        for row in comparisons:
            if _probability(row) == 1.0:
                beaten[row.chosen].add(row.rejected)
        best = [text for text in responses if len(beaten[text]) == len(responses) - 1]
        if len(best) != 1 or any(best[0] in losers for losers in beaten.values()):
            raise DataError(
                "reward_model.loss.type=best_of_k needs one response of every prompt that is chosen over each of the "
                f"others; of the {len(responses)} responses to {_shown(comparisons[0].prompt)} none is. Set "
                "reward_model.loss.type=kwise, which takes any pairs"
            )
        others = [text for text in responses if text != best[0]]
        examples.append(Example(comparisons[0].prompt, (best[0], *others), (math.fsum(factors) / len(factors),)))
    return examples


def _shown(prompt: PromptContent) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1].content if prompt else ""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
