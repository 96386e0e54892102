"""Stand-ins for data sets: a few dozen rows with the columns, types and splits of the real ones, always the same."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf.config.data import FileData, HubData, LabelledTextData
from rlhf.errors import ConfigError

Row = dict[str, Any]
NUM_ROWS, NUM_HELD_OUT = 48, 12
_SUBJECTS = (
    "my sister",
    "the neighbour",
    "a friend",
    "our teacher",
    "the landlord",
    "my boss",
    "the dog",
    "a stranger",
)
_DEEDS = ("lost the keys", "sold the car", "missed the train", "broke a promise", "wrote a letter", "cooked dinner")
_ENDS = ("and nobody noticed.", "which made us laugh.", "so we left early.", "and I am upset.", "but it went well.")
_GOOD = ("a warm and clever film", "a great and honest story", "fine acting, a joy")
_BAD = ("a dull and empty film", "a bad and noisy story", "poor acting, a bore")


def sentence(number: int) -> str:
    """A sentence that depends on the number alone; 240 numbers give 240 sentences."""
    return f"{_SUBJECTS[number % 8]} {_DEEDS[number // 8 % 6]} {_ENDS[number // 48 % 5]}"


def _post(number: int) -> Row:
    body = f"Last week {sentence(number)} Then {sentence(number + 7)}"
    return {"id": f"t3_{number}", "subreddit": "relationships", "title": sentence(number + 3), "post": body}


def _query(number: int) -> str:
    post = _post(number)
    return f"SUBREDDIT: r/{post['subreddit']}\n\nTITLE: {post['title']}\n\nPOST: {post['post']}\n\nTL;DR:"


def _tldr(number: int) -> Row:
    reference = f" {sentence(number + 1)}<|endoftext|>"
    return {**_post(number), "summary": sentence(number + 1), "query": _query(number), "reference_response": reference}


def _summaries(number: int) -> Row:
    texts = [f" {sentence(number + 1)}", f" {sentence(number + 2)}"]
    return {
        "info": {**_post(number), "article": None, "site": None},
        "summaries": [{"text": text, "policy": "sup", "note": None} for text in texts],
        "choice": number % 2,
        "worker": f"worker{number % 3}",
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": 1 + number % 9},
    }


def _tldr_pair(number: int) -> Row:
    row = _summaries(number)
    better = row["choice"]
    chosen, rejected = (f"{row['summaries'][place]['text']}<|endoftext|>" for place in (better, 1 - better))
    return {**row, "query": _query(number), "chosen": chosen, "rejected": rejected}


def _prompt_completion(number: int) -> Row:
    return {"prompt": _query(number), "completion": f" {sentence(number + 1)}"}


def _instruction(number: int) -> Row:
    more = sentence(number + 5) if number % 2 else ""
    return {"instruction": f"Say in other words: {sentence(number)}", "input": more, "output": sentence(number + 1)}


def _outputs(number: int) -> Row:
    row = {**_instruction(number), "output_1": sentence(number + 1), "output_2": sentence(number + 2)}
    del row["output"]
    return {**row, "preference": 1 + number % 2}


def _answers(number: int) -> Row:
    row = {**_instruction(number), "answers": [sentence(number + 1), sentence(number + 2)], "preference": number % 2}
    del row["output"]
    return row


def _hh(number: int) -> Row:
    start = f"\n\nHuman: {sentence(number)}\n\nAssistant: I see.\n\nHuman: {sentence(number + 4)}\n\nAssistant:"
    return {"chosen": f"{start} {sentence(number + 1)}", "rejected": f"{start} {sentence(number + 2)}"}


def _review(number: int) -> Row:
    tone = _GOOD if number % 2 else _BAD
    # Texts that open alike would be left out.
    return {"text": f"Day {number}: {sentence(number)} I saw {tone[number % 3]}.", "label": number % 2}


def _best_of(number: int) -> Row:
    samples = {f"sample{place}": f" {sentence(number + 1 + place)}" for place in range(4)}
    return {"query": f"Once, {sentence(number)}", **samples, "best": number % 4}


def _preference(number: int) -> Row:
    return {"prompt": sentence(number), "chosen": f" {sentence(number + 1)}", "rejected": f" {sentence(number + 2)}"}


def _messages(number: int) -> Row:
    turns = [{"role": "user", "content": sentence(number)}, {"role": "assistant", "content": sentence(number + 1)}]
    return {"messages": turns}


def _rating(number: int) -> Row:
    return {"prompt": sentence(number), "response": f" {sentence(number + 1)}", "rating": float(1 + number % 5)}


@dataclass(frozen=True)
class Schema:
    """How a data set's rows look, what its splits are called, and how many rows the first one gets."""

    row: Callable[[int], Row]
    splits: tuple[str, ...] = ("train", "validation", "test")
    num_rows: int = NUM_ROWS


_TRAIN_TEST = ("train", "test")
# By id, or by id and configuration where there are several.
DATA_SETS: dict[str, Schema] = {
    "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144": Schema(_tldr),
    "vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144": Schema(
        _tldr_pair, ("train", "validation", "validation_cnndm")
    ),
    "openai/summarize_from_feedback": Schema(_summaries, ("train", "validation")),
    "trl-lib/tldr": Schema(_prompt_completion),
    # A judge gets a share of the training texts, which must be of both kinds.
    "stanfordnlp/imdb": Schema(_review, ("train", "test", "unsupervised"), 240),
    "Anthropic/hh-rlhf": Schema(_hh, _TRAIN_TEST),
    "tlc4418/1.4b-policy_preference_data_gold_labelled": Schema(_answers, ("train", "validation")),
    "tatsu-lab/alpaca_farm/alpaca_instructions": Schema(_instruction, ("sft", "preference", "unlabeled", "val")),
    "tatsu-lab/alpaca_farm/alpaca_human_preference": Schema(_outputs, ("preference",)),
    "tatsu-lab/alpaca_farm/alpaca_noisy_multi_preference": Schema(_outputs, ("preference",)),
    "tatsu-lab/alpaca_farm/alpaca_gpt4_preference": Schema(_outputs, ("preference",)),
}
# For data sets that are not known, by the format that the config names.
FORMATS: dict[str, Schema] = {
    "query_responses": Schema(_tldr_pair),
    "summaries": Schema(_summaries),
    "post_summary": Schema(_tldr),
    "instruction": Schema(_instruction),
    "best_of": Schema(_best_of),
    "hh": Schema(_hh),
    "preference": Schema(_preference),
    "messages": Schema(_messages),
    "rating": Schema(_rating),
    "prompt_response": Schema(_prompt_completion),
    "text": Schema(_review),
}


def known_schema(source: FileData | HubData | LabelledTextData, key: str) -> Schema | None:
    """The schema of a data set that is known by its id and configuration; None for any other.

    `key` is the source's place in the config. Raises `ConfigError` for a configuration that a known data set has not.
    """
    if isinstance(source, FileData) or (isinstance(source, LabelledTextData) and not source.from_hub):
        return None
    names = [name.removeprefix(f"{source.path}/") for name in DATA_SETS if name.startswith(f"{source.path}/")]
    if not names:
        return DATA_SETS.get(source.path)
    if source.name not in names:
        near = difflib.get_close_matches(source.name or "", names, n=1)
        raise ConfigError(
            f"{key}.name={source.name}: {source.path} has no such configuration; it has {', '.join(names)}"
            + (f". Did you mean {near[0]}?" if near else "")
        )
    return DATA_SETS[f"{source.path}/{source.name}"]


def schema_of_format(source: FileData | HubData | LabelledTextData) -> Schema | None:
    """The schema of the row format that the config names for a source; None where it names none."""
    return None if isinstance(source, LabelledTextData) else FORMATS.get(source.format)


def rows_of(schema: Schema) -> dict[str, list[Row]]:
    """The rows of every split; no two splits share a prompt."""
    made: dict[str, list[Row]] = {}
    start = 0
    for place, split in enumerate(schema.splits):
        number = schema.num_rows if place == 0 or len(schema.splits) > 3 else NUM_HELD_OUT
        made[split] = [schema.row(start + index) for index in range(number)]
        start += number
    return made
