"""Source `labelled_text`: texts with a class label, as continuations to imitate and as pairs to compare.

White space in a text is normalised. Its first `prompt_words` words are the prompt and the rest, which starts with a
space, is the response. A pair has the empty prompt and two whole texts, without a space in front, so that a whole
text and a prompt with its response are the same string, and the same tokens, for a reward model.

Every text belongs to one split (by the hash of its prompt, or by its file), and every training text either to the
judge or to training (by the hash of the text): equal texts always stay together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from math import gcd
from typing import Any, Literal

from rlhf.config.data import HubData, LabelledTextData
from rlhf.data.assemble import RowsBySplit, shares_of_train
from rlhf.data.folders import find_files, name_of
from rlhf.data.hub import hub_rows
from rlhf.data.readers import Row, json_type, read_rows
from rlhf.data.splits import SPLITS, BadRow, BadRows, Origin, SplitName, Splits, refuse_or_skip, split_of
from rlhf.errors import ConfigError, DataError
from rlhf.records import Comparison, Demonstration, Prompt, PromptContent, prompt_hash

HELD_OUT_FIRST: tuple[SplitName, ...] = ("test", "validation", "train")
Part = Literal["judge_train", "test"]


@dataclass(frozen=True)
class LabelledText:
    """A text with normalised white space; `preferred` is whether its label is the preferred one."""

    text: str
    preferred: bool
    origin: Origin

    def halves(self, prompt_words: int) -> tuple[str, str] | None:
        """(prompt, response), or None when the text is too short to leave a response."""
        words = self.text.split(" ")
        if len(words) <= prompt_words:
            return None
        return " ".join(words[:prompt_words]), " " + " ".join(words[prompt_words:])


@dataclass(frozen=True)
class Corpus:
    """The texts by split; `judge` are the training texts that only the judge sees, `train` the others."""

    splits: dict[SplitName, list[LabelledText]]
    judge: list[LabelledText]
    bad_rows: BadRows


def load_demonstrations(config: LabelledTextData) -> Splits[Demonstration]:
    """A text's first `prompt_words` words and their continuation. Texts without more words than that give none.

    Openings are short and recur in other texts: a text whose opening also begins a text of a split that is held out
    longer is left out, so that held-out prompts are new.
    """
    corpus = read_corpus(config)
    records: dict[SplitName, list[Demonstration]] = {}
    origins: dict[SplitName, list[Origin]] = {}
    held_out: set[str] = set()
    for name in HELD_OUT_FIRST:
        halves = [(entry.halves(config.prompt_words), entry.origin) for entry in corpus.splits[name]]
        kept = [(both, origin) for both, origin in halves if both is not None and both[0] not in held_out]
        records[name] = [Demonstration(prompt, response) for (prompt, response), _ in kept]
        origins[name] = [origin for _, origin in kept]
        held_out |= {prompt for (prompt, _), _ in kept}
    if not records["train"]:
        raise ConfigError(f"data.prompt_words={config.prompt_words}: no text of {config.path} has more words than that")
    return Splits(records["train"], records["validation"], records["test"], corpus.bad_rows, origins)


def load_prompts(config: LabelledTextData) -> Splits[Prompt]:
    """The distinct prompts of the demonstrations."""
    demonstrations = load_demonstrations(config)
    prompts: dict[SplitName, list[Prompt]] = {}
    origins: dict[SplitName, list[Origin]] = {}
    for name in SPLITS:
        first: dict[PromptContent, Origin] = {}
        for index, entry in enumerate(demonstrations.named(name)):
            first.setdefault(entry.prompt, demonstrations.origin(name, index))
        prompts[name] = [Prompt(prompt) for prompt in first]
        origins[name] = list(first.values())
    return Splits(prompts["train"], prompts["validation"], prompts["test"], demonstrations.bad_rows, origins)


def load_comparisons(config: LabelledTextData) -> Splits[Comparison]:
    """Pairs of a preferred text against another one.

    In the training split `num_comparisons` pairs, or as many as there are, use each text of a side equally often, give
    or take one. In the held-out splits no text is in two pairs: an interval over pairs counts independent texts.
    """
    corpus = read_corpus(config)
    pairs: dict[SplitName, list[Comparison]] = {}
    origins: dict[SplitName, list[Origin]] = {}
    for name in SPLITS:
        preferred = [entry for entry in corpus.splits[name] if entry.preferred]
        others = [entry for entry in corpus.splits[name] if not entry.preferred]
        wanted = config.num_comparisons if name == "train" else min(len(preferred), len(others))
        matched = _pair_up(_shuffled(preferred), _shuffled(others), wanted)
        pairs[name] = [Comparison("", one.text, other.text, annotator="label") for one, other in matched]
        origins[name] = [one.origin for one, _ in matched]
    return Splits(pairs["train"], pairs["validation"], pairs["test"], corpus.bad_rows, origins)


def load_labelled_texts(config: LabelledTextData, part: Part) -> list[tuple[str, bool]]:
    """(text, is preferred) for a judge: what it is trained on, which no other stage sees, or the test split."""
    corpus = read_corpus(config)
    texts = corpus.judge if part == "judge_train" else corpus.splits["test"]
    if part == "judge_train" and len({entry.preferred for entry in texts}) < 2:
        raise ConfigError(
            f"data.judge_share={config.judge_share}: the judge needs training texts of both kinds, and got {len(texts)}"
        )
    return [(entry.text, entry.preferred) for entry in texts]


def training_strings(config: LabelledTextData) -> list[str]:
    """The training texts that are not the judge's."""
    return [entry.text for entry in read_corpus(config).splits["train"]]


def read_corpus(config: LabelledTextData) -> Corpus:
    """Reads, checks and divides the texts. Of equal texts the first is kept.

    Raises `ConfigError` when no text has the preferred label or all have it, `DataError` for broken rows unless they
    may be skipped. A text with two labels, and a training text that is also in a held-out file, are broken rows.
    """
    source = f"data.path={config.path}"
    bad_rows: list[BadRow] = []
    found: dict[SplitName | None, list[LabelledText]] = {}
    labels: set[str] = set()
    num_rows = 0
    rows_by_split = _rows(config)
    for split, rows in rows_by_split.items():
        found[split] = []
        for row in rows:
            num_rows += 1
            entry = row if isinstance(row, BadRow) else _labelled(row, config, labels)
            if isinstance(entry, BadRow):
                bad_rows.append(entry)
            else:
                found[split].append(entry)
    distinct = _distinct(found, bad_rows)
    reported = refuse_or_skip(bad_rows, num_rows, config.on_bad_row, source)
    _check_labels(distinct.values(), labels, config)
    splits: dict[SplitName, list[LabelledText]] = {name: [] for name in SPLITS}
    judge: list[LabelledText] = []
    shares = shares_of_train(config.splits, set(rows_by_split))
    for own, entries in distinct.items():
        for entry in entries:
            opening = entry.text.split(" ")[: config.prompt_words]
            name = own if own in ("validation", "test") else split_of(" ".join(opening), shares)
            if name == "train" and _share(entry.text, "judge") < config.judge_share:
                judge.append(entry)
            else:
                splits[name].append(entry)
    if not splits["train"]:
        raise DataError(f"{source}: no text is left to train on with data.judge_share={config.judge_share}; {reported}")
    return Corpus(splits, judge, reported)


def hub_source(config: LabelledTextData) -> HubData:
    """The data set that `from_hub` names."""
    return HubData(path=config.path, name=config.name, revision=config.revision)


def _rows(config: LabelledTextData) -> RowsBySplit:
    if config.from_hub:
        return hub_rows(hub_source(config))
    return {
        split: chain.from_iterable(read_rows(file, name_of(file, config.path)) for file in files)
        for split, files in find_files(config.path).items()
    }


def _labelled(row: Row, config: LabelledTextData, labels: set[str]) -> LabelledText | BadRow:
    for key, name in (("text_field", config.text_field), ("label_field", config.label_field)):
        if row.fields.get(name) is None:
            return BadRow(row.origin, f"field '{name}' (data.{key}) is missing")
    text = row.fields[config.text_field]
    if not isinstance(text, str):
        return BadRow(row.origin, f"field '{config.text_field}' is text, found {json_type(text)}")
    text = " ".join(text.split())
    if not text:
        return BadRow(row.origin, f"field '{config.text_field}' is empty")
    value = row.fields[config.label_field]
    label = _label_text(value)
    if not label:
        return BadRow(row.origin, f"field '{config.label_field}' is a word or a number, found {json_type(value)}")
    labels.add(label)
    return LabelledText(text, label == config.preferred_label, row.origin)


def _label_text(label: Any) -> str:
    """Labels are compared as text: 1 is "1" and true is "true"; empty for anything that is no label."""
    if isinstance(label, bool):
        return str(label).lower()
    return str(label).strip() if isinstance(label, str | int) else ""


def _distinct(
    found: dict[SplitName | None, list[LabelledText]], bad_rows: list[BadRow]
) -> dict[SplitName | None, list[LabelledText]]:
    """One entry for each text, in the split that is held out longest; texts with two labels are broken rows."""
    first: dict[str, tuple[SplitName | None, LabelledText]] = {}
    contradicted: set[str] = set()
    for split in sorted(found, key=lambda name: HELD_OUT_FIRST.index(name or "train")):
        for entry in found[split]:
            other_split, other = first.setdefault(entry.text, (split, entry))
            if other.preferred != entry.preferred:
                contradicted.add(entry.text)
                bad_rows.append(BadRow(entry.origin, f"the same text has another label in {other.origin}"))
            elif other_split != split:
                bad_rows.append(BadRow(entry.origin, f"leaks into {other_split}: the same text is in {other.origin}"))
    kept: dict[SplitName | None, list[LabelledText]] = {split: [] for split in found}
    for text, (split, entry) in first.items():
        if text not in contradicted:
            kept[split].append(entry)
    return kept


def _check_labels(groups: Iterable[list[LabelledText]], labels: set[str], config: LabelledTextData) -> None:
    kinds = {entry.preferred for entries in groups for entry in entries}
    if kinds == {True, False}:
        return
    shown = ", ".join(sorted(labels)[:10]) or "none"
    if True not in kinds:
        raise ConfigError(
            f"data.preferred_label={config.preferred_label}: no text has this label; "
            f"the labels in field '{config.label_field}' of {config.path} are {shown}"
        )
    raise ConfigError(f"data.path={config.path}: every text has the preferred label {shown}; pairs need another one")


def _share(text: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.blake2b(f"{purpose}\0{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _shuffled(entries: list[LabelledText]) -> list[LabelledText]:
    """An order by hash: it depends on the texts alone, not on the file's order."""
    return sorted(entries, key=lambda entry: (prompt_hash(entry.text), entry.text))


def _pair_up(
    preferred: list[LabelledText], others: list[LabelledText], wanted: int
) -> list[tuple[LabelledText, LabelledText]]:
    """`wanted` different pairs, or all there are, walking both lists in turn.

    Both indices advance together and repeat after the least common multiple of the lengths; then one of them is
    shifted by one place, so that the pairs stay different until every combination has been used.
    """
    if not preferred or not others:
        return []
    period = len(preferred) * len(others) // gcd(len(preferred), len(others))
    count = min(wanted, len(preferred) * len(others))
    return [
        (preferred[index % len(preferred)], others[(index + index // period) % len(others)]) for index in range(count)
    ]
