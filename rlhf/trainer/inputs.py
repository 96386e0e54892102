"""The trainer's datasets and tokenizers, as the stage has them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from rlhf.data.formats import RowError, messages_of, parse_prompt_response
from rlhf.data.tokenization import EncodedPair, encode_pair, use_encoder_prompts
from rlhf.errors import ConfigError, DataError
from rlhf.models.loading import PAD_TOKENS, check_vocabulary, load_tokenizer
from rlhf.models.seq2seq import is_encoder_decoder
from rlhf.records import Demonstration, PromptContent
from rlhf.stages.sampling import EncodedPrompt, encode_one

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A `datasets.Dataset`, or any finite iterable of rows; a row that is a text is a prompt without columns.
Rows = Iterable[Mapping[str, Any] | str]
TokenizerSource = PreTrainedTokenizerBase | str | Path


def tokenizer_of(source: TokenizerSource | None, model: PreTrainedModel, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that argument `name` gives; without one, that of the folder or hub id `model` was loaded from.

    It gets a pad token if it has none (EOS serves: masks are carried). Raises `ConfigError` without a tokenizer or
    EOS, `ArtifactError` for a tokenizer with ids that the model does not have.
    """
    if source is None:
        source = model.name_or_path
        if not source:
            raise ConfigError(
                f"{name} is missing: {type(model).__name__} was not loaded from a folder or hub id that could have its "
                f"tokenizer. Pass {name}=tokenizer"
            )
    tokenizer = prepared_tokenizer(source, name)
    check_vocabulary(model, tokenizer, name)
    if is_encoder_decoder(model):
        use_encoder_prompts(tokenizer)
    return tokenizer


def prepared_tokenizer(source: TokenizerSource, name: str) -> PreTrainedTokenizerBase:
    """A tokenizer with EOS and a pad token: a copy of the one given, or that of a folder or hub id."""
    if isinstance(source, str | Path):
        return load_tokenizer(source, key=name)
    if not isinstance(source, PreTrainedTokenizerBase):
        raise ConfigError(
            f"{name} must be a tokenizer, or the folder or hub id of one, not {type(source).__name__}"
            + ("; of a processor pass its .tokenizer" if hasattr(source, "tokenizer") else "")
        )
    tokenizer = copy.deepcopy(source)
    _complete(tokenizer, name)
    return tokenizer


def _complete(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """What `load_tokenizer` sees to for a folder."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{name}: the tokenizer has no EOS token, so a response could never end. Set it to the token that ends a "
            'text: tokenizer.eos_token = "<token of its vocabulary>"'
        )
    if tokenizer.pad_token_id is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = next((token for token in PAD_TOKENS if token in vocabulary), tokenizer.eos_token)


def encode_prompts(rows: Rows, tokenizer: PreTrainedTokenizerBase, name: str) -> list[EncodedPrompt]:
    """The prompts of dataset argument `name`, each with all columns that any row has (None where its row lacks one).

    Raises `DataError` for a dataset without rows or column `prompt`, and for a row that is no prompt.
    """
    contents: list[PromptContent] = []
    columns: list[dict[str, Any]] = []
    for number, row in _rows(rows, name):
        fields: Mapping[str, Any] = {"prompt": row} if isinstance(row, str) else row
        _check_column(fields, name, number)
        contents.append(_prompt(fields["prompt"], name, number))
        columns.append({column: value for column, value in fields.items() if column != "prompt"})
    if not contents:
        raise DataError(f"{name} has no row")
    names = dict.fromkeys(column for row in columns for column in row)
    return [
        encode_one(tokenizer, content, {column: row.get(column) for column in names})
        for content, row in zip(contents, columns, strict=True)
    ]


def encode_demonstrations(rows: Rows, tokenizer: PreTrainedTokenizerBase, name: str) -> list[EncodedPair]:
    """Prompt and response (or completion) of each row. Raises `DataError` for rows that have none."""
    pairs = []
    for number, row in _rows(rows, name):
        try:
            record = parse_prompt_response({"text": row} if isinstance(row, str) else row)
        except RowError as error:
            raise DataError(f"{name}, row {number}: {error}") from error
        if not isinstance(record, Demonstration):
            raise DataError(f"{name}, row {number}: field 'response' is missing (or 'completion')")
        pairs.append(encode_pair(tokenizer, record.prompt, record.response))
    if not pairs:
        raise DataError(f"{name} has no row")
    return pairs


def _rows(rows: Rows, name: str) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    if isinstance(rows, str | Path | Mapping) or not isinstance(rows, Iterable):
        kind = f"a dictionary with the keys {', '.join(map(str, rows))}" if isinstance(rows, Mapping) else repr(rows)
        raise DataError(
            f"{name} must be a datasets.Dataset, or a list of rows or of prompts, not {kind}. Of a dataset with splits "
            "pass one split; load a file with datasets.load_dataset"
        )
    for number, row in enumerate(rows):
        if not isinstance(row, str | Mapping):
            raise DataError(f"{name}, row {number}: a row is a dictionary or a text, not {type(row).__name__}")
        yield number, row


def _check_column(fields: Mapping[str, Any], name: str, number: int) -> None:
    if fields.get("prompt") is not None:
        return
    listed = ", ".join(str(column) for column in fields) or "none"
    hint = (
        "Pass the texts instead of token ids: the trainer tokenises them"
        if "input_ids" in fields
        else 'Rename the one with the prompts: dataset.rename_column("…", "prompt")'
    )
    raise DataError(f"{name}, row {number}: there is no prompt; expected a column 'prompt', found {listed}. {hint}")


def _prompt(value: Any, name: str, number: int) -> PromptContent:
    try:
        if isinstance(value, str):
            if not value.strip():
                raise RowError("the prompt is empty")
            return value
        messages = messages_of(value, "prompt")
        if not messages or messages[-1].role != "user":
            raise RowError("a conversation to answer ends with a user turn")
    except RowError as error:
        raise DataError(f"{name}, row {number}: {error}") from error
    return messages
