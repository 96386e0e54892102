"""Model folders that plain transformers and tokenizers wrote work here, and ours work there, with equal logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlhf.models import ScalarModel, check_vocabulary, ensure_distinct_pad, load_policy, load_tokenizer, save_model
from rlhf.models.paths import check_model_path

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GROUPED = COMMON | {"num_key_value_heads": 2, "head_dim": 8}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": COMMON,
    "gpt_neox": COMMON,
    "qwen3": GROUPED,
    # A window shorter than the sequences, as real Gemma-2 and Mistral models have it.
    "gemma2": GROUPED | {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "mistral": GROUPED | {"sliding_window": 8},
}
TEXTS = ["the film was good", "a film that was not good at all", "what a film this was, good and long"] * 20


def plain_tokenizer(pad: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose EOS is GPT-2's.

    `pad` is None (as GPT-2 has it), "eos", a token of its "own", or "reserved": EOS, with an unused token in reserve.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>"] + (["<|padding|>"] if pad in ("own", "reserved") else [])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    if pad is not None:
        wrapped.pad_token = "<|padding|>" if pad == "own" else "<|endoftext|>"
    return wrapped


def plain_folder(folder: Path, architecture: str, pad: str | None, spare_rows: int = 0) -> PreTrainedModel:
    """A random model of `architecture` and its tokenizer, written by plain transformers alone."""
    tokenizer = plain_tokenizer(pad)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer) + spare_rows,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SIZES[architecture],
    )
    torch.manual_seed(0)
    model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def aligned(model: Any) -> Any:
    """The model with its weights at aligned addresses: products on unaligned (mapped) memory round otherwise."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def right_padded(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch = tokenizer(TEXTS[:3], padding=True, padding_side="right", return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"].bool()


@pytest.mark.parametrize("architecture", sorted(SIZES))
def test_policy_folder_of_plain_transformers_round_trips(architecture: str, tmp_path: Path) -> None:
    plain = plain_folder(tmp_path / "plain", architecture, pad=None)
    check_model_path(str(tmp_path / "plain"), "model.path")
    tokenizer = load_tokenizer(tmp_path / "plain")
    ours = load_policy(tmp_path / "plain")
    check_vocabulary(ours, tokenizer, "plain")
    ids, mask = right_padded(tokenizer)
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(ours(input_ids=ids, attention_mask=mask).logits, expected)

    save_model(ours, tokenizer, tmp_path / "ours")
    check_model_path(str(tmp_path / "ours"), "model.path")
    again = aligned(AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32))
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids, attention_mask=mask).logits, expected)
    reread = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert reread(TEXTS[:3])["input_ids"] == tokenizer(TEXTS[:3])["input_ids"]
    assert reread.eos_token_id == tokenizer.eos_token_id
    assert str(tmp_path) not in (tmp_path / "ours" / "config.json").read_text()
    assert str(tmp_path) not in (tmp_path / "ours" / "tokenizer_config.json").read_text()
    assert list((tmp_path / "ours").glob("*.safetensors"))


@pytest.mark.parametrize("architecture", sorted(SIZES))
@pytest.mark.parametrize("pad", [None, "eos", "own"])
def test_reward_model_round_trips(architecture: str, pad: str | None, tmp_path: Path) -> None:
    plain_folder(tmp_path / "plain", architecture, pad)
    reward = ScalarModel.from_policy(tmp_path / "plain", seed=3)
    tokenizer = ensure_distinct_pad(load_tokenizer(tmp_path / "plain"), reward.model)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    check_vocabulary(reward.model, tokenizer, "reward")
    reward.save(tmp_path / "reward", tokenizer)

    ids, mask = right_padded(tokenizer)
    with torch.no_grad():
        values = reward(ids, mask)
        scores = values[torch.arange(3), mask.sum(-1) - 1]
        plain = aligned(AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward"))
        logits = plain(input_ids=ids, attention_mask=mask).logits
        assert logits.shape == (3, 1)
        assert torch.equal(logits[:, 0], scores)
        assert torch.equal(ScalarModel.load(tmp_path / "reward")(ids, mask), values)
    reread = AutoTokenizer.from_pretrained(tmp_path / "reward")
    assert reread.pad_token_id == plain.config.pad_token_id == tokenizer.pad_token_id


def test_a_reserved_pad_token_is_used_before_one_is_added(tmp_path: Path) -> None:
    plain_folder(tmp_path / "plain", "gpt_neox", pad="reserved")
    tokenizer = load_tokenizer(tmp_path / "plain")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    reward = ScalarModel.from_policy(tmp_path / "plain", seed=0)
    distinct = ensure_distinct_pad(tokenizer, reward.model)
    assert distinct.pad_token == "<|padding|>"
    assert len(distinct) == len(tokenizer)
    assert reward.model.config.pad_token_id == distinct.pad_token_id == tokenizer.convert_tokens_to_ids("<|padding|>")


def test_spare_embedding_rows_are_used_before_the_model_grows(tmp_path: Path) -> None:
    plain_folder(tmp_path / "spare", "gpt_neox", pad=None, spare_rows=5)
    plain_folder(tmp_path / "full", "gpt_neox", pad=None)
    for name, growth in (("spare", 0), ("full", 1)):
        tokenizer = load_tokenizer(tmp_path / name)
        reward = ScalarModel.from_policy(tmp_path / name, seed=0)
        before = cast(Any, reward.model.get_input_embeddings()).weight.detach().clone()
        distinct = ensure_distinct_pad(tokenizer, reward.model)
        after = cast(Any, reward.model.get_input_embeddings()).weight.detach()
        assert after.shape[0] == before.shape[0] + growth == reward.model.config.vocab_size
        assert torch.equal(after[: before.shape[0]], before)
        if growth:
            torch.testing.assert_close(after[-1], before.mean(0))
        assert tokenizer.pad_token_id == tokenizer.eos_token_id, "the policy's tokenizer is left alone"
        assert distinct.pad_token == "<|pad|>"
