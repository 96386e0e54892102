"""Token ids of prompts and responses: one BOS, one EOS, and the same tokens as the whole text, for every tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rlhf.config.data import FileData
from rlhf.data.splits import BadRows, Origin, Splits
from rlhf.data.templates import BUILT_IN, chat_template
from rlhf.data.tokenization import check_length, decode_response, encode_pair, encode_prompt, fit_lengths
from rlhf.errors import ConfigError, DataError
from rlhf.records import Comparison, Demonstration, Message, Prompt

TEXTS = [
    "the film is a beautiful and timeless story .",
    "it drags along in a dazed way , and the plot is dull",
    "Human: what is the answer?\n\nAssistant: the answer is 42!",
    "system user assistant <|im_start|>",
] * 5
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
CONVERSATION = (Message("system", "Be brief."), Message("user", "what is the film"))
# A template that writes the BOS itself, as Llama's and Gemma's do, and one that ends turns with the EOS.
WITH_BOS = "{{ bos_token }}" + BUILT_IN["plain"]
WITH_EOS = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}"
    "{% if m['role'] == 'assistant' %} {{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Opens a finished answer with an empty section that the generation prompt does not have, as Qwen3's does.
WITH_REASONING = (
    "{% for m in messages %}<{{ m['role'] }}>\n"
    "{% if m['role'] == 'assistant' and '</think>' not in m['content'] %}<think></think>\n{% endif %}"
    "{{ m['content'] }}<end>\n{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def byte_level(adds: str = "$A", bos: str | None = BOS, eos: str = EOS, pad: str | None = PAD) -> Any:
    """A GPT-2-like tokenizer; `adds` is what its post-processor writes around a text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    specials = list(dict.fromkeys(token for token in (bos, eos, pad) if token))
    inner.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=ALPHABET, show_progress=False),
    )
    return finished(inner, adds, specials, bos, eos, pad)


def llama(adds: str = "<s> $A") -> Any:
    """A tokenizer as Llama 2 and Mistral have it: a space in front of every text, bytes as a fallback."""
    specials = ["<unk>", BOS, EOS, PAD]
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Words are learned apart, as SentencePiece does.
    inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    inner.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=specials, show_progress=False))
    trained = json.loads(inner.to_str())["model"]
    vocabulary: dict[str, int] = trained["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    merges = [tuple(merge) for merge in trained["merges"]]
    inner.model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    inner.pre_tokenizer = None
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return finished(inner, adds, specials, BOS, EOS, PAD)


def unigram(adds: str = "$A </s>") -> Any:
    """A tokenizer as T5 has it: metaspace, an EOS behind every text and no BOS."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    specials = [PAD, EOS, "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=specials, unk_token="<unk>", show_progress=False)
    inner.train_from_iterator(TEXTS, trainer)
    return finished(inner, adds, specials, None, EOS, PAD)


def finished(inner: Any, adds: str, specials: list[str], bos: str | None, eos: str, pad: str | None) -> Any:
    inner.add_special_tokens([AddedToken(token, special=True) for token in specials])
    if adds != "$A":
        named = [(token, inner.token_to_id(token)) for token in specials]
        inner.post_processor = processors.TemplateProcessing(single=adds, special_tokens=named)
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=inner, bos_token=bos, eos_token=eos, pad_token=pad)


TOKENIZERS: dict[str, Any] = {
    "byte_level": byte_level(),
    "byte_level_bos": byte_level("<s> $A"),
    "byte_level_bos_eos": byte_level("<s> $A </s>"),
    "gpt2": byte_level(bos="<|endoftext|>", eos="<|endoftext|>", pad="<|endoftext|>"),
    "pad_is_eos": byte_level("<s> $A", pad=EOS),
    "llama": llama(),
    "unigram": unigram(),
}
ADDS_BOS = {"byte_level_bos", "byte_level_bos_eos", "pad_is_eos", "llama"}
WORDS = st.lists(
    st.sampled_from(["the", "film", "is", "dull", ",", ".", "plot", "naïve", "42", "<s"]), min_size=1, max_size=8
)


@pytest.fixture(params=sorted(TOKENIZERS))
def named(request: pytest.FixtureRequest) -> tuple[str, Any]:
    tokenizer = TOKENIZERS[request.param]
    tokenizer.chat_template = None
    return request.param, tokenizer


def bos_count(tokenizer: Any, ids: list[int]) -> int:
    return ids.count(tokenizer.bos_token_id) if tokenizer.bos_token_id is not None else 0


# --- plain text -------------------------------------------------------------------------------------------------------


def test_one_bos_where_the_tokenizer_uses_one_and_one_eos_always(named: tuple[str, Any]) -> None:
    name, tokenizer = named
    for prompt, response in (("the film is", " dull ."), ("", "the film"), ("the film\n", "x"), (" ", " y")):
        prompt_ids, response_ids = encode_pair(tokenizer, prompt, response)
        assert prompt_ids == encode_prompt(tokenizer, prompt)
        assert prompt_ids
        assert response_ids[-1] == tokenizer.eos_token_id
        assert response_ids.count(tokenizer.eos_token_id) == 1
        if prompt.strip():
            assert bos_count(tokenizer, prompt_ids) == (name in ADDS_BOS)
            assert prompt_ids[-1] != tokenizer.eos_token_id
        if name in ADDS_BOS:
            assert prompt_ids[0] == tokenizer.bos_token_id
            assert bos_count(tokenizer, prompt_ids) == 1
        if tokenizer.bos_token_id != tokenizer.eos_token_id:
            assert bos_count(tokenizer, response_ids) == 0


def test_a_text_that_writes_the_special_tokens_itself_gets_no_second_ones() -> None:
    tokenizer = TOKENIZERS["byte_level_bos"]
    plain = encode_pair(tokenizer, "the film", " is dull")
    assert encode_pair(tokenizer, "<s>the film", " is dull</s>") == plain
    assert encode_pair(tokenizer, "<s><s>the film", " is dull</s></s>") == plain


def test_empty_prompts_start_with_something(named: tuple[str, Any]) -> None:
    _, tokenizer = named
    ids = encode_prompt(tokenizer, "")
    assert len(ids) == 1
    assert ids[0] == (tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@given(words=WORDS, rest=WORDS)
def test_prompt_and_response_are_the_tokens_of_the_whole_text(name: str, words: list[str], rest: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    prompt, response = " ".join(words), " " + " ".join(rest)
    pair = encode_pair(tokenizer, prompt, response)
    whole = encode_pair(tokenizer, "", prompt + response)
    # Both as a reward model sees them: a prompt with its response, and a whole text with the empty prompt.
    start = encode_prompt(tokenizer, "") if name in ADDS_BOS else []
    assert pair.prompt_ids + pair.response_ids == start + whole.response_ids


@pytest.mark.parametrize("name", sorted(set(TOKENIZERS) - {"unigram"}))
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1, max_size=20))
def test_responses_return_as_they_were(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    for response in (text, " " + text, "\n" + text):
        ids = encode_pair(tokenizer, "the film", response).response_ids
        decoded = decode_response(tokenizer, ids)
        if "▁" not in response:
            assert decoded == response


def test_unigram_keeps_the_space_in_front() -> None:
    tokenizer = TOKENIZERS["unigram"]
    ids = encode_pair(tokenizer, "the film", " is dull").response_ids
    assert decode_response(tokenizer, ids) == " is dull"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "is dull"


def test_decoding_skips_special_tokens(named: tuple[str, Any]) -> None:
    _, tokenizer = named
    ids = encode_pair(tokenizer, "the film", " is dull").response_ids
    padded = [*ids, tokenizer.pad_token_id, tokenizer.pad_token_id]
    assert decode_response(tokenizer, padded) == " is dull"
    assert decode_response(tokenizer, []) == ""


def test_eos_inside_the_prompt_is_not_the_response(named: tuple[str, Any]) -> None:
    _, tokenizer = named
    pair = encode_pair(tokenizer, f"the film{tokenizer.eos_token} is", " dull")
    assert tokenizer.eos_token_id in pair.prompt_ids
    assert pair.response_ids == encode_pair(tokenizer, "it is", " dull").response_ids


# --- conversations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [*BUILT_IN.values(), WITH_BOS, WITH_EOS, WITH_REASONING])
def test_one_bos_and_one_eos_with_every_template(named: tuple[str, Any], template: str) -> None:
    name, tokenizer = named
    if tokenizer.bos_token is None and "bos_token" in template:
        template = template.replace("{{ bos_token }}", "")
    tokenizer.chat_template = template
    writes_bos = "bos_token" in template
    prompt_ids, response_ids = encode_pair(tokenizer, CONVERSATION, "it is dull")
    assert prompt_ids == encode_prompt(tokenizer, CONVERSATION)
    assert bos_count(tokenizer, prompt_ids) == (name in ADDS_BOS or writes_bos)
    assert response_ids.count(tokenizer.eos_token_id) == 1
    assert response_ids[-1] == tokenizer.eos_token_id
    assert "it is dull" in decode_response(tokenizer, response_ids)


def test_the_response_is_what_the_template_adds() -> None:
    tokenizer = TOKENIZERS["byte_level_bos"]

    def added(template: str, response: str = "dull") -> str:
        tokenizer.chat_template = template
        return decode_response(tokenizer, encode_pair(tokenizer, CONVERSATION, response).response_ids)

    def asked(template: str) -> str:
        tokenizer.chat_template = template
        return str(tokenizer.decode(encode_prompt(tokenizer, CONVERSATION)))

    assert added(BUILT_IN["plain"]) == " dull"
    assert asked(BUILT_IN["plain"]) == "<s>Be brief.\n\nHuman: what is the film\n\nAssistant:"
    assert added(BUILT_IN["chatml"]) == "dull<|im_end|>"
    assert asked(BUILT_IN["chatml"]).endswith("what is the film<|im_end|>\n<|im_start|>assistant\n")
    # The content may look like the end mark, or like a part of the template.
    assert added(BUILT_IN["chatml"], "end") == "end<|im_end|>"
    assert added(BUILT_IN["chatml"], "assistant\n") == "assistant\n<|im_end|>"
    assert added(WITH_EOS) == " dull "
    assert added(WITH_EOS, "  dull\n") == " dull "
    assert added(WITH_REASONING) == "<think></think>\ndull<end>"
    assert added(WITH_REASONING, "<think>so</think>dull") == "<think>so</think>dull<end>"


def test_several_turns_are_all_in_the_prompt() -> None:
    tokenizer = TOKENIZERS["byte_level_bos"]
    tokenizer.chat_template = BUILT_IN["plain"]
    history = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    pair = encode_pair(tokenizer, history, "d")
    assert tokenizer.decode(pair.prompt_ids) == "<s>\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert tokenizer.decode(pair.response_ids) == " d</s>"


def test_an_end_of_turn_token_that_is_not_the_eos_stays() -> None:
    tokenizer = byte_level("<s> $A")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = BUILT_IN["chatml"]
    ids = encode_pair(tokenizer, CONVERSATION, "dull").response_ids
    assert ids[-2:] == [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    tokenizer.eos_token = "<|im_end|>"
    ids = encode_pair(tokenizer, CONVERSATION, "dull").response_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert decode_response(tokenizer, ids) == "dull"


def test_a_conversation_without_template_names_the_option(named: tuple[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"model\.chat_template to chatml or plain"):
        encode_prompt(named[1], CONVERSATION)


def test_templates_that_refuse_or_are_broken() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match="refuses the conversation: System role not supported"):
        encode_prompt(tokenizer, CONVERSATION)
    tokenizer.chat_template = "{% for m in messages %}"
    with pytest.raises(ConfigError, match="not a valid Jinja template"):
        encode_prompt(tokenizer, CONVERSATION)
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1]['content'] | upper }}"
    with pytest.raises(DataError, match="does not write the assistant's last turn"):
        encode_pair(tokenizer, CONVERSATION, "dull")


def test_template_option_is_a_name_a_text_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(WITH_EOS)
    assert chat_template("chatml") == BUILT_IN["chatml"]
    assert chat_template(WITH_BOS) == WITH_BOS
    assert chat_template(str(file)) == WITH_EOS
    with pytest.raises(ConfigError, match=r"model\.chat_template=chat-ml: expected chatml, plain, the path"):
        chat_template("chat-ml")


# --- lengths ----------------------------------------------------------------------------------------------------------


def test_over_long_rows_are_reported_like_any_broken_row() -> None:
    tokenizer = TOKENIZERS["byte_level_bos"]
    records = [
        Comparison("the film", " is dull", " is dull dull"),
        Comparison("the film " * 20, " is", " was"),
        Comparison("the film", " is", " was" * 40),
        Comparison("the film", " is</s> dull", " was"),
    ]
    origins = [Origin("f.jsonl", number) for number in range(1, 5)]
    splits = Splits(records, [], [], BadRows((), 4), {"train": origins})
    config = FileData(path="f.jsonl", max_prompt_tokens=20, max_response_tokens=30)
    with pytest.raises(DataError) as caught:
        fit_lengths(splits, tokenizer, config)
    assert str(caught.value).splitlines()[:4] == [
        "3 broken rows of 4 in data.path=f.jsonl:",
        "  f.jsonl, line 2: over-long: the prompt has more than data.max_prompt_tokens=20 tokens",
        "  f.jsonl, line 3: over-long: the response has more than data.max_response_tokens=30 tokens",
        "  f.jsonl, line 4: the response has the end-of-sequence token </s> inside",
    ]
    kept = fit_lengths(splits, tokenizer, config.model_copy(update={"on_bad_row": "skip"}))
    assert kept.train == records[:1]
    assert kept.origins["train"] == origins[:1]
    assert str(kept.bad_rows).startswith("left out 3 of 4 rows: 1 x over-long")


def test_lengths_are_inclusive_and_cover_every_kind() -> None:
    tokenizer = TOKENIZERS["byte_level_bos"]
    pair = encode_pair(tokenizer, "the film", " is dull")
    exact = FileData(path="f", max_prompt_tokens=len(pair.prompt_ids), max_response_tokens=len(pair.response_ids))
    assert check_length(*pair, exact) is None
    short = exact.model_copy(update={"max_response_tokens": len(pair.response_ids) - 1})
    assert "the response has more" in str(check_length(*pair, short))
    demonstrations = Splits([Demonstration("the film", " is dull")], [], [])
    assert fit_lengths(demonstrations, tokenizer, exact) is demonstrations
    with pytest.raises(DataError, match="the train split, record 1: over-long"):
        fit_lengths(demonstrations, tokenizer, short)
    prompts = Splits([Prompt("the film")], [Prompt("the film " * 9)], [])
    with pytest.raises(DataError, match="the validation split, record 1: over-long: the prompt"):
        fit_lengths(prompts, tokenizer, exact)


def test_when_every_row_is_over_long_the_run_stops_even_with_skip() -> None:
    config = FileData(path="f", max_prompt_tokens=1, on_bad_row="skip")
    with pytest.raises(DataError, match="no row is left to train on; left out 1 of 1"):
        fit_lengths(Splits([Prompt("the film is")], [], []), TOKENIZERS["byte_level"], config)
