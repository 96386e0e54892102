"""Rows that are comparisons: TRL's preference format, HH-RLHF's transcripts, our records. `rlhf.data` parses them."""

from __future__ import annotations

from collections.abc import Callable

from rlhf.data.formats import FORMATS, RowError
from rlhf.preferences.exchange.items import (
    Fields,
    ImportedLabel,
    ImportedTask,
    ImportOptions,
    UnusableRowError,
    as_prompt,
    make_responses,
    strategy_of,
)
from rlhf.preferences.store import Answer, Choice, TaskPlan, Tie
from rlhf.records import Comparison


def read_trl(row: Fields, options: ImportOptions) -> list[ImportedTask]:
    """A row of TRL's preference format, text or conversational, with the columns of `Comparison` or without."""
    return [_task(_comparison("preference", row), options.annotator or "trl")]


def read_hh(row: Fields, options: ImportOptions) -> list[ImportedTask]:
    """A pair of HH-RLHF transcripts of any number of turns."""
    return [_task(_comparison("hh", row), options.annotator or "hh")]


def fits(name: str) -> Callable[[Fields], bool]:
    """Whether a row has the fields of a format of `rlhf.data.formats`."""
    return FORMATS[name].fits


def _comparison(name: str, row: Fields) -> Comparison:
    try:
        record = FORMATS[name].parse(row)
    except RowError as error:
        whole = all(isinstance(row.get(side), str) and row[side].strip() for side in ("chosen", "rejected"))
        # Published files have dialogues that end with the question, fork earlier, or say the same twice.
        if row.get("chosen") == row.get("rejected") or (name == "hh" and whole and _is_dialogue(row)):
            raise UnusableRowError(str(error)) from error
        raise
    assert isinstance(record, Comparison)
    return record


def _is_dialogue(row: Fields) -> bool:
    return all(row[side].lstrip().startswith(("Human:", "Assistant:")) for side in ("chosen", "rejected"))


def _task(comparison: Comparison, crowd: str) -> ImportedTask:
    prompt = as_prompt(comparison.prompt)
    responses, ids = make_responses(prompt, (comparison.chosen, comparison.rejected), numbered=False)
    answers, note = _answers(comparison, ids)
    names = _names(comparison, len(answers))
    shown: tuple[str, ...] = ()
    if comparison.chosen_shown_first is not None and len(answers) == 1:
        shown = ids if comparison.chosen_shown_first else ids[::-1]
    score = comparison.margin
    if score is not None and ids[0] > ids[1]:
        score = -score
    plan = TaskPlan("pairwise", ids, num_labels=len(answers), strategy=strategy_of(comparison.source), score=score)
    labels = tuple(
        ImportedLabel(name or crowd, answer, anonymous=name is None, shown=shown)
        for name, answer in zip(names, answers, strict=True)
    )
    return ImportedTask(prompt, responses, plan, labels, notes=(note,) if note else ())


def _names(comparison: Comparison, num_answers: int) -> list[str | None]:
    """Who gave each answer; None where the file does not say which of several gave which."""
    given = [] if comparison.annotator is None else [name.strip() for name in comparison.annotator.split(",")]
    if num_answers == 1:
        return [comparison.annotator if len(given) == 1 else None]
    unanimous = comparison.agreement == 1 and len(given) == len(set(given)) == num_answers and all(given)
    return list(given) if unanimous else [None] * num_answers


def _answers(comparison: Comparison, ids: tuple[str, ...]) -> tuple[list[Answer], str]:
    """The answers that gave the probability, as far as it tells them, and what was lost otherwise.

    Of n answers whose mean is p, k = agreement * n are the outcome. With t ties, k + t / 2 = p n gives the rest; for an
    outcome that is a tie, k are ties and the others are evenly split.
    """
    probability = 1.0 if comparison.probability is None else comparison.probability
    count = comparison.num_annotators or 1
    if count > 1 and comparison.agreement is not None:
        outcomes = comparison.agreement * count
        if probability == 0.5:
            ties, first = outcomes, (count - outcomes) / 2
        else:
            ties, first = 2 * (probability * count - outcomes), outcomes
        counts = (first, ties, count - first - ties)
        whole = [round(number) for number in counts]
        if all(abs(number - near) < 1e-6 and near >= 0 for number, near in zip(counts, whole, strict=True)):
            return [*[Choice(ids[0])] * whole[0], *[Tie()] * whole[1], *[Choice(ids[1])] * whole[2]], ""
    if probability == 0.5:
        return [Tie()], ""
    if probability == 1:
        return [Choice(ids[0])], ""
    strength = min((1, 2, 3), key=lambda size: abs(0.5 + size / 6 - probability))
    return [Choice(ids[0], strength)], "a probability between 0.5 and 1 became the nearest strength"
