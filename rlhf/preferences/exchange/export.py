"""From the labels of the store to comparisons and ratings in splits: resolved by a rule, split by prompt."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeVar

from rlhf.config.data import SplitConfig
from rlhf.data.splits import SPLITS, SplitName, Splits, split_key
from rlhf.data.splits import split_of as hashed_split
from rlhf.errors import ConfigError
from rlhf.preferences.exchange.items import IMPORTED, source_of
from rlhf.preferences.exchange.selection import Pair, Selection, flagged, pairs_of, pairwise_labels, select
from rlhf.preferences.resolution import PairwiseLabel, Resolution, ResolutionRule, Resolved, resolve
from rlhf.preferences.store import Choice, FlagKind, PreferenceStore, Rating, Task
from rlhf.records import Comparison, Demonstration, PromptContent, RatedResponse

RecordT = TypeVar("RecordT", Comparison, RatedResponse)
Margins = Literal["none", "imported", "strength"]


@dataclass(frozen=True)
class ExportOptions:
    """What an export does besides resolving.

    `leave_out_flagged`: responses (or tasks) that anybody flagged so are left out. `ratings_as_pairs`: two responses to
    a prompt that one annotator rated also make a comparison. `margins`: those that an import brought along, the mean
    strength of the labels in favour of the chosen response, or none.
    """

    leave_out_flagged: tuple[FlagKind, ...] = ()
    ratings_as_pairs: bool = False
    margins: Margins = "imported"


DEFAULT_SPLITS = SplitConfig()
DEFAULT_OPTIONS = ExportOptions()


@dataclass(frozen=True)
class ExportedLabels:
    """The records by split, how they were resolved, what was left out, and what the card is made from.

    `split_rule` says how prompts were split: by their hash with these shares, or a sentence on how the caller did.
    """

    comparisons: Splits[Comparison]
    ratings: Splits[RatedResponse]
    resolved: Resolved
    selection: Selection
    split_rule: SplitConfig | str
    options: ExportOptions
    left_out: Mapping[str, int]

    def card(self) -> str:
        """The dataset card in markdown, with the front matter of Hugging Face's cards."""
        from rlhf.preferences.exchange.card import make_card
        from rlhf.preferences.exchange.card_text import render_card

        return render_card(make_card(self))


def export_labels(
    store: PreferenceStore,
    *,
    rule: ResolutionRule,
    tasks: Sequence[str] | None = None,
    rounds: Collection[int] | None = None,
    split_of: Callable[[PromptContent], SplitName] | None = None,
    split_rule: str = "Whoever exported decided the split of each prompt",
    splits: SplitConfig = DEFAULT_SPLITS,
    options: ExportOptions = DEFAULT_OPTIONS,
) -> ExportedLabels:
    """The labels of these tasks (ids) and rounds as records; all ordinary tasks when `tasks` is None.

    Records are in the order of `tasks`, or of creation. A tie is a comparison of probability 0.5; a ranking gives all
    its pairs. Ratings of a response are averaged, but with the rule `all` every one is kept. `split_of` decides the
    split of a prompt, and `split_rule` tells the card how, in a sentence without its stop; without it `splits` does, by
    the hash of the prompt's key, so equal prompts share a split. Gold questions and blind repeats are left out unless
    `tasks` names them. Raises `ConfigError` for an unknown task.
    """
    selection = select(store, tasks, rounds)
    left_out: Counter[str] = Counter()
    responses, whole = flagged(selection, options.leave_out_flagged)
    kept = [task for task in selection.tasks if task.id not in whole]
    left_out["task flagged"] += len(selection.tasks) - len(kept)
    pairs: dict[str, Pair] = {}
    given: list[PairwiseLabel] = []
    for task in kept:
        for pair in pairs_of(selection, task):
            if pair.first in responses or pair.second in responses:
                left_out["pair with a flagged response"] += 1
                continue
            pairs[pair.key] = pair
            given += pairwise_labels(selection, pair)
    rated = [task for task in kept if task.plan.kind == "rating"]
    usable = [task for task in rated if task.plan.responses[0] not in responses]
    left_out["rating of a flagged response"] += len(rated) - len(usable)
    if options.ratings_as_pairs:
        for pair, labels in _pairs_of_ratings(selection, usable):
            pairs[pair.key] = pair
            given += labels
    resolved = resolve(given, rule)
    comparisons = [_comparison(selection, pairs[one.task], one, options.margins) for one in resolved.resolutions]
    ratings = [record for task in usable for record in _ratings(selection, task, rule)]
    return ExportedLabels(
        _in_splits(comparisons, split_of, splits),
        _in_splits(ratings, split_of, splits),
        resolved,
        selection,
        splits if split_of is None else split_rule,
        options,
        {reason: count for reason, count in left_out.items() if count},
    )


def _comparison(selection: Selection, pair: Pair, resolution: Resolution, margins: Margins) -> Comparison:
    first_is_better = resolution.probability >= 0.5
    chosen, rejected = (pair.first, pair.second) if first_is_better else (pair.second, pair.first)
    probability = resolution.probability if first_is_better else 1 - resolution.probability
    return Comparison(
        selection.prompts[pair.task.prompt].prompt,
        selection.responses[chosen].text,
        selection.responses[rejected].text,
        margin=_margin(selection, pair, chosen, resolution, margins),
        annotator=", ".join(resolution.annotators),
        chosen_shown_first=_shown_first(selection, pair, chosen, resolution),
        probability=None if probability == 1 else probability,
        agreement=resolution.agreement,
        num_annotators=resolution.num_annotators,
        source=source_of(pair.task.plan.strategy),
    )


def _margin(selection: Selection, pair: Pair, chosen: str, resolution: Resolution, margins: Margins) -> float | None:
    if margins not in ("none", "imported", "strength"):
        raise ConfigError(f"margins is none, imported or strength, not {margins!r}")
    plan = pair.task.plan
    if margins == "none" or plan.kind != "pairwise":
        return None
    if margins == "imported":
        if plan.score is None or not plan.strategy.startswith(IMPORTED) or resolution.outcome == "tie":
            return None
        margin = plan.score if chosen == min(plan.responses) else -plan.score
        # The file's margin is of its own outcome; where the labels say otherwise it says nothing.
        return margin if margin >= 0 else None
    strengths = []
    for label in selection.labels_of(pair.task):
        if label.annotator in resolution.annotators:
            sign = 0
            if isinstance(label.answer, Choice):
                sign = label.answer.strength if label.answer.preferred == chosen else -label.answer.strength
            strengths.append(sign)
    return max(0.0, sum(strengths) / len(strengths))


def _shown_first(selection: Selection, pair: Pair, chosen: str, resolution: Resolution) -> bool | None:
    """Whether the chosen response was on the first side; None for several annotators, ties and unknown sides."""
    if resolution.num_annotators != 1 or resolution.outcome == "tie" or pair.task.plan.kind != "pairwise":
        return None
    shown = [one.shown for one in selection.labels_of(pair.task) if one.annotator == resolution.annotators[0]]
    return shown[0][0] == chosen if shown and shown[0] else None


def _ratings(selection: Selection, task: Task, rule: ResolutionRule) -> Iterator[RatedResponse]:
    """The mean of a response's ratings, or each with the rule `all`."""
    prompt = selection.prompts[task.prompt].prompt
    text = selection.responses[task.plan.responses[0]].text
    source = source_of(task.plan.strategy)
    given = [(one.annotator, one.answer.value) for one in selection.labels_of(task) if isinstance(one.answer, Rating)]
    if rule.kind == "all":
        yield from (RatedResponse(prompt, text, float(value), name, source) for name, value in given)
    elif given:
        mean = math.fsum(value for _, value in given) / len(given)
        yield RatedResponse(prompt, text, mean, ", ".join(name for name, _ in given), source)


def _pairs_of_ratings(selection: Selection, tasks: Iterable[Task]) -> Iterator[tuple[Pair, list[PairwiseLabel]]]:
    """Pairs of responses to one prompt that the same annotator rated on one scale, with what the ratings say."""
    groups: dict[tuple[str, int | None], list[Task]] = {}
    for task in tasks:
        groups.setdefault((task.prompt, task.plan.scale), []).append(task)
    for group in groups.values():
        for one, other in combinations(group, 2):
            first, second = one.plan.responses[0], other.plan.responses[0]
            if first == second:
                continue
            values = {label.annotator: label.answer for label in selection.labels_of(other)}
            pair = Pair(f"{one.id}+{other.id}", one, first, second)
            labels = []
            for label in selection.labels_of(one):
                mine, theirs = label.answer, values.get(label.annotator)
                if isinstance(mine, Rating) and isinstance(theirs, Rating):
                    labels.append(PairwiseLabel(pair.key, label.annotator, *_compared(mine.value, theirs.value)))
            if labels:
                yield pair, labels


def _compared(mine: float, theirs: float) -> tuple[Literal["first", "second", "tie"], int | None]:
    if mine == theirs:
        return "tie", None
    return ("first" if mine > theirs else "second"), 1


def _in_splits(
    records: Iterable[RecordT], split_of: Callable[[PromptContent], SplitName] | None, splits: SplitConfig
) -> Splits[RecordT]:
    kept: dict[SplitName, list[RecordT]] = {name: [] for name in SPLITS}
    for record in records:
        name = split_of(record.prompt) if split_of is not None else hashed_split(_key(record), splits)
        kept[name].append(record)
    return Splits(kept["train"], kept["validation"], kept["test"])


def _key(record: Comparison | RatedResponse) -> str:
    """As when the files are read again: the prompt's key, that of the response when there is no prompt."""
    if isinstance(record, Comparison):
        return split_key(record)
    return split_key(Demonstration(record.prompt, record.response))
