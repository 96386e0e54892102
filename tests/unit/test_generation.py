"""Generation: the recorded log-probs are the policy's own, and a row's tokens depend on that row alone."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf.config.model import ScratchConfig
from rlhf.errors import ConfigError
from rlhf.models import generate, response_logprobs, response_logprobs_and_entropy, row_uniforms
from rlhf.models.generation import Generation
from rlhf.models.sampling import draw_tokens
from rlhf.models.scratch import build_from_scratch

ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "qwen3", "gemma2", "mistral")
TEXTS = ["the film was good", "a film that was not good at all"] * 10


@cache
def model_of(architecture: str) -> PreTrainedModel:
    """A tiny model whose logits are far from uniform."""
    config = ScratchConfig.model_validate(
        {"architecture": architecture, "hidden_size": 32, "vocab_size": 270, "max_positions": 48}
    )
    model, _ = build_from_scratch(config, TEXTS, seed=5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def prompts_of(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Random left-padded prompts. Padding holds a token that occurs in texts: only the mask tells."""
    generator = torch.Generator().manual_seed(1)
    width = max(lengths)
    ids = torch.randint(3, 260, (len(lengths), width), generator=generator)
    mask = torch.arange(width) >= width - torch.tensor(lengths).unsqueeze(-1)
    return torch.where(mask, ids, 7), mask


def sample(model: PreTrainedModel, ids: Tensor, mask: Tensor, keys: list[int], **changes: Any) -> Generation:
    arguments: dict[str, Any] = {"temperature": 1.0, "max_response_tokens": 12, "stop_ids": range(0, 270, 9)}
    arguments |= changes
    uniforms = row_uniforms(1, "test", 0, keys, 0, arguments["max_response_tokens"])
    return generate(model, ids, mask, uniforms=uniforms, **arguments)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_rescoring_reproduces_the_sampled_logprobs(architecture: str, temperature: float) -> None:
    model = model_of(architecture)
    ids, mask = prompts_of([3, 9, 1, 5, 9, 2, 4, 6, 8, 7])
    result = sample(model, ids, mask, list(range(10)), temperature=temperature)
    lengths = result.response_mask.sum(-1)
    assert len(set(lengths.tolist())) > 2, "rows must stop at different lengths for this test to say something"
    assert lengths.max() == result.response_ids.shape[1]

    full_ids = torch.cat([ids, result.response_ids], dim=-1)
    full_mask = torch.cat([mask, result.response_mask], dim=-1)
    arguments: dict[str, Any] = {"input_ids": full_ids, "attention_mask": full_mask, "num_prompt": ids.shape[1]}
    with torch.no_grad():
        rescored = response_logprobs(model, temperature=temperature, **arguments)
        again, entropy = response_logprobs_and_entropy(model, temperature=temperature, **arguments)
        # An independent oracle: each row alone, without padding, through the whole head.
        for row, length in enumerate(lengths.tolist()):
            tokens = torch.cat([ids[row][mask[row]], result.response_ids[row, :length]])
            logits = model(input_ids=tokens[None]).logits[0].double() / temperature
            all_logprobs = logits[-length - 1 : -1].log_softmax(-1)
            expected = all_logprobs[torch.arange(length), tokens[-length:]].float()
            torch.testing.assert_close(result.logprobs[row, :length], expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(rescored[row, :length], expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(again[row, :length], expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(
                entropy[row, :length], (-all_logprobs.exp() * all_logprobs).sum(-1).float(), atol=1e-4, rtol=0
            )
    assert bool((result.logprobs[~result.response_mask] == 0).all())


@pytest.mark.parametrize("architecture", ["gemma2", "mistral"])
def test_a_window_shorter_than_the_sequence(architecture: str) -> None:
    wide = model_of(architecture)
    config = copy.deepcopy(wide.config)
    config.sliding_window = 6
    narrow = cast(PreTrainedModel, cast(Any, AutoModelForCausalLM).from_config(config))
    narrow.load_state_dict(wide.state_dict())
    ids, mask = prompts_of([3, 9, 1, 5, 9, 2])
    result = sample(narrow, ids, mask, list(range(6)))
    assert len(set(result.response_mask.sum(-1).tolist())) > 2, "rows must leave the batch while others go on"
    arguments: dict[str, Any] = {
        "input_ids": torch.cat([ids, result.response_ids], dim=-1),
        "attention_mask": torch.cat([mask, result.response_mask], dim=-1),
        "num_prompt": 9,
        "temperature": 1.0,
    }
    with torch.no_grad():
        rescored = response_logprobs(narrow, **arguments)
        without_window = response_logprobs(wide, **arguments)
    assert (rescored - result.logprobs)[result.response_mask].abs().max() < 1e-4
    assert (without_window - result.logprobs)[result.response_mask].abs().max() > 1e-2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_left_padding_never_matters(architecture: str) -> None:
    model = model_of(architecture)
    ids, mask = prompts_of([3, 9, 1, 6])
    with torch.no_grad():
        padded = model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.long().cumsum(-1) - 1).clamp(min=0)
        ).logits
        for row in range(len(ids)):
            alone = model(input_ids=ids[row][mask[row]][None]).logits[0]
            torch.testing.assert_close(padded[row][mask[row]], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_tokens_depend_on_their_row_alone(architecture: str) -> None:
    model = model_of(architecture)
    ids, mask = prompts_of([3, 9, 1, 5, 9, 2, 4, 6])
    keys = list(range(100, 108))
    together = sample(model, ids, mask, keys)
    order = [5, 2, 7, 0, 1, 3, 6, 4]
    shuffled = sample(model, ids[order], mask[order], [keys[row] for row in order])
    assert torch.equal(shuffled.response_ids, together.response_ids[order])
    assert torch.equal(shuffled.response_mask, together.response_mask[order])
    for row in range(len(ids)):
        alone = sample(
            model, ids[row][mask[row]][None], torch.ones(1, int(mask[row].sum()), dtype=torch.bool), [keys[row]]
        )
        length = int(together.response_mask[row].sum())
        assert alone.response_ids[0].tolist() == together.response_ids[row, :length].tolist()
        assert bool(alone.stopped[0]) == bool(together.stopped[row])


def test_stopped_rows_end_with_a_stop_token_and_others_are_cut() -> None:
    ids, mask = prompts_of([4] * 40)
    stop_ids = list(range(0, 270, 9))
    result = sample(model_of("llama"), ids, mask, list(range(40)), max_response_tokens=6, pad_id=11)
    assert 0 < int(result.stopped.sum()) < 40
    for row in range(40):
        tokens = result.response_ids[row][result.response_mask[row]].tolist()
        stops = [token in stop_ids for token in tokens]
        assert any(stops) == bool(result.stopped[row])
        assert not any(stops[:-1])
        assert bool(result.stopped[row]) or len(tokens) == 6
        assert set(result.response_ids[row][~result.response_mask[row]].tolist()) <= {11}


def test_every_token_a_stop_token_gives_responses_of_one_token() -> None:
    ids, mask = prompts_of([4, 2])
    result = sample(model_of("llama"), ids, mask, [1, 2], stop_ids=range(270))
    assert result.response_ids.shape == (2, 1)
    assert bool(result.response_mask.all())
    assert bool(result.stopped.all())


def test_without_stop_tokens_responses_have_full_length() -> None:
    ids, mask = prompts_of([4, 2])
    result = sample(model_of("llama"), ids, mask, [1, 2], stop_ids=[])
    assert result.response_ids.shape == (2, 12)
    assert bool(result.response_mask.all())
    assert not bool(result.stopped.any())


def test_forced_stops_at_different_steps() -> None:
    """The number decides the token, so numbers chosen from the distribution force any sequence."""
    model = model_of("llama")
    ids, mask = prompts_of([3, 5, 2])
    stop_at = [2, 5, 0]
    uniforms = torch.zeros(3, 8, dtype=torch.float64)
    prefix = [ids[row][mask[row]] for row in range(3)]
    with torch.no_grad():
        for row in range(3):
            for step in range(8):
                weights = model(input_ids=prefix[row][None]).logits[0, -1].double().softmax(-1)
                token = 2 if step == stop_at[row] else 20 + step
                uniforms[row, step] = weights[:token].sum() + weights[token] / 2
                prefix[row] = torch.cat([prefix[row], torch.tensor([token])])
    result = generate(model, ids, mask, uniforms=uniforms, temperature=1.0, max_response_tokens=8, stop_ids=[2])
    assert result.response_mask.sum(-1).tolist() == [3, 6, 1]
    assert result.response_ids[1].tolist() == [20, 21, 22, 23, 24, 2]
    assert bool(result.stopped.all())


def test_frequencies_follow_the_distribution() -> None:
    logits = torch.tensor([1.0, -1.0, 0.3, 2.0, -float("inf"), 0.0, 0.5])
    num = 40_000
    uniforms = row_uniforms(3, "frequency", 0, [1], 0, num)[0]
    for temperature in (0.7, 1.0):
        tokens, logprobs = draw_tokens(logits.expand(num, -1), uniforms, temperature)
        expected = (logits.double() / temperature).softmax(-1)
        counts = torch.bincount(tokens, minlength=7).double()
        assert counts[4] == 0
        kept = expected > 0
        chi_square = ((counts - num * expected)[kept] ** 2 / (num * expected)[kept]).sum()
        assert chi_square < 20.5, "the 0.999 quantile of chi-square with 5 degrees of freedom"
        torch.testing.assert_close(logprobs, expected.log().float()[tokens], atol=1e-5, rtol=0)


def test_numbers_at_the_ends_draw_possible_tokens() -> None:
    logits = torch.tensor([[-float("inf"), 0.0, 1.0, -float("inf")]] * 2)
    tokens, _ = draw_tokens(logits, torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64), 1.0)
    assert tokens.tolist() == [1, 2]


def test_row_uniforms_follow_their_key_alone() -> None:
    base = row_uniforms(1, "rollout", 2, [10, 20], 0, 5)
    assert base.dtype == torch.float64
    assert bool(((base >= 0) & (base < 1)).all())
    assert torch.equal(row_uniforms(1, "rollout", 2, [20], 0, 5)[0], base[1])
    assert torch.equal(row_uniforms(1, "rollout", 2, [10], [0], 3)[0], base[0, :3]), "a longer stream begins alike"
    for other in (
        row_uniforms(2, "rollout", 2, [10], 0, 5),
        row_uniforms(1, "evaluate", 2, [10], 0, 5),
        row_uniforms(1, "rollout", 3, [10], 0, 5),
        row_uniforms(1, "rollout", 2, [10], 1, 5),
    ):
        assert not torch.equal(other[0], base[0])
    with pytest.raises(ValueError, match="2 prompt keys came with 1"):
        row_uniforms(1, "rollout", 2, [10, 20], [0], 5)


def test_the_model_is_left_as_it_was() -> None:
    model = model_of("llama")
    model.train()
    attention = model.config._attn_implementation
    state = torch.random.get_rng_state()
    ids, mask = prompts_of([4, 2])
    result = sample(model, ids, mask, [1, 2])
    assert model.training
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == attention
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not result.logprobs.is_inference()
    model.eval()


def test_wrong_arguments_are_refused() -> None:
    model = model_of("llama")
    ids, mask = prompts_of([4, 2])
    with pytest.raises(ValueError, match="bool"):
        sample(model, ids, mask.long(), [1, 2])
    with pytest.raises(ValueError, match="left-padded"):
        sample(model, ids.flip(-1), mask.flip(-1), [1, 2])
    with pytest.raises(ValueError, match="temperature"):
        sample(model, ids, mask, [1, 2], temperature=0.0)
    with pytest.raises(ConfigError, match="48 positions"):
        sample(model, ids, mask, [1, 2], max_response_tokens=45)
    with pytest.raises(ValueError, match="attention_mask must be bool"):
        response_logprobs(model, input_ids=ids, attention_mask=mask.long(), num_prompt=1, temperature=1.0)
    with pytest.raises(ValueError, match="num_prompt"):
        response_logprobs(model, input_ids=ids, attention_mask=mask, num_prompt=4, temperature=1.0)
