"""Prompts and responses as token ids, and back.

A prompt begins with exactly one BOS if the tokenizer uses one, whoever writes it (the tokenizer or the chat
template), and a response ends with exactly one EOS, so that prompt ids + response ids are a training example and a
policy that learned from it stops. Prompt and response are encoded apart: the ids of a prompt do not depend on the
response, so sampling starts from the ids that training saw.

The prompt of an encoder-decoder model is a text of its own, which the encoder reads: what `tokenizer(text)` gives, with
the EOS that T5's puts behind every text. Its response is the decoder's text, which continues nothing. Loading marks the
tokenizer of such a model (`use_encoder_prompts`), because no tokenizer tells: some of causal models append EOS too.

Tokenizers of the SentencePiece family put a space in front of every text they encode and drop it when they decode.
A response continues a text, so for them it is encoded, and decoded, behind an anchor that is cut off again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from rlhf.config.data import DataConfig, Kind, SourceConfig, source_of
from rlhf.data.splits import SPLITS, BadRow, Origin, SplitName, Splits, is_empty, refuse_or_skip
from rlhf.data.templates import BUILT_IN
from rlhf.errors import ArtifactError, ConfigError, DataError
from rlhf.records import Comparison, Demonstration, Message, Prompt, PromptContent, RatedResponse, prompt_to_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T", Prompt, Demonstration, Comparison, RatedResponse)
_KINDS: dict[type, Kind] = {
    Prompt: "prompts",
    Demonstration: "demonstrations",
    Comparison: "comparisons",
    RatedResponse: "ratings",
}
PROBE = "a"
# Tried in turn until one does not merge with the text behind it: a line break before words, a letter before breaks.
ANCHORS = ("\n", PROBE)
# Stands for an answer, to find what a chat template writes around it; a text that no data has and no template trims.
MARK = "\u241eanswer\u241e"
_ENCODER_PROMPTS = "rlhf_encoder_prompts"


class EncodedPair(NamedTuple):
    """A prompt with its response; `response_ids` end with EOS."""

    prompt_ids: list[int]
    response_ids: list[int]


@dataclass(frozen=True)
class _Traits:
    """How a tokenizer frames texts: ids it puts first (BOS and the like) and last, and if it adds a space in front."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    adds_space: bool


def use_encoder_prompts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Marks the tokenizer of an encoder-decoder model; copies of it keep the mark, a folder it is saved to does not."""
    setattr(tokenizer, _ENCODER_PROMPTS, True)


def has_encoder_prompts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts are an encoder's texts and responses a decoder's."""
    return bool(getattr(tokenizer, _ENCODER_PROMPTS, False))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: PromptContent) -> list[int]:
    """The ids that a response continues: never empty, no EOS behind them unless it is an encoder that reads them.

    An empty text becomes the BOS, or the EOS (or pad) of a tokenizer without one. Raises `ConfigError` for a
    conversation when the tokenizer has no chat template, `DataError` when the template refuses the conversation.
    """
    text = prompt if isinstance(prompt, str) else _render(tokenizer, prompt, generation=True)
    return _framed(tokenizer, _encode(tokenizer, text)) or [_any_start(tokenizer)]


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: PromptContent, response: str) -> EncodedPair:
    """Prompt and response of a training example, or of a text to score.

    Plain text: for a response that starts with white space, and for one to an empty prompt, the ids of both together
    are those of the whole text. Conversation: the response is what the chat template adds for the assistant's turn,
    up to its end-of-turn token, then EOS unless that is the EOS already. Errors as in `encode_prompt`.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    text = response if isinstance(prompt, str) else _rendered_response(tokenizer, prompt, response)
    begins = has_encoder_prompts(tokenizer) or (isinstance(prompt, str) and is_empty(prompt))
    ids = _encode(tokenizer, text) if begins else encode_continuation(tokenizer, text)
    return EncodedPair(prompt_ids, _ending_with_eos(tokenizer, ids))


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of response ids without special tokens; white space in front is kept where the tokenizer keeps it."""
    plain = _decode(tokenizer, ids)
    if has_encoder_prompts(tokenizer) or not _traits(tokenizer).adds_space:
        return plain
    anchor = _encode(tokenizer, PROBE)
    before, together = _decode(tokenizer, anchor), _decode(tokenizer, [*anchor, *ids])
    return together[len(before) :] if together.startswith(before) else plain


# --- lengths ----------------------------------------------------------------------------------------------------------


def check_length(prompt_ids: Sequence[int], response_ids: Sequence[int], config: SourceConfig) -> str | None:
    """Why a tokenized row exceeds `data.max_prompt_tokens` or `data.max_response_tokens`; None when it fits."""
    for name, ids, limit in (
        ("prompt", prompt_ids, config.max_prompt_tokens),
        ("response", response_ids, config.max_response_tokens),
    ):
        if len(ids) > limit:
            return f"over-long: the {name} has more than data.max_{name}_tokens={limit} tokens"
    return None


def fit_lengths(splits: Splits[T], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Splits[T]:
    """The records that fit the config's lengths in tokens; the others are broken rows like any other.

    A response with an end-of-sequence token inside and a conversation that the chat template refuses are broken rows
    too. Raises `DataError` that lists the first ones with their place unless `data.on_bad_row=skip`; then they join
    `bad_rows`. Of data of several parts the limits are those of the part that the records are from.
    """
    source_config = _source_of(splits, config)
    if source_config is None:
        return splits
    config = source_config
    bad_rows: list[BadRow] = []
    kept: dict[SplitName, list[tuple[T, Origin]]] = {}
    for name in SPLITS:
        kept[name] = []
        for index, record in enumerate(splits.named(name)):
            reason = unusable(record, tokenizer, config)
            if reason is None:
                kept[name].append((record, splits.origin(name, index)))
            else:
                bad_rows.append(BadRow(splits.origin(name, index), reason))
    if not bad_rows:
        return splits
    num_rows = splits.bad_rows.num_rows_read or sum(len(splits.named(name)) for name in SPLITS)
    source = f"data.path={config.path}" if config.type != "embedded" else "the embedded corpus"
    reported = refuse_or_skip([*splits.bad_rows, *bad_rows], num_rows, config.on_bad_row, source)
    if not kept["train"]:
        raise DataError(f"{source}: no row is left to train on; {reported}")
    records = {name: [record for record, _ in kept[name]] for name in SPLITS}
    origins = {name: [origin for _, origin in kept[name]] for name in SPLITS}
    return Splits(records["train"], records["validation"], records["test"], reported, origins)


def _source_of(splits: Splits[T], config: DataConfig) -> SourceConfig | None:
    """The source of these records; None where there are none."""
    first = next((record for name in SPLITS for record in splits.named(name)), None)
    return None if first is None else source_of(config, _KINDS[type(first)])


def unusable(
    record: Prompt | Demonstration | Comparison | RatedResponse,
    tokenizer: PreTrainedTokenizerBase,
    config: SourceConfig,
) -> str | None:
    """Why this tokenizer and these lengths cannot use a record; None when they can."""
    responses: tuple[str, ...] = ()
    if isinstance(record, Demonstration | RatedResponse):
        responses = (record.response,)
    elif isinstance(record, Comparison):
        responses = (record.chosen, record.rejected)
    try:
        if not responses:
            return check_length(encode_prompt(tokenizer, record.prompt), (), config)
        for response in responses:
            prompt_ids, response_ids = encode_pair(tokenizer, record.prompt, response)
            reason = check_length(prompt_ids, response_ids, config)
            if reason is None and tokenizer.eos_token_id in response_ids[:-1]:
                reason = f"the response has the end-of-sequence token {tokenizer.eos_token} inside"
            if reason is not None:
                return reason
    except DataError as error:
        return str(error)
    return None


# --- plain text -------------------------------------------------------------------------------------------------------


_known_traits: WeakKeyDictionary[PreTrainedTokenizerBase, _Traits] = WeakKeyDictionary()


def _traits(tokenizer: PreTrainedTokenizerBase) -> _Traits:
    """How the tokenizer frames a text: found once, since it is asked for with every text."""
    traits = _known_traits.get(tokenizer)
    if traits is None:
        traits = _known_traits[tokenizer] = _find_traits(tokenizer)
    return traits


def _find_traits(tokenizer: PreTrainedTokenizerBase) -> _Traits:
    bare = _encode(tokenizer, PROBE)
    framed = list(tokenizer.encode(PROBE, add_special_tokens=True, verbose=False))
    start = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
    first = tokenizer.convert_ids_to_tokens(bare[0]) if bare else PROBE
    prefix, suffix = tuple(framed[:start]), tuple(framed[start + len(bare) :])
    return _Traits(prefix, suffix, adds_space=not str(first).startswith(PROBE))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # `verbose` silences the warning about the tokenizer's own maximum; the config's lengths are checked instead.
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that continues another one."""
    if _traits(tokenizer).adds_space:
        for anchor in ANCHORS:
            before, together = _encode(tokenizer, anchor), _encode(tokenizer, anchor + text)
            if together[: len(before)] == before:
                return together[len(before) :]
    return _encode(tokenizer, text)


def _framed(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Ids behind what the tokenizer puts first, unless the text wrote the BOS itself; an encoder's before the last."""
    traits = _traits(tokenizer)
    bos = tokenizer.bos_token_id
    if has_encoder_prompts(tokenizer) and tuple(ids[len(ids) - len(traits.suffix) :]) != traits.suffix:
        ids = [*ids, *traits.suffix]
    if ids and bos is not None and ids[0] == bos:
        while len(ids) > 1 and ids[1] == bos:
            ids = ids[1:]
        return ids
    return [*traits.prefix, *ids]


def _any_start(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return int(token)
    raise ArtifactError("the tokenizer has no BOS, EOS or pad token, so an empty prompt cannot be encoded")


def _ending_with_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ArtifactError(
            "the tokenizer has no EOS token, so a model could not learn to stop; set eos_token in tokenizer_config.json"
        )
    end = len(ids)
    while end and ids[end - 1] == eos:
        end -= 1
    return [*ids[:end], int(eos)]


# --- conversations ----------------------------------------------------------------------------------------------------


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation: bool) -> str:
    import jinja2

    if tokenizer.chat_template is None:
        raise ConfigError(
            "the data holds conversations, but the tokenizer has no chat template; set model.chat_template to "
            f"{' or '.join(BUILT_IN)} (built in), or to the path of a Jinja template"
        )
    try:
        turns = prompt_to_json(tuple(messages))
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"model.chat_template is not a valid Jinja template: {error}") from error
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template refuses the conversation: {error}") from error


def _rendered_response(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], response: str) -> str:
    """What the template writes for the assistant's turn, without the white space behind its end-of-turn mark."""
    before = _render(tokenizer, prompt, generation=True)
    marked = _render(tokenizer, [*prompt, Message("assistant", MARK)], generation=False)
    after = _render(tokenizer, [*prompt, Message("assistant", response)], generation=False)
    head, found, ending = marked.rpartition(MARK)
    if not found or not after.endswith(ending):
        raise DataError("the chat template does not write the assistant's last turn as it is")
    turns_end = len(after) - len(ending)
    if after.startswith(head):
        # Some templates open the generation prompt in another way than a finished turn; the answer then follows it.
        lead = head[len(before) :] if head.startswith(before) else ""
        text = lead + after[len(head) : turns_end]
    elif after.startswith(before):
        # The template writes this content otherwise, such as one with a section of reasoning.
        text = after[len(before) : turns_end]
    else:
        raise DataError("the chat template does not write the assistant's last turn as it is")
    eos = tokenizer.eos_token
    return text + (ending[: ending.index(eos)] if eos and eos in ending else ending.rstrip())
