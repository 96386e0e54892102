"""Rows whose texts are token ids, as lm-human-preferences published its labels: back to texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.data.readers import Row
from rlhf.data.splits import BadRow
from rlhf.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def with_texts(rows: Iterable[Row | BadRow], decode_with: str | None) -> Iterator[Row | BadRow]:
    """The rows with every list of token ids decoded by the tokenizer `decode_with`; None: as they are.

    Ids beyond its vocabulary, which stand for padding, are left out. Raises `ConfigError` when there is no tokenizer.
    """
    if decode_with is None:
        yield from rows
        return
    tokenizer = _load(decode_with)
    for row in rows:
        if isinstance(row, BadRow):
            yield row
        else:
            yield Row(row.origin, {name: _text(value, tokenizer) for name, value in row.fields.items()})


def _text(value: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    if not (isinstance(value, list) and value and all(type(item) is int for item in value)):
        return value
    known = [item for item in value if 0 <= item < len(tokenizer)]
    return str(tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _load(path: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    from rlhf.data.hub_access import use_cache_if_hub_is_silent

    if not Path(path).expanduser().is_dir():
        use_cache_if_hub_is_silent()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.decode_with={path}: no tokenizer can be loaded from there: {str(error).splitlines()[0]} Give a "
            "hub id such as openai-community/gpt2, or a folder with a tokenizer"
        ) from error
    return tokenizer
