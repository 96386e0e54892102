"""T5: the prompt in the encoder, the response in the decoder, with the guarantees that causal models have."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlhf.config.model import ScratchConfig
from rlhf.errors import ArtifactError
from rlhf.models import (
    ScalarModel,
    Suppressed,
    build_from_scratch,
    check_positions,
    ensure_distinct_pad,
    generate,
    response_logprobs,
    response_scores,
    row_uniforms,
    save_model,
)
from rlhf.models.generation import Generation
from rlhf.models.scalar import pad_pairs
from tests.scalar_checks import check_head_follows_from_its_seed

TEXTS = ["the film was good", "a film that was not good at all", "what a film this was"] * 10
STOP_IDS = list(range(0, 270, 9))


def scratch() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    config = ScratchConfig(architecture="t5", hidden_size=32, num_heads=4, vocab_size=270)
    return build_from_scratch(config, TEXTS, seed=4)


@cache
def policy() -> PreTrainedModel:
    """A tiny T5 whose logits are far from uniform. Not to be changed."""
    model, _ = scratch()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@cache
def scalar() -> ScalarModel:
    """A tiny reward model. Not to be changed."""
    return ScalarModel.from_policy(policy(), seed=7)


def prompts_of(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Random left-padded prompts. Padding holds a token that occurs in texts: only the mask tells."""
    generator = torch.Generator().manual_seed(1)
    width = max(lengths)
    ids = torch.randint(3, 260, (len(lengths), width), generator=generator)
    mask = torch.arange(width) >= width - torch.tensor(lengths).unsqueeze(-1)
    return torch.where(mask, ids, 7), mask


def sample(ids: Tensor, mask: Tensor, keys: list[int], **changes: Any) -> Generation:
    arguments: dict[str, Any] = {"temperature": 1.0, "max_response_tokens": 12, "stop_ids": STOP_IDS} | changes
    uniforms = row_uniforms(1, "test", 0, keys, 0, arguments["max_response_tokens"])
    return generate(policy(), ids, mask, uniforms=uniforms, **arguments)


def alone(model: PreTrainedModel, prompt: Tensor, response: Tensor) -> Tensor:
    """Logits (R, V) float64 of one unpadded row, all at once: the start token, then all but the last token."""
    shifted = torch.cat([torch.tensor([model.config.decoder_start_token_id]), response[:-1]])
    with torch.no_grad():
        output = model(input_ids=prompt[None], decoder_input_ids=shifted[None])
    logits: Tensor = output.logits[0].double()
    return logits


# --- generation and scoring -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_row_7_rescoring_reproduces_the_sampled_logprobs(temperature: float) -> None:
    ids, mask = prompts_of([3, 9, 1, 5, 9, 2, 4, 6, 8, 7])
    result = sample(ids, mask, list(range(10)), temperature=temperature)
    lengths = result.response_mask.sum(-1).tolist()
    assert len(set(lengths)) > 2, "rows must stop at different lengths for this test to say something"
    with torch.no_grad():
        rescored = response_logprobs(
            policy(),
            input_ids=torch.cat([ids, result.response_ids], dim=-1),
            attention_mask=torch.cat([mask, result.response_mask], dim=-1),
            num_prompt=ids.shape[1],
            temperature=temperature,
        )
    for row, length in enumerate(lengths):
        response = result.response_ids[row, :length]
        logprobs = (alone(policy(), ids[row][mask[row]], response) / temperature).log_softmax(-1)
        expected = logprobs[torch.arange(length), response].float()
        torch.testing.assert_close(result.logprobs[row, :length], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(rescored[row, :length], expected, atol=1e-5, rtol=0)
    assert bool((result.logprobs[~result.response_mask] == 0).all())


def test_tokens_depend_on_their_row_alone() -> None:
    ids, mask = prompts_of([3, 9, 1, 5, 9, 2, 4, 6])
    keys = list(range(100, 108))
    together = sample(ids, mask, keys)
    assert len(set(together.response_mask.sum(-1).tolist())) > 2, "rows must leave the batch while others go on"
    order = [5, 2, 7, 0, 1, 3, 6, 4]
    shuffled = sample(ids[order], mask[order], [keys[row] for row in order])
    assert torch.equal(shuffled.response_ids, together.response_ids[order])
    for row in range(len(ids)):
        prompt = ids[row][mask[row]][None]
        single = sample(prompt, torch.ones_like(prompt, dtype=torch.bool), [keys[row]])
        length = int(together.response_mask[row].sum())
        assert single.response_ids[0].tolist() == together.response_ids[row, :length].tolist()
        assert bool(single.stopped[0]) == bool(together.stopped[row])


@pytest.mark.parametrize("num_tokens", [3, 50])
def test_suppressed_stop_tokens_are_neither_drawn_nor_counted(num_tokens: int) -> None:
    ids, mask = prompts_of([4] * 30)
    suppressed = Suppressed(tuple(STOP_IDS), num_tokens)
    result = sample(ids, mask, list(range(30)), max_response_tokens=6, suppressed=suppressed)
    lengths = result.response_mask.sum(-1)
    assert int(lengths.min()) >= min(num_tokens, 5) + (num_tokens < 6)
    assert (int(lengths.min()) < 6) == (num_tokens < 6), "beyond the barred slots stop tokens end responses again"
    barred = torch.zeros(270, dtype=torch.bool)
    barred[STOP_IDS] = True
    for row, length in enumerate(lengths.tolist()):
        response = result.response_ids[row, :length]
        logits = alone(policy(), ids[row], response)
        for slot in range(length):
            kept = logits[slot].masked_fill(barred, -torch.inf) if slot < num_tokens else logits[slot]
            expected = kept[response[slot]] - kept.logsumexp(-1)
            assert float(result.logprobs[row, slot]) == pytest.approx(float(expected), abs=1e-5)


def test_row_33_left_padding_shifts_no_logit_and_there_is_no_limit_of_positions() -> None:
    ids, mask = prompts_of([3, 9, 1, 6])
    decoder_ids = torch.tensor([[0, 30, 40, 50]] * 4)
    model: Any = policy()
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits
        for row in range(4):
            unpadded = model(input_ids=ids[row][mask[row]][None], decoder_input_ids=decoder_ids[:1]).logits[0]
            torch.testing.assert_close(padded[row], unpadded, atol=1e-5, rtol=0)
    check_positions(policy(), 100_000)


def test_the_decoder_starts_from_the_configured_token() -> None:
    ids, mask = prompts_of([4, 2])
    expected = sample(ids, mask, [1, 2])
    other = copy.deepcopy(policy())
    other.config.decoder_start_token_id = 77
    uniforms = row_uniforms(1, "test", 0, [1, 2], 0, 12)
    changed = generate(other, ids, mask, uniforms=uniforms, temperature=1.0, max_response_tokens=12, stop_ids=STOP_IDS)
    assert policy().config.decoder_start_token_id == policy().config.pad_token_id
    assert not torch.equal(changed.logprobs[:, 0], expected.logprobs[:, 0])
    for row in range(2):
        logits = alone(other, ids[row][mask[row]], changed.response_ids[row, :1])
        expected_logprob = logits.log_softmax(-1)[0, changed.response_ids[row, 0]]
        assert float(changed.logprobs[row, 0]) == pytest.approx(float(expected_logprob), abs=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    model = policy()
    model.train()
    attention = model.config._attn_implementation
    state = torch.random.get_rng_state()
    sample(*prompts_of([4, 2]), [1, 2])
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == attention
    assert torch.equal(torch.random.get_rng_state(), state)
    model.eval()


# --- scalar models ----------------------------------------------------------------------------------------------------


def test_values_are_those_of_plain_prefixes() -> None:
    """Entry t belongs to the prompt and t response tokens, worked out one prefix at a time without padding."""
    ids, mask = prompts_of([3, 5, 1])
    responses = torch.tensor([[30, 40, 50, 60], [31, 41, 9, 9], [32, 9, 9, 9]])
    lengths = [4, 2, 1]
    response_mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    full, full_mask = torch.cat([ids, responses], 1), torch.cat([mask, response_mask], 1)
    with torch.no_grad():
        values = scalar().response_values(full, full_mask, 5)
        scores = response_scores(scalar(), full, full_mask, 5)
        assert values.shape == (3, 5)
        assert values.dtype == torch.float32
        model: Any = scalar().model
        for row, length in enumerate(lengths):
            prompt = ids[row][mask[row]][None]
            for end in range(length + 1):
                text = torch.cat([torch.tensor([0]), responses[row, :end]])[None]
                states = model.transformer(input_ids=prompt, decoder_input_ids=text).last_hidden_state[0, -1]
                head = model.classification_head
                expected = head.out_proj.weight[0] @ torch.tanh(head.dense.weight @ states + head.dense.bias)
                assert float(values[row, end]) == pytest.approx(float(expected), abs=1e-5)
            assert float(scores[row]) == float(values[row, length])
    assert len({round(float(value), 4) for value in values[0]}) == 5


def test_causal_response_values_are_the_tail_of_the_values() -> None:
    config = ScratchConfig(hidden_size=32, vocab_size=270, max_positions=48)
    model = ScalarModel.from_policy(build_from_scratch(config, TEXTS, seed=4)[0], seed=7)
    ids, mask = prompts_of([3, 5])
    full, full_mask = torch.cat([ids, ids], 1), torch.cat([mask, mask.flip(-1)], 1)
    with torch.no_grad():
        values = model.response_values(full, full_mask, 5)
        assert values.shape == (2, 6)
        assert torch.equal(values, model(full, full_mask)[:, 4:])
        assert torch.equal(response_scores(model, full, full_mask, 5), values[[0, 1], mask.sum(-1)])
        # Entry t is the value behind t response tokens, so without a response there is one entry.
        torch.testing.assert_close(model.response_values(ids, mask, 5), values[:, :1], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="num_prompt"):
        model.response_values(full, full_mask, 0)


def test_padding_never_matters_to_scores() -> None:
    pairs = [([5, 6, 7], [30, 31]), ([8], [32, 33, 34, 35]), ([9, 10], [36])]
    with torch.no_grad():
        single = torch.cat([response_scores(scalar(), *pad_pairs(scalar(), [pair], 0)) for pair in pairs])
        for filler in (0, 1, 199):
            together = response_scores(scalar(), *pad_pairs(scalar(), pairs, filler))
            torch.testing.assert_close(together, single, atol=1e-5, rtol=0)


def test_the_head_follows_from_its_seed_alone(tmp_path: Path) -> None:
    model, tokenizer = scratch()
    check_head_follows_from_its_seed(model, tokenizer, tmp_path / "policy")
    zero = ScalarModel.from_policy(model, seed=7, zero_head=True)
    ids, mask = prompts_of([3, 5])
    values = zero.response_values(torch.cat([ids, ids], 1), torch.cat([mask, mask.flip(-1)], 1), 5)
    assert bool((values == 0).all())
    torch.autograd.backward((values - 1).square().sum())
    assert zero.head.weight.grad is not None
    assert bool(zero.head.weight.grad.abs().sum() > 0), "a head of zeros must be able to leave zero"


def test_every_parameter_of_a_critic_learns() -> None:
    model = ScalarModel.from_policy(policy(), seed=3)
    ids, mask = prompts_of([6, 6])
    values = model.response_values(torch.cat([ids, ids], 1), torch.cat([mask, mask], 1), 6)
    torch.autograd.backward(values.square().sum())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().sum() > 0), name


def test_saved_reward_models_load_with_plain_transformers(tmp_path: Path) -> None:
    model = ScalarModel.from_policy(policy(), seed=7)
    tokenizer = ensure_distinct_pad(scratch()[1], model.model)
    model.save(tmp_path / "reward", tokenizer)
    plain: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert type(plain).__name__ == "T5ForSequenceClassification"
    assert plain.config.num_labels == 1
    assert plain.config.decoder_start_token_id == tokenizer.pad_token_id
    again = ScalarModel.load(tmp_path / "reward")
    batch = pad_pairs(model, [([5, 6, 7], [30, 31]), ([8], [32, 33, 34, 35])], 0)
    with torch.no_grad():
        expected = response_scores(model, *batch)
        assert torch.equal(response_scores(again, *batch), expected)
        torch.testing.assert_close(response_scores(ScalarModel(plain.eval()), *batch), expected, atol=1e-6, rtol=0)
    save_model(policy(), tokenizer, tmp_path / "policy")
    with pytest.raises(ArtifactError, match="T5ForConditionalGeneration, not a reward model"):
        ScalarModel.load(tmp_path / "policy")


def test_calls_without_the_prompts_width_are_refused() -> None:
    ids, mask = prompts_of([3, 5])
    with pytest.raises(ValueError, match="response_values"):
        scalar()(ids, mask)
    with pytest.raises(ValueError, match="num_prompt must be given"):
        response_scores(scalar(), ids, mask, None)
    with pytest.raises(ValueError, match="attention_mask must be bool"):
        scalar().response_values(ids, mask.long(), 2)
    with pytest.raises(ArtifactError, match="no linear head"):
        ScalarModel(policy())
