"""What a saved reward model is worth, measured on all ranks: scores of held-out comparisons and ratings, and the
statistics that put its scores on a scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf import statistics
from rlhf.config.reward_model import ResponsesNormalization
from rlhf.data import load_demonstrations
from rlhf.data.splits import Splits
from rlhf.data.tokenization import EncodedPair, encode_pair, fit_lengths
from rlhf.distributed.frozen import equal_batches, on_device
from rlhf.errors import DataError
from rlhf.models.loading import load_policy, load_tokenizer, place
from rlhf.models.paths import is_ensemble, member_folders
from rlhf.models.positions import check_positions
from rlhf.models.scalar import ScalarModel, pad_pairs, response_scores
from rlhf.records import Comparison, PromptContent, RatedResponse
from rlhf.stages.reward_objectives import RatingScale, is_tie
from rlhf.stages.sampling import in_batches, load_encoded_prompts, require_prompts, sample_batch, sampling_rules

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.stages.context import StageContext

Pair = tuple[EncodedPair, EncodedPair]
PairScores = list[tuple[float, float]]
# Without held-out comparisons the first of the training comparisons stand in for them.
_NUM_STAND_INS = 500


@dataclass(frozen=True)
class ScoredComparison:
    """A comparison with the raw scores of both sides by every member of an ensemble, one of a single model."""

    comparison: Comparison
    chosen_scores: tuple[float, ...]
    rejected_scores: tuple[float, ...]

    @property
    def chosen_score(self) -> float:
        """The members' mean. Members have no origin in common: what counts is the difference to `rejected_score`."""
        return math.fsum(self.chosen_scores) / len(self.chosen_scores)

    @property
    def rejected_score(self) -> float:
        """The members' mean."""
        return math.fsum(self.rejected_scores) / len(self.rejected_scores)


@dataclass(frozen=True)
class HeldOut:
    """What a model is measured on: comparisons of each split as records and as token ids, and rated responses."""

    comparisons: Splits[Comparison]
    pairs: Mapping[str, list[Pair]]
    ratings: Splits[RatedResponse] | None = None
    scale: RatingScale | None = None


@dataclass(frozen=True)
class Measured:
    """Of one model: what goes into the stage's summary, what is written beside the weights, and the held-out scores."""

    summary: dict[str, Any]
    statistics: dict[str, Any]
    scores: dict[str, PairScores]


class Normalizer:
    """The texts whose scores are to have mean 0 and standard deviation 1, found when they are first asked for."""

    def __init__(self, context: StageContext, tokenizer: PreTrainedTokenizerBase) -> None:
        self._context, self._tokenizer = context, tokenizer
        self._texts: list[EncodedPair] | None = None

    def texts(self) -> list[EncodedPair] | None:
        """Prompts and responses as ids, the same on all ranks, which all call; None: the held-out comparisons'."""
        kind = self._context.config.reward_model.normalization
        if kind.type == "comparisons":
            return None
        if self._texts is None:
            if isinstance(kind, ResponsesNormalization):
                self._texts = _sampled_responses(self._context, kind)
            else:
                self._texts = _demonstrations(self._context, self._tokenizer)
        return self._texts

    def longest(self) -> int:
        """Tokens of the longest text; 0 where they are held-out comparisons, or are still to be sampled."""
        if self._context.config.reward_model.normalization.type != "demonstrations":
            return 0
        return max(len(text.prompt_ids) + len(text.response_ids) for text in self.texts() or [])


def _demonstrations(context: StageContext, tokenizer: PreTrainedTokenizerBase) -> list[EncodedPair]:
    splits = fit_lengths(load_demonstrations(context.config.data), tokenizer, context.config.data)
    rows = splits.validation or splits.test or splits.train[:_NUM_STAND_INS]
    if not rows:
        raise DataError("reward_model.normalization.type=demonstrations: the data has no demonstration")
    return [encode_pair(tokenizer, row.prompt, row.response) for row in rows]


def _sampled_responses(context: StageContext, kind: ResponsesNormalization) -> list[EncodedPair]:
    """Responses of the model that the reward model starts from, as they were sampled: one that was cut has no EOS."""
    config, runtime, base = context.config, context.runtime, context.inputs["base"]
    tokenizer = load_tokenizer(base, config.model, key="reward_model.base")
    policy = place(load_policy(base, config.model, runtime.dtype, key="reward_model.base"), runtime.device)
    prompts = load_encoded_prompts(config.data, tokenizer, lambda text: None)["train"]
    require_prompts(prompts, "train")
    check_positions(policy, max(len(prompt.ids) for prompt in prompts) + kind.sampling.max_response_tokens)
    rows = [(number, prompts[number % len(prompts)], number // len(prompts)) for number in range(kind.num_responses)]
    key = "reward_model.normalization.sampling"
    stop_ids, suppressed = sampling_rules(policy, tokenizer, kind.sampling, key)
    mine: list[tuple[int, list[int], list[int]]] = []
    for batch in in_batches(rows[runtime.rank :: runtime.world_size], kind.sampling.batch_size):
        sampled = sample_batch(
            policy,
            tokenizer,
            [prompt for _, prompt, _ in batch],
            [turn for _, _, turn in batch],
            seed=config.seed,
            purpose="reward_normalization",
            step=0,
            temperature=kind.sampling.temperature,
            max_response_tokens=kind.sampling.max_response_tokens,
            device=runtime.device,
            stop_ids=stop_ids,
            suppressed=suppressed,
        )
        for row, (number, prompt, _) in enumerate(batch):
            real = sampled.response_ids[row][sampled.response_mask[row]]
            mine.append((number, prompt.ids, real.tolist()))
    gathered = sorted(row for share in runtime.gather_objects(mine) for row in share)
    return [EncodedPair(prompt_ids, response_ids) for _, prompt_ids, response_ids in gathered]


@contextmanager
def _loaded(context: StageContext, folder: str | Path) -> Iterator[ScalarModel]:
    config, runtime = context.config, context.runtime
    scalar = ScalarModel.load(folder, config.model, dtype=runtime.dtype, key="reward_model")
    with on_device(scalar, runtime, config.zero):
        yield scalar


def measure(
    context: StageContext,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    held_out: HeldOut,
    normalizer: Normalizer,
) -> Measured:
    """Accuracy and margin of the saved model on the held-out splits, and the statistics of its scores.

    Without validation comparisons the statistics are those of the test ones, else of the first training comparisons.
    All ranks call it.
    """
    texts = normalizer.texts()
    with _loaded(context, folder) as scalar:
        scores = {split: score_pairs(context, scalar, held_out.pairs[split]) for split in ("test", "validation")}
        summary = accuracy_summary(held_out.comparisons, scores)
        if held_out.ratings is not None:
            fit, rated = _rating_fit(context, scalar, tokenizer, held_out)
            summary |= fit
        else:
            rated = []
        if texts is not None:
            values = _score_texts(context, scalar, texts)
        elif held_out.ratings is not None:
            values = rated
        else:
            found = scores["validation"] or scores["test"]
            found = found or score_pairs(context, scalar, held_out.pairs["train"][:_NUM_STAND_INS])
            values = [score for pair in found for score in pair]
    normalization = context.config.reward_model.normalization
    known, kind = _statistics(values), normalization.type
    own = "ratings" if held_out.ratings is not None else "comparisons"
    extra: dict[str, Any] = {"measured_on": own if texts is None else kind, "num_scores": len(values)}
    if held_out.scale is not None:
        extra["rating_scale"] = held_out.scale.to_json()
    # What PPO shifts and scales by; the summary keeps what was measured.
    used = known if normalization.scale else {**known, "score_std": 1.0}
    return Measured({**summary, **known}, {**used, **extra}, scores)


def _statistics(values: Sequence[float]) -> dict[str, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    return {"score_mean": float(tensor.mean()), "score_std": float(tensor.std(correction=0))}


def accuracy_summary(comparisons: Splits[Comparison], scores: Mapping[str, PairScores]) -> dict[str, Any]:
    """Accuracy and mean margin by split, of comparisons that are no ties; equal scores count half."""
    summary: dict[str, Any] = {}
    for split, prefix in (("test", ""), ("validation", "validation_")):
        records = comparisons.test if split == "test" else comparisons.validation
        margins = [
            chosen - rejected
            for record, (chosen, rejected) in zip(records, scores[split], strict=True)
            if not is_tie(record)
        ]
        if margins:
            num_right = sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins)
            summary[f"{prefix}accuracy"] = statistics.wilson(num_right, len(margins), confidence=0.95).to_json()
            summary[f"{prefix}margin"] = sum(margins) / len(margins)
    return summary


def _rating_fit(
    context: StageContext, scalar: ScalarModel, tokenizer: PreTrainedTokenizerBase, held_out: HeldOut
) -> tuple[dict[str, Any], list[float]]:
    """Error (in units of the ratings) and correlation on held-out ratings by split, and the scores of one split."""
    assert held_out.ratings is not None
    assert held_out.scale is not None
    summary: dict[str, Any] = {}
    by_split: dict[str, list[float]] = {}
    for split, prefix in (("test", ""), ("validation", "validation_"), ("train", None)):
        records = held_out.ratings.named(split)  # type: ignore[arg-type]  # a name of the loop above
        if prefix is None:
            records = [] if by_split["test"] or by_split["validation"] else records[:_NUM_STAND_INS]
        texts = [encode_pair(tokenizer, row.prompt, row.response) for row in records]
        by_split[split] = _score_texts(context, scalar, texts)
        if prefix is None or not records:
            continue
        predicted = [held_out.scale.rating(score) for score in by_split[split]]
        given = [row.rating for row in records]
        squared = [(one - other) ** 2 for one, other in zip(predicted, given, strict=True)]
        summary[f"{prefix}rating_rmse"] = math.sqrt(math.fsum(squared) / len(squared))
        correlation = _correlation(predicted, given)
        if correlation is not None:
            summary[f"{prefix}rating_correlation"] = correlation
    return summary, by_split["validation"] or by_split["test"] or by_split["train"]


def _correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's; None where one of them does not vary."""
    means = [math.fsum(values) / len(values) for values in (first, second)]
    centred = [[value - mean for value in values] for values, mean in zip((first, second), means, strict=True)]
    norms = [math.sqrt(math.fsum(value * value for value in values)) for values in centred]
    if min(norms) == 0.0:
        return None
    return math.fsum(a * b for a, b in zip(*centred, strict=True)) / (norms[0] * norms[1])


def scored_comparisons(
    context: StageContext, path: str | Path, comparisons: Sequence[Comparison]
) -> list[ScoredComparison]:
    """Comparisons with their scores by the reward model in folder `path`, or by the members of an ensemble there.

    A member is in memory at a time. All ranks call it and get the same.
    """
    key = "reward_model"
    folders = member_folders(path, key) if is_ensemble(path) else [str(path)]
    pairs = encode_all(load_tokenizer(path, context.config.model, key=key), comparisons)
    by_member: list[PairScores] = []
    for folder in folders:
        with _loaded(context, folder) as scalar:
            by_member.append(score_pairs(context, scalar, pairs))
    return [
        ScoredComparison(
            record,
            tuple(scores[number][0] for scores in by_member),
            tuple(scores[number][1] for scores in by_member),
        )
        for number, record in enumerate(comparisons)
    ]


def scored_responses(
    context: StageContext, path: str | Path, texts: Sequence[tuple[PromptContent, str]], *, key: str
) -> list[tuple[float, ...] | None]:
    """Raw scores of (prompt, response) by the reward model in folder `path`, or by each member of an ensemble there.

    None for what is longer than the model's positions. A response that comes several times is scored once; a member is
    in memory at a time. All ranks call it and get the same.
    """
    folders = member_folders(path, key) if is_ensemble(path) else [str(path)]
    tokenizer = load_tokenizer(path, context.config.model, key=key)
    encoded = {text: encode_pair(tokenizer, *text) for text in dict.fromkeys(texts)}
    # Of like lengths together: less padding.
    lengths = {text: len(row.prompt_ids) + len(row.response_ids) for text, row in encoded.items()}
    order = sorted(encoded, key=lengths.__getitem__)
    found: dict[tuple[PromptContent, str], tuple[float, ...]] = dict.fromkeys(order, ())
    for folder in folders:
        with _loaded(context, folder) as scalar:
            limit = getattr(scalar.model.config, "max_position_embeddings", None)
            order = [text for text in order if limit is None or lengths[text] <= limit]
            scores = _score_texts(context, scalar, [encoded[text] for text in order])
        for text, score in zip(order, scores, strict=True):
            found[text] += (score,)
    return [found[text] if len(found[text]) == len(folders) else None for text in texts]


def encode_all(tokenizer: PreTrainedTokenizerBase, comparisons: Sequence[Comparison]) -> list[Pair]:
    """(chosen, rejected) of every comparison as token ids."""
    return [
        (encode_pair(tokenizer, row.prompt, row.chosen), encode_pair(tokenizer, row.prompt, row.rejected))
        for row in comparisons
    ]


def score_pairs(context: StageContext, scalar: ScalarModel, pairs: list[Pair]) -> PairScores:
    """Scores of (chosen, rejected) of every pair, in order, on all ranks; each rank works on its share."""
    device = context.runtime.device

    def score(batch: Sequence[Pair]) -> PairScores:
        sides = zip(*batch, strict=True)
        scores = score_sequences(scalar, [text for side in sides for text in side], device)
        half = len(scores) // 2
        return list(zip(scores[:half], scores[half:], strict=True))

    return _on_all_ranks(context, pairs, score)


def _score_texts(context: StageContext, scalar: ScalarModel, texts: list[EncodedPair]) -> list[float]:
    """Scores of single responses, in order, on all ranks."""
    device = context.runtime.device
    return _on_all_ranks(context, texts, lambda batch: score_sequences(scalar, list(batch), device))


def _on_all_ranks(context: StageContext, rows: list[Any], score: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
    """`score` of every row, in order; ranks share the rows and call it equally often, as sharded models need."""
    section, runtime = context.config.reward_model, context.runtime
    size = section.micro_batch_size or max(1, section.batch_size // runtime.world_size)
    scored: list[Any] = []
    for batch in equal_batches(rows, size, runtime):
        scored += score(batch or rows[:1])[: len(batch)]
    shares = runtime.gather_objects(scored)
    return [shares[number % runtime.world_size][number // runtime.world_size] for number in range(len(rows))]


@torch.inference_mode()
def score_sequences(scalar: ScalarModel, pairs: list[EncodedPair], device: torch.device) -> list[float]:
    """The score of each sequence, read at its last token."""
    ids, mask, num_prompt = pad_pairs(scalar, pairs, pad_id=0)
    scores: list[float] = response_scores(scalar, ids.to(device), mask.to(device), num_prompt).tolist()
    return scores
