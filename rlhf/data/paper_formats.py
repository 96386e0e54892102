"""Row formats of the data sets that papers on RLHF were written with.

Name and fields of a row; what a row gives:

- `query_responses`: `query` with `chosen` and `rejected`, or with `response0`, `response1` and `choice`, the index of
  the better one (a comparison), with `reference_response` (a demonstration), or alone (a prompt): TL;DR as Huang et al.
  2024 (arXiv 2403.17031) prepared it, later and earlier.
- `summaries`: `info` with `subreddit`, `title`, `post`; `summaries`, two objects with `text`; and `choice`: the
  comparisons of openai/summarize_from_feedback. Rows on news articles, whose `info` has no post, are broken rows.
- `post_summary`: `subreddit`, `title`, `post` and `summary`: the filtered TL;DR data. A demonstration, or a prompt.
- `instruction`: `instruction` and `input` with `output_1`, `output_2` and `preference` (1 or 2), with `answers`, two
  texts, and `preference` (0 or 1), with `output`, or alone: AlpacaFarm, and Coste et al. 2023.
- `best_of`: `query`, `sample0`, `sample1`, ... and `best`, the number of the best one: lm-human-preferences. One
  comparison with each of the others.

What a data set writes as parts is laid out as a text here: a post ends with "TL;DR:", an instruction with a heading of
its own. Responses that follow "TL;DR:" start with a space. An end-of-text mark that a data set wrote behind a response
is taken off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data.readers import json_type
from rlhf.data.row_format import Format
from rlhf.data.turns import RowError
from rlhf.records import Comparison, Demonstration, Prompt, Record

Fields = Mapping[str, Any]
# GPT-2's and Pythia's; data sets that were prepared for them have it in their texts.
END_OF_TEXT = "<|endoftext|>"


def tldr_prompt(subreddit: str | None, title: str | None, post: str) -> str:
    """A Reddit post as the TL;DR task shows it (Stiennon et al. 2020, appendix B.2), without the parts it lacks."""
    parts = [f"SUBREDDIT: r/{subreddit.removeprefix('r/')}"] if subreddit else []
    parts += [f"TITLE: {title}"] if title else []
    return "\n\n".join([*parts, f"POST: {post}", "TL;DR:"])


def instruction_prompt(instruction: str, more: str | None) -> str:
    """An instruction with its input, if there is one."""
    parts = [f"### Instruction:\n{instruction}"] + ([f"### Input:\n{more}"] if more else [])
    return "\n\n".join([*parts, "### Response:\n"])


def parse_query_responses(row: Fields) -> Record:
    """TL;DR with its query laid out."""
    query = text_of(row, "query")
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return _pair(query, [_behind(text_of(row, name)) for name in ("chosen", "rejected")], 0)
    if row.get("response0") is not None or row.get("response1") is not None:
        responses = [_behind(text_of(row, name)) for name in ("response0", "response1")]
        return _pair(query, responses, _index(row, "choice", 2))
    if row.get("reference_response") is not None:
        return Demonstration(query, _behind(text_of(row, "reference_response")))
    return Prompt(query)


def parse_summaries(row: Fields) -> Record:
    """A comparison of two summaries of a Reddit post."""
    info = row.get("info")
    if not isinstance(info, Mapping) or not isinstance(info.get("post"), str) or not info["post"].strip():
        raise RowError("field 'info' has no text 'post'; of this data set only the rows on Reddit posts are read")
    summaries = row.get("summaries")
    if not isinstance(summaries, Sequence) or isinstance(summaries, str) or len(summaries) != 2:
        raise RowError(f"field 'summaries' is a list of two objects with text, found {json_type(summaries)}")
    texts = [_behind(text_of(summary, "text")) for summary in summaries]
    prompt = tldr_prompt(_optional(info, "subreddit"), _optional(info, "title"), info["post"])
    return _pair(prompt, texts, _index(row, "choice", 2))


def parse_post_summary(row: Fields) -> Record:
    """A Reddit post with its author's summary."""
    prompt = tldr_prompt(_optional(row, "subreddit"), _optional(row, "title"), text_of(row, "post"))
    return Prompt(prompt) if row.get("summary") is None else Demonstration(prompt, _behind(text_of(row, "summary")))


def parse_instruction(row: Fields) -> Record:
    """An instruction with a demonstration, or with two responses of which one was preferred."""
    prompt = instruction_prompt(text_of(row, "instruction"), _optional(row, "input"))
    if row.get("output_1") is not None or row.get("output_2") is not None:
        return _pair(prompt, [text_of(row, name) for name in ("output_1", "output_2")], _index(row, "preference", 2, 1))
    answers = row.get("answers")
    if answers is not None:
        if not isinstance(answers, list) or len(answers) != 2 or not all(isinstance(text, str) for text in answers):
            raise RowError(f"field 'answers' is a list of two texts, found {json_type(answers)}")
        return _pair(prompt, answers, _index(row, "preference", 2))
    return Prompt(prompt) if row.get("output") is None else Demonstration(prompt, text_of(row, "output"))


def parse_best_of(row: Fields) -> Record:
    """The first comparison of a choice: see `best_of_comparisons`."""
    return best_of_comparisons(row)[0]


def best_of_comparisons(row: Fields) -> Sequence[Comparison]:
    """The best of several samples against each of the others; equal texts are one sample."""
    query = text_of(row, "query")
    names = [f"sample{number}" for number in range(len(row)) if f"sample{number}" in row]
    samples = [text_of(row, name) for name in names]
    if len(samples) < 2:
        raise RowError("fields 'sample0', 'sample1', ... hold at least two samples")
    best = samples[_index(row, "best", len(samples))]
    others = [text for text in dict.fromkeys(samples) if text != best]
    if not others:
        raise RowError("all samples are the same")
    return [Comparison(query, best, other) for other in others]


def is_comparison_of_instruction(row: Fields) -> bool:
    """Rows with one `output` are read as `prompt_response` unless the format is named."""
    return "instruction" in row and ("output_1" in row or ("answers" in row and "preference" in row))


def text_of(row: Fields, name: str) -> str:
    """A field that holds text. Raises `RowError` that says so for token ids, which no format can read."""
    value = row.get(name) if isinstance(row, Mapping) else None
    if value is None:
        raise RowError(f"field '{name}' is missing")
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        raise RowError(f"field '{name}' holds token ids: name the tokenizer that wrote them in decode_with")
    if not isinstance(value, str):
        raise RowError(f"field '{name}' is text, found {json_type(value)}")
    if not value or value.isspace():
        raise RowError(f"field '{name}' is empty")
    return value


def _optional(row: Fields, name: str) -> str | None:
    value = row.get(name)
    return value if isinstance(value, str) and value.strip() else None


def _behind(response: str) -> str:
    """A response as it follows a prompt that ends with a colon."""
    plain = response.removesuffix(END_OF_TEXT)
    if not plain.strip():
        raise RowError("a response is empty")
    return plain if plain[0].isspace() else f" {plain}"


def _index(row: Fields, name: str, number: int, first: int = 0) -> int:
    """Which of `number` things a field names, counted from 0; the data set counts from `first`."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in range(first, first + number):
        raise RowError(f"field '{name}' is a number from {first} to {first + number - 1}, found {value!r}")
    return int(value) - first


def _pair(prompt: str, responses: Sequence[str], better: int) -> Comparison:
    chosen, rejected = responses[better], responses[1 - better]
    if chosen == rejected:
        raise RowError("both responses are the same")
    return Comparison(prompt, chosen, rejected)


_BOTH, _ALL = (Demonstration, Prompt), (Comparison, Demonstration, Prompt)
# Recognised before all other formats: their rows have fields that those have too.
FORMATS: dict[str, Format] = {
    "query_responses": Format(
        "query with chosen, rejected or response0, response1, choice, or with reference_response",
        # A query with chosen and rejected is read so where the format is named: unnamed, it is `preference`.
        lambda row: "query" in row and ("response0" in row or "reference_response" in row),
        parse_query_responses,
        ("query",),
        _ALL,
    ),
    "best_of": Format(
        "query, sample0, sample1, ... and best, the number of the best one",
        lambda row: all(name in row for name in ("query", "sample0", "best")),
        parse_best_of,
        ("query",),
        _ALL,
        best_of_comparisons,
    ),
    "summaries": Format(
        "info with post, summaries with text, choice",
        lambda row: all(name in row for name in ("info", "summaries", "choice")),
        parse_summaries,
        ("info",),
        _ALL,
    ),
    "instruction": Format(
        "instruction, input, output_1, output_2 and preference, or answers and preference",
        is_comparison_of_instruction,
        parse_instruction,
        ("instruction", "input"),
        _ALL,
    ),
    "post_summary": Format(
        "post, summary and usually subreddit, title",
        lambda row: "post" in row and "summary" in row,
        parse_post_summary,
        ("subreddit", "title", "post"),
        _BOTH,
    ),
}
