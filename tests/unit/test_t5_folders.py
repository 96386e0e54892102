"""T5 folders and tokenizers: prompts framed as the encoder reads them, published weights, learned rewards on text."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlhf.config.model import ModelConfig
from rlhf.data.tokenization import decode_response, encode_pair, encode_prompt, has_encoder_prompts
from rlhf.errors import ArtifactError
from rlhf.models import ScalarModel, ensure_distinct_pad, load_policy, load_tokenizer, response_scores, save_model
from rlhf.models.scalar import pad_pairs
from rlhf.records import Message
from rlhf.rewards.learned import LearnedReward, same_token_ids
from tests.unit.test_t5 import TEXTS, scratch


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer as Flan-T5 has it: Unigram over metaspace words, an EOS behind every text, no BOS."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=specials, unk_token="<unk>", show_progress=False)
    inner.train_from_iterator(TEXTS, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    return tokenizer


def flan_folder(folder: Path) -> PreTrainedModel:
    """A tiny T5 of version 1.1 as Flan-T5 is published: an output matrix of its own, no scaling, written by itself."""
    tokenizer = sentencepiece_like()
    config = AutoConfig.for_model(
        "t5",
        vocab_size=len(tokenizer) + 6,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    torch.manual_seed(0)
    model = cast(PreTrainedModel, cast(Any, AutoModelForSeq2SeqLM).from_config(config))
    model.lm_head = torch.nn.Linear(32, config.vocab_size, bias=False)
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_a_published_folder_round_trips_with_its_own_output_matrix(tmp_path: Path) -> None:
    plain: Any = flan_folder(tmp_path / "flan")
    ours: Any = load_policy(tmp_path / "flan")
    tokenizer = load_tokenizer(tmp_path / "flan")
    assert not torch.equal(ours.lm_head.weight, ours.get_input_embeddings().weight)
    batch = {"input_ids": torch.tensor([[5, 6, 1]]), "decoder_input_ids": torch.tensor([[0, 7, 8]])}
    with torch.no_grad():
        expected = plain(**batch).logits
        assert torch.equal(ours(**batch).logits, expected)
        save_model(ours, tokenizer, tmp_path / "ours")
        again = cast(Any, AutoModelForSeq2SeqLM).from_pretrained(tmp_path / "ours")
        torch.testing.assert_close(again(**batch).logits, expected, atol=1e-6, rtol=0)
        assert torch.equal(cast(Any, load_policy(tmp_path / "ours"))(**batch).logits, expected)
        reward = ScalarModel.from_policy(tmp_path / "flan", seed=3)
        reward.save(tmp_path / "reward", ensure_distinct_pad(tokenizer, reward.model))
        pairs = pad_pairs(reward, [([5, 6, 1], [7, 8, 1])], 0)
        assert torch.equal(
            response_scores(ScalarModel.load(tmp_path / "reward"), *pairs), response_scores(reward, *pairs)
        )
        assert torch.equal(
            response_scores(ScalarModel.from_policy(plain, seed=3), *pairs), response_scores(reward, *pairs)
        )


def test_prompts_are_what_the_tokenizer_gives_and_responses_end_with_eos(tmp_path: Path) -> None:
    flan_folder(tmp_path / "flan")
    plain = AutoTokenizer.from_pretrained(tmp_path / "flan")
    tokenizer = load_tokenizer(tmp_path / "flan")
    assert has_encoder_prompts(tokenizer)
    for text in ("the film was good", "what a film", "", "the film</s>"):
        expected = plain(text)["input_ids"]
        if text.endswith("</s>"):
            expected = expected[:-1]  # a text that writes the EOS itself gets no second one
        assert encode_prompt(tokenizer, text) == expected
        assert expected[-1] == tokenizer.eos_token_id
    pair = encode_pair(tokenizer, "the film was", "not good at all")
    assert pair.prompt_ids == plain("the film was")["input_ids"]
    assert pair.response_ids == plain("not good at all")["input_ids"]
    assert pair.response_ids.count(1) == 1
    assert decode_response(tokenizer, pair.response_ids) == "not good at all"
    asked = encode_pair(tokenizer, (Message("user", "what film"),), "a good film")
    assert asked.prompt_ids == plain("user: what film ")["input_ids"]
    assert asked.response_ids[-1] == 1


def test_a_scratch_tokenizer_frames_texts_as_t5_does(tmp_path: Path) -> None:
    model, tokenizer = scratch()
    save_model(model, tokenizer, tmp_path / "policy")
    loaded = load_tokenizer(tmp_path / "policy", ModelConfig())
    assert loaded.bos_token_id is None
    prompt_ids, response_ids = encode_pair(loaded, "the film was", " good")
    assert prompt_ids == tokenizer("the film was")["input_ids"]
    assert prompt_ids.count(loaded.eos_token_id) == response_ids.count(loaded.eos_token_id) == 1
    assert decode_response(loaded, response_ids) == " good"


def test_a_causal_policy_does_not_share_tokens_with_a_t5_reward_model(tmp_path: Path) -> None:
    """Equal vocabularies frame a prompt in two ways, so such a reward model reads text."""
    model, tokenizer = scratch()
    save_model(model, tokenizer, tmp_path / "policy")
    t5 = load_tokenizer(tmp_path / "policy")
    assert same_token_ids(t5, copy.deepcopy(t5))
    assert not same_token_ids(AutoTokenizer.from_pretrained(tmp_path / "policy"), t5)


def test_a_learned_reward_scores_tokens_as_it_scores_their_text(tmp_path: Path) -> None:
    model, tokenizer = scratch()
    save_model(model, tokenizer, tmp_path / "policy")
    scalar_model = ScalarModel.from_policy(model, seed=7)
    scalar_model.save(tmp_path / "reward", ensure_distinct_pad(tokenizer, scalar_model.model))
    loaded = load_tokenizer(tmp_path / "policy")
    reward = LearnedReward.load(
        str(tmp_path / "reward"),
        ModelConfig(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        policy_tokenizer=loaded,
    )
    assert reward.same_tokens
    prompts, responses = ["the film", "what a film was this"], [" was not good", " good"]
    pairs = [encode_pair(loaded, prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    ids, mask, num_prompt = pad_pairs(scalar_model, pairs, 199)
    by_tokens = reward.score_tokens(ids, mask, num_prompt).tolist()
    assert by_tokens == pytest.approx(reward.score_texts(prompts, responses, batch_size=1), abs=1e-5)
    with torch.no_grad():
        expected = [
            float(scalar_model.response_values(torch.tensor([[*pair.prompt_ids, *pair.response_ids]]),
                  torch.ones(1, len(pair.prompt_ids) + len(pair.response_ids), dtype=torch.bool),
                  len(pair.prompt_ids))[0, -1])
            for pair in pairs
        ]  # fmt: skip
    assert by_tokens == pytest.approx(expected, abs=1e-5)


def test_other_encoder_decoder_models_are_refused(tmp_path: Path) -> None:
    _, tokenizer = scratch()
    config = AutoConfig.for_model(
        "bart", vocab_size=300, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    bart = cast(PreTrainedModel, cast(Any, AutoModelForSeq2SeqLM).from_config(config))
    save_model(bart, tokenizer, tmp_path / "bart")
    with pytest.raises(ArtifactError, match="of type bart"):
        load_policy(tmp_path / "bart")
    with pytest.raises(ArtifactError, match="of type bart"):
        ScalarModel.from_policy(tmp_path / "bart", seed=1)
