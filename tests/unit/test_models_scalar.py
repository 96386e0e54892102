"""Reward models and critics: the score is read at the last real token, whatever the padding, and survives saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from rlhf.config.model import ScratchConfig
from rlhf.errors import ArtifactError
from rlhf.models import ScalarModel, build_from_scratch, ensure_distinct_pad, save_model, sequence_scores
from tests.scalar_checks import check_head_follows_from_its_seed

TEXTS = ["the film was good", "a film that was not good at all", "what a film this was"] * 10
ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "qwen3", "gemma2", "mistral")


def scratch(architecture: str = "llama") -> tuple[PreTrainedModel, Any]:
    config = ScratchConfig.model_validate(
        {"architecture": architecture, "hidden_size": 32, "vocab_size": 270, "max_positions": 48}
    )
    return build_from_scratch(config, TEXTS, seed=4)


def scalar(architecture: str = "llama") -> ScalarModel:
    return ScalarModel.from_policy(scratch(architecture)[0], seed=7)


def scores(model: ScalarModel, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return sequence_scores(model(ids, mask), mask)


def rows_of(lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 260, (length,), generator=generator) for length in lengths]


def placed(rows: list[Tensor], slots: list[list[int]], width: int, filler: int) -> tuple[Tensor, Tensor]:
    """A batch in which row i occupies `slots[i]` and `filler` everything else."""
    ids = torch.full((len(rows), width), filler)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, (row, slot) in enumerate(zip(rows, slots, strict=True)):
        ids[index, slot] = row
        mask[index, slot] = True
    return ids, mask


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_score_depends_on_the_real_tokens_alone(architecture: str) -> None:
    model = scalar(architecture)
    rows = rows_of([3, 7, 5])
    alone = torch.cat([scores(model, row[None], torch.ones(1, len(row), dtype=torch.bool)) for row in rows])
    assert alone.dtype == torch.float32
    assert len(set(alone.tolist())) == 3
    for filler in (0, 2, 199):  # pad, EOS, an ordinary token: the mask alone tells
        for width in (7, 12):
            right = [list(range(len(row))) for row in rows]
            left = [list(range(width - len(row), width)) for row in rows]
            torch.testing.assert_close(scores(model, *placed(rows, right, width, filler)), alone, atol=2e-5, rtol=0)
            torch.testing.assert_close(scores(model, *placed(rows, left, width, filler)), alone, atol=2e-5, rtol=0)
        middle = [[0, 1, 9], [0, 1, 2, 6, 7, 8, 11], [2, 3, 5, 8, 9]]
        torch.testing.assert_close(scores(model, *placed(rows, middle, 12, filler)), alone, atol=2e-5, rtol=0)


def test_the_score_is_read_at_the_last_attended_token() -> None:
    values = torch.arange(8.0).reshape(2, 4)
    mask = torch.tensor([[True, True, False, False], [False, True, True, True]])
    assert sequence_scores(values, mask).tolist() == [1.0, 7.0]
    assert sequence_scores(values, torch.tensor([[True, False, True, False]] * 2)).tolist() == [2.0, 6.0]
    values[0, 2:] = float("nan")
    assert sequence_scores(values, mask).tolist() == [1.0, 7.0]


def test_a_later_token_changes_no_earlier_value() -> None:
    model = scalar()
    ids = rows_of([6])[0][None].repeat(2, 1)
    ids[1, 5] = 100
    with torch.no_grad():
        values = model(ids, torch.ones(2, 6, dtype=torch.bool))
    assert torch.equal(values[0, :5], values[1, :5])
    assert values[0, 5] != values[1, 5]


def test_wrong_masks_are_refused() -> None:
    values = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="bool"):
        sequence_scores(values, torch.ones(2, 3))
    with pytest.raises(ValueError, match="shape"):
        sequence_scores(values, torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="no real token"):
        sequence_scores(values, torch.tensor([[True, False, False], [False, False, False]]))
    with pytest.raises(ValueError, match="attention_mask must be bool"):
        scalar()(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.long))


def test_the_head_follows_from_its_seed_alone(tmp_path: Path) -> None:
    model, tokenizer = scratch()
    check_head_follows_from_its_seed(model, tokenizer, tmp_path / "policy")
    assert bool((ScalarModel.from_policy(model, seed=7, zero_head=True).head.weight == 0).all())


def test_the_head_has_the_published_scale() -> None:
    model = scalar()
    model.model.score = nn.Linear(4095, 1, bias=False)
    model.reset_head(seed=0, zero=False)
    assert float(model.head.weight.detach().std()) == pytest.approx(1 / 64, rel=0.05)


def test_the_backbone_is_a_copy_of_the_policys() -> None:
    policy, _ = scratch()
    model = ScalarModel.from_policy(policy, seed=7)
    backbone = dict(model.backbone.named_parameters())
    for name, parameter in cast(nn.Module, policy.model).named_parameters():
        assert torch.equal(backbone[name], parameter), name
        assert backbone[name].data_ptr() != parameter.data_ptr()
    assert policy.config.num_labels != 1, "the policy's config is left alone"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saving_keeps_scores_and_head(architecture: str, tmp_path: Path) -> None:
    policy, tokenizer = scratch(architecture)
    model = ScalarModel.from_policy(policy, seed=7)
    tokenizer = ensure_distinct_pad(tokenizer, model.model)
    keys = set(model.state_dict())
    assert all(key.startswith("model.") for key in keys)
    assert "model.score.weight" in keys
    model.save(tmp_path / "reward", tokenizer)
    again = ScalarModel.load(tmp_path / "reward")
    assert set(again.state_dict()) == keys
    assert torch.equal(again.head.weight, model.head.weight)
    rows = rows_of([3, 7, 5])
    ids, mask = placed(rows, [list(range(len(row))) for row in rows], 8, tokenizer.pad_token_id)
    expected = scores(model, ids, mask)
    assert torch.equal(scores(again, ids, mask), expected)
    plain = cast(Any, AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward"))
    for parameter in plain.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids, attention_mask=mask).logits[:, 0], expected)


def test_low_precision_models_give_float32_values() -> None:
    policy, _ = scratch()
    model = ScalarModel.from_policy(policy, seed=7, dtype=torch.bfloat16)
    assert model.head.weight.dtype == torch.bfloat16
    ids, mask = torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool)
    assert model(ids, mask).dtype == torch.float32
    model.model.score.float()
    assert model(ids, mask).dtype == torch.float32


def test_every_parameter_learns() -> None:
    model = scalar("gpt2")
    ids, mask = rows_of([6])[0][None], torch.ones(1, 6, dtype=torch.bool)
    model(ids, mask).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().sum() > 0), name


def test_folders_that_hold_no_reward_model(tmp_path: Path) -> None:
    policy, tokenizer = scratch()
    save_model(policy, tokenizer, tmp_path / "policy")
    with pytest.raises(ArtifactError, match="LlamaForCausalLM, not a reward model"):
        ScalarModel.load(tmp_path / "policy")
    config = AutoConfig.from_pretrained(tmp_path / "policy", num_labels=3)
    three = cast(Any, AutoModelForSequenceClassification).from_config(config)
    three.save_pretrained(tmp_path / "three")
    tokenizer.save_pretrained(tmp_path / "three")
    with pytest.raises(ArtifactError, match="3 labels"):
        ScalarModel.load(tmp_path / "three")
    with pytest.raises(ArtifactError, match="no linear head"):
        ScalarModel(policy)


def test_saving_needs_a_pad_token_of_its_own(tmp_path: Path) -> None:
    model = scalar()
    _, tokenizer = scratch()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="ensure_distinct_pad"):
        model.save(tmp_path / "reward", tokenizer)
    assert not (tmp_path / "reward").exists()
