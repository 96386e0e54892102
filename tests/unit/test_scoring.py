"""Scoring against single responses without padding, in pieces against at once, with suppressed tokens; T5 and BART."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from rlhf.errors import ConfigError
from rlhf.models.loading import disable_dropout
from rlhf.models.output_head import output_head
from rlhf.models.sampling import Suppressed, draw_tokens, suppress_logits
from rlhf.models.scoring import (
    check_chunked,
    logprobs_from_hidden,
    response_hidden_states,
    response_logits,
    response_logprobs,
    response_logprobs_and_entropy,
)
from rlhf.ops.logprobs import logprobs_and_entropy
from tests.unit.ragged import backward
from tests.unit.test_architectures import SIZES

VOCABULARY, NUM_PROMPT, NUM_RESPONSE = 23, 5, 4
T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
ENCODER_DECODER: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", T5 | {"decoder_start_token_id": 0}),
    "t5-untied": ("t5", T5 | {"decoder_start_token_id": 0, "tie_word_embeddings": False}),
    "bart": ("bart", BART | {"decoder_start_token_id": 2}),
}
EVERY = sorted(SIZES) + sorted(ENCODER_DECODER)
CUSTOM: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0},
    "recurrent_gemma": {"logits_soft_cap": 5.0, "block_types": ["attention"], "attention_window_size": 8},
}
SUPPRESSED = Suppressed((1, 7), 2)


def make_model(name: str) -> PreTrainedModel:
    """A random model with weights far from small, so that soft caps and scales show."""
    special = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    if name in ENCODER_DECODER:
        kind, sizes = ENCODER_DECODER[name]
        config = AutoConfig.for_model(kind, **special, **sizes)
        model = cast(PreTrainedModel, AutoModelForSeq2SeqLM.from_config(config))
    else:
        sizes = SIZES[name] if name in SIZES else SIZES["llama"] | CUSTOM[name]
        config = AutoConfig.for_model(name, **special, **sizes)
        model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        if name == "bart":
            cast(Any, model).final_logits_bias.normal_()
    model.eval()
    return model


def ragged(fill: int = 0) -> dict[str, Any]:
    """Three rows: prompts of 5, 3 and 1 tokens, responses of 4, 1 and 3; `fill` stands at the padding."""
    generator = torch.Generator().manual_seed(1)
    # Not 1 or 7: the responses are ones that SUPPRESSED allows.
    ids = torch.randint(8, VOCABULARY, (3, NUM_PROMPT + NUM_RESPONSE), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :2], mask[2, :4], mask[1, 6:], mask[2, 8:] = False, False, False, False
    return {"input_ids": torch.where(mask, ids, fill), "attention_mask": mask, "num_prompt": NUM_PROMPT}


def response_mask() -> Tensor:
    mask: Tensor = ragged()["attention_mask"][:, NUM_PROMPT:]
    return mask


def gradients(model: nn.Module, logprobs: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss that weighs every response token's log-prob and entropy differently."""
    model.zero_grad()
    weights = torch.arange(1.0, 1 + logprobs.numel()).view_as(logprobs) / logprobs.numel()
    backward(torch.where(response_mask(), weights * (logprobs + 0.5 * entropy.square()), 0.0).sum())
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(model: nn.Module, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> None:
    mask = response_mask()
    for one, other in zip(first, second, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one[mask], other[mask], rtol=1e-6, atol=1e-6)
    expected, found = gradients(model, *first), gradients(model, *second)
    assert expected.keys() == found.keys()
    assert expected
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("suppressed", [None, SUPPRESSED], ids=["all", "suppressed"])
@pytest.mark.parametrize("name", EVERY + sorted(CUSTOM))
def test_in_pieces_as_at_once(name: str, suppressed: Suppressed | None) -> None:
    model = make_model(name)
    check_chunked(model)
    arguments = {**ragged(), "temperature": 0.7, "suppressed": suppressed}
    whole = response_logprobs_and_entropy(model, **arguments)
    for chunk_tokens in (1, 5, 12, 100):
        pieces = response_logprobs_and_entropy(model, **arguments, chunk_tokens=chunk_tokens)
        assert_same(model, whole, pieces)
        whole = response_logprobs_and_entropy(model, **arguments)
        assert torch.equal(response_logprobs(model, **arguments, chunk_tokens=chunk_tokens), pieces[0])
    assert torch.equal(response_logprobs(model, **arguments), whole[0])


@pytest.mark.parametrize("name", EVERY)
def test_at_once_is_the_models_own_logits_to_the_bit(name: str) -> None:
    model, batch = make_model(name), ragged()
    logits = response_logits(model, **batch)
    assert logits.shape == (3, NUM_RESPONSE, VOCABULARY)
    tokens = batch["input_ids"][:, NUM_PROMPT:]
    expected = logprobs_and_entropy(logits=logits, tokens=tokens, temperature=0.7)
    found = response_logprobs_and_entropy(model, **batch, temperature=0.7)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.equal(response_logprobs(model, **batch, temperature=0.7), expected[0])
    of_logits, of_function = gradients(model, *expected), gradients(model, *found)
    assert all(torch.equal(of_function[key], value) for key, value in of_logits.items())


@pytest.mark.parametrize("name", EVERY)
def test_hidden_states_give_the_log_probs(name: str) -> None:
    model = make_model(name)
    batch = ragged()
    hidden = response_hidden_states(model, **batch)
    assert hidden.shape == (3, NUM_RESPONSE, 32)
    tokens = batch["input_ids"][:, NUM_PROMPT:]
    for chunk_tokens in (None, 5):
        found = logprobs_from_hidden(model, hidden, tokens, temperature=0.7, chunk_tokens=chunk_tokens)
        whole = response_logprobs_and_entropy(model, **batch, temperature=0.7)
        assert_same(model, whole, found)
        hidden = response_hidden_states(model, **batch)


def alone(model: PreTrainedModel, row: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of one response in float64, from the model's plain forward without any padding."""
    batch = ragged()
    ids, mask = batch["input_ids"][row], batch["attention_mask"][row]
    prompt, response = (ids[part][mask[part]] for part in (slice(0, NUM_PROMPT), slice(NUM_PROMPT, None)))
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            start = torch.tensor([model.config.decoder_start_token_id])
            logits = model(input_ids=prompt[None], decoder_input_ids=torch.cat([start, response])[None]).logits[0, :-1]
        else:
            logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
    distribution = (logits.double() / temperature).log_softmax(-1)
    return distribution[torch.arange(len(response)), response], -(distribution.exp() * distribution).sum(-1)


@pytest.mark.parametrize("chunk_tokens", [None, 5])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("name", EVERY)
def test_padding_never_matters_row_33(name: str, temperature: float, chunk_tokens: int | None) -> None:
    """Rows 7 and 33: every response scores as it does alone, at the temperature, whatever ids stand at the padding."""
    model = make_model(name)
    for fill in (0, 1, 22):
        batch = ragged(fill)
        with torch.no_grad():
            logprobs, entropy = response_logprobs_and_entropy(
                model, **batch, temperature=temperature, suppressed=None, chunk_tokens=chunk_tokens
            )
        assert logprobs.isfinite().all()
        for row, real in enumerate(response_mask()):
            expected = alone(model, row, temperature)
            for found, value in zip((logprobs, entropy), expected, strict=True):
                torch.testing.assert_close(found[row][real].double(), value, rtol=0, atol=2e-5)


@pytest.mark.parametrize("chunk_tokens", [None, 5])
def test_suppressed_tokens_by_hand(chunk_tokens: int | None) -> None:
    """In the first two slots the softmax runs over the other tokens; afterwards, and at padding, over all of them."""
    model = make_model("gemma2")
    batch = ragged(fill=1)
    found, entropy = response_logprobs_and_entropy(
        model, **batch, temperature=0.7, suppressed=SUPPRESSED, chunk_tokens=chunk_tokens
    )
    logits = response_logits(model, **batch).detach().double() / 0.7
    allowed = [token for token in range(VOCABULARY) if token not in SUPPRESSED.token_ids]
    mask = response_mask()
    for row in range(3):
        for slot in range(NUM_RESPONSE):
            kept = allowed if slot < 2 and mask[row, slot] else list(range(VOCABULARY))
            weights = [math.exp(logits[row, slot, token].item()) for token in kept]
            chosen = int(batch["input_ids"][row, NUM_PROMPT + slot])
            assert found[row, slot].item() == pytest.approx(
                math.log(weights[kept.index(chosen)] / sum(weights)), abs=1e-4
            )
            by_hand = -sum(weight / sum(weights) * math.log(weight / sum(weights)) for weight in weights)
            assert entropy[row, slot].item() == pytest.approx(by_hand, abs=1e-4)


def test_sampling_under_suppression_is_scored_alike_row_7() -> None:
    """Row 7: the log-prob of a draw from suppressed logits is the one that scoring finds for it."""
    model = make_model("llama")
    batch = ragged()
    with torch.no_grad():
        logits = suppress_logits(response_logits(model, **batch), SUPPRESSED)
        assert torch.equal(logits[:, 1], suppress_logits(logits[:, 1:2], SUPPRESSED, first_slot=1)[:, 0])
        drawn = []
        for row in range(3):
            uniforms = torch.linspace(0, 0.999, NUM_RESPONSE, dtype=torch.float64)
            drawn.append(draw_tokens(logits[row], uniforms, 0.7))
    tokens = torch.stack([token for token, _ in drawn])
    hidden = response_hidden_states(model, **batch)
    found, _ = logprobs_from_hidden(model, hidden, tokens, temperature=0.7, suppressed=SUPPRESSED)
    torch.testing.assert_close(found, torch.stack([logprob for _, logprob in drawn]), rtol=0, atol=1e-5)
    assert not torch.isin(tokens[:, :2], torch.tensor(SUPPRESSED.token_ids)).any()


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "t5"])
def test_in_pieces_under_autocast_and_gradient_checkpointing(name: str) -> None:
    """bf16 rounds the same numbers alike; recomputing the layers in the backward pass changes nothing."""
    model = make_model(name)
    arguments = {**ragged(), "temperature": 0.7}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = response_logprobs_and_entropy(model, **arguments)
        pieces = response_logprobs_and_entropy(model, **arguments, chunk_tokens=5)
        check_chunked(model)
    assert pieces[0].dtype == torch.float32
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-2)
    plain = response_logprobs_and_entropy(model, **arguments, chunk_tokens=5)
    expected = gradients(model, *plain)
    model.train()
    model.gradient_checkpointing_enable()
    disable_dropout(model)
    found = gradients(model, *response_logprobs_and_entropy(model, **arguments, chunk_tokens=5))
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-5)


def test_logits_never_exist_for_more_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product of the head, forward and recomputed backward, has at most `chunk_tokens` rows."""
    model = make_model("llama")
    rows: list[int] = []
    plain = nn.functional.linear

    def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[0] == VOCABULARY:
            rows.append(inputs.shape[:-1].numel())
        return plain(inputs, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", linear)
    found = response_logprobs_and_entropy(model, **ragged(), temperature=1.0, chunk_tokens=5)
    assert rows == [5, 5, 2]
    backward(found[0].sum())
    assert sorted(rows[3:]) == [2, 5, 5]
    rows.clear()
    response_hidden_states(model, **ragged())
    assert rows == []
    assert "forward" not in vars(output_head(model))


def test_adapters_on_the_head_are_trained_in_pieces() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        make_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    )
    check_chunked(model)
    arguments = {**ragged(), "temperature": 0.7, "suppressed": SUPPRESSED}
    whole = response_logprobs_and_entropy(model, **arguments)
    assert_same(model, whole, response_logprobs_and_entropy(model, **arguments, chunk_tokens=5))
    names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("lm_head" in name for name in names)
    assert all("lora" in name for name in names)
    # ZeRO-3 marks the weights it shards. Each piece would gather those within the head.
    for parameter in output_head(model).parameters():
        parameter.ds_id = 0  # type: ignore[attr-defined]
    response_logprobs(model, **arguments)
    with pytest.raises(ConfigError, match=r"under zero\.stage=3 needs an output head without adapters"):
        response_logprobs(model, **arguments, chunk_tokens=5)


class _Engine(nn.Module):
    """Wraps a model as engines do: under `module`, with another `config`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.config = {"train_batch_size": 1}

    def forward(self, **arguments: Any) -> Any:
        return self.module(**arguments)


def test_an_engine_around_the_model() -> None:
    model = make_model("t5")
    arguments = {**ragged(), "temperature": 0.7, "chunk_tokens": 5}
    found = response_logprobs_and_entropy(_Engine(model), **arguments)
    expected = response_logprobs_and_entropy(model, **arguments)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_model_that_changes_its_logits_unseen_is_refused() -> None:
    """The change shows although the weights are so small that the logits of the model hardly differ from the head's."""
    model = make_model("gemma2")
    with torch.no_grad():
        output_head(model).weight.mul_(1e-6)  # type: ignore[operator]
    plain = type(model).forward

    class Strange(type(model)):  # type: ignore[misc]
        def forward(self, **arguments: Any) -> Any:
            output = plain(self, **arguments)
            output.logits = torch.where(output.logits > 20, output.logits + 1, output.logits)
            return output

    check_chunked(model)
    model.__class__ = Strange
    with pytest.raises(
        ConfigError, match=r"Strange changes what its output head gives.*ppo\.logprob_chunk_tokens=null"
    ):
        check_chunked(model)


def test_a_model_without_a_known_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    with pytest.raises(ConfigError, match=r"ppo\.logprob_chunk_tokens needs the output head"):
        response_logprobs(model, **ragged(), temperature=1.0, chunk_tokens=5)
    response_logprobs(model, **ragged(), temperature=1.0)


def test_a_decoder_without_a_start_token_is_refused() -> None:
    model = make_model("t5")
    model.config.decoder_start_token_id = None
    cast(Any, model.generation_config).decoder_start_token_id = None
    with pytest.raises(ConfigError, match=r"decoder_start_token_id. Add it"):
        response_logprobs(model, **ragged(), temperature=1.0)


def test_refusals() -> None:
    model, batch = make_model("llama"), ragged()
    with pytest.raises(ValueError, match="chunk_tokens must be positive"):
        response_logprobs(model, **batch, temperature=1.0, chunk_tokens=0)
    with pytest.raises(ValueError, match=r"hidden \(B, R, H\) and tokens"):
        logprobs_from_hidden(
            model, response_hidden_states(model, **batch), batch["input_ids"], temperature=1.0, chunk_tokens=5
        )
    with pytest.raises(ValueError, match="attention_mask must be bool"):
        response_logits(model, **{**batch, "attention_mask": batch["attention_mask"].long()})
    with pytest.raises(ValueError, match="num_prompt"):
        response_logits(model, **{**batch, "num_prompt": 9})
