"""Adapters on the output head (`peft.output_head`): roles that give numbers leave it out, merging keeps ties."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import AutoPeftModelForCausalLM, TaskType
from pydantic import ValidationError
from torch import Tensor, nn

from rlhf.config import RLHFConfig
from rlhf.config.peft import LoRAConfig, lora_content
from rlhf.errors import ConfigError
from rlhf.models import load_policy, load_tokenizer
from rlhf.models.adapter_shape import new_settings
from rlhf.models.adapters import load_merged_policy, lora_weights
from rlhf.models.output_head import has_tied_head
from rlhf.models.scoring import response_logprobs
from rlhf.models.shared_base import SharedBase
from rlhf.stages.ppo.models import FrozenModel, SharedTrunkActorCritic
from tests.adapter_example import fixed_batch, write_adapter, write_base
from tests.unit.ragged import backward

HEAD_TOO = LoRAConfig(rank=4, alpha=8.0, output_head=True)
NUM_PROMPT = 5


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`base`, the adapter `sft` on it as stage sft makes it, `policy` with a head, `reward` that goes on from it."""
    folder = tmp_path_factory.mktemp("head")
    base = write_base(folder / "base", architecture=request.param)
    sft = write_adapter(folder / "sft", base, HEAD_TOO)
    policy = write_policy(folder / "policy", base)
    reward = write_adapter(folder / "reward", policy, HEAD_TOO, scores=True, seed=5)
    return {"base": base, "sft": sft, "policy": policy, "reward": reward}


def write_policy(folder: Path, base: str) -> str:
    """What PPO leaves: an adapter on all layers, the head included."""
    given: dict[str, Any] = {"reward_model": None, "value_model": None, "model_config": None, "seed": 1}
    model = SharedBase.build(policy=base, reference=base, value_init="policy", lora=HEAD_TOO, **given)
    move(model.parameters_of("policy"), 0.1)
    model.save_role("policy", folder, load_tokenizer(base))
    return str(folder)


def move(parameters: Iterable[nn.Parameter], scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def build(folders: dict[str, str], policy: str, **arguments: Any) -> SharedBase:
    given = {"value_model": None, "lora": HEAD_TOO, "model_config": None, "seed": 1, "reward_model": folders["reward"]}
    return SharedBase.build(policy=folders[policy], reference=folders[policy], **{**given, **arguments})


def logprobs(model: nn.Module, **arguments: Any) -> Tensor:
    """Of the response tokens (3, 4)."""
    ids, mask = fixed_batch()
    with torch.no_grad():
        return response_logprobs(
            model, input_ids=ids, attention_mask=mask, num_prompt=NUM_PROMPT, temperature=0.7, **arguments
        )


def of_role(base: SharedBase, role: Any, **arguments: Any) -> Tensor:
    with base.role(role) as model:
        return logprobs(model, **arguments)


def heads_of(folder: str) -> list[str]:
    return [name for name in lora_weights(folder, "base") if "lm_head" in name]


def test_the_policy_of_ppo_has_the_head_and_the_other_stages_leave_it_out(folders: dict[str, str]) -> None:
    """TRL's SFT multiplies by the head's own weights, so an adapter there would never be trained."""
    assert len(heads_of(folders["policy"])) == 2
    assert heads_of(folders["sft"]) == heads_of(folders["reward"]) == []


@pytest.mark.parametrize("value_init", ["policy", "reward_model"])
@pytest.mark.parametrize("policy", ["base", "sft", "policy"])
def test_the_head_is_the_policys_alone(folders: dict[str, str], policy: str, value_init: Any) -> None:
    base = build(folders, policy, value_init=value_init)
    assert torch.equal(of_role(base, "policy"), of_role(base, "reference"))
    before = base.response_values("value", *fixed_batch(), NUM_PROMPT), base.scores("reward", *fixed_batch())
    heads = [part for name, part in base.model.named_parameters() if "lm_head.lora" in name and ".policy." in name]
    assert len(heads) == 2
    assert all(part.requires_grad for part in heads)
    move(heads)
    assert not torch.allclose(of_role(base, "policy"), of_role(base, "reference"), atol=1e-3)
    assert torch.equal(base.response_values("value", *fixed_batch(), NUM_PROMPT), before[0])
    assert torch.equal(base.scores("reward", *fixed_batch()), before[1])


def test_a_refreshed_reference_takes_the_head_too(folders: dict[str, str]) -> None:
    for start in ("base", "sft", "policy"):
        base = build(folders, start, own_reference=True)
        assert torch.equal(of_role(base, "policy"), of_role(base, "reference"))
        move(base.parameters_of("policy"))
        base.copy_adapter("policy", "reference")
        assert torch.equal(of_role(base, "policy"), of_role(base, "reference"))


def test_log_probs_in_pieces_are_those_of_the_adapted_head(folders: dict[str, str]) -> None:
    base = build(folders, "policy")
    torch.testing.assert_close(of_role(base, "policy", chunk_tokens=3), of_role(base, "policy"), rtol=1e-6, atol=1e-6)


def test_gradients_in_pieces_are_those_of_the_adapted_head(folders: dict[str, str]) -> None:
    """The backward pass computes each piece once more, when the policy is no longer the active role."""
    gradients = []
    for chunk_tokens in (None, 3):
        base = build(folders, "policy")
        ids, mask = fixed_batch()
        with base.role("policy") as model:
            found = response_logprobs(
                model,
                input_ids=ids,
                attention_mask=mask,
                num_prompt=NUM_PROMPT,
                temperature=0.7,
                chunk_tokens=chunk_tokens,
            )
        values = base.response_values("value", ids, mask, NUM_PROMPT)
        backward(found.square().sum() + values.square().sum())
        parts = dict(base.named_parameters())
        gradients.append({name: cast(Tensor, part.grad) for name, part in parts.items() if part.requires_grad})
    at_once, in_pieces = gradients
    for name, gradient in at_once.items():
        tolerance = 1e-4 * float(gradient.abs().max())
        torch.testing.assert_close(in_pieces[name], gradient, rtol=1e-4, atol=tolerance)
    assert float(at_once["model.lm_head.lora_B.policy.weight"].abs().max()) > 0


def test_what_is_saved_is_what_peft_and_a_merge_give(folders: dict[str, str], tmp_path: Path) -> None:
    base = build(folders, "policy")
    base.save_role("policy", tmp_path / "policy", load_tokenizer(folders["base"]))
    expected = of_role(base, "policy")
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    torch.testing.assert_close(logprobs(plain), expected, rtol=1e-6, atol=1e-6)
    merged = load_merged_policy(str(tmp_path / "policy"), None, torch.float32, "ppo.policy")
    torch.testing.assert_close(logprobs(merged), expected, rtol=1e-5, atol=1e-5)


def write_tied(folder: Path) -> str:
    """A base whose head is its embeddings."""
    base = load_policy(write_base(folder / "base", architecture="gpt2"))
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(folder / "tied")
    load_tokenizer(str(folder / "base")).save_pretrained(folder / "tied")
    assert has_tied_head(load_policy(str(folder / "tied")))
    return str(folder / "tied")


def test_a_tied_reference_that_is_refreshed_takes_over_an_untied_policy(tmp_path: Path) -> None:
    tied = write_tied(tmp_path)
    policy = load_policy(write_policy(tmp_path / "adapter", tied))
    reference = FrozenModel(load_policy(tied))
    reference.untie_like(policy)
    assert torch.equal(logprobs(reference.model), logprobs(load_policy(tied)))
    reference.become(SharedTrunkActorCritic(policy))
    assert torch.equal(logprobs(reference.model), logprobs(policy))
    resumed = FrozenModel(load_policy(tied))
    resumed.untie_like(policy)
    resumed.load_state_dict(reference.state_dict())
    assert torch.equal(logprobs(resumed.model), logprobs(policy))


def test_merging_into_a_tied_head_leaves_the_embeddings_alone(tmp_path: Path) -> None:
    write_tied(tmp_path)
    folder = write_policy(tmp_path / "adapter", str(tmp_path / "tied"))
    merged = load_merged_policy(folder, None, torch.float32, "ppo.policy")
    expected = logprobs(AutoPeftModelForCausalLM.from_pretrained(folder).eval())
    torch.testing.assert_close(logprobs(merged), expected, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    load_tokenizer(folder).save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logprobs(load_policy(str(tmp_path / "merged"))), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_does_not_fit_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"made with peft\.rank=4"):
        build(folders, "sft", lora=LoRAConfig(rank=2, alpha=8.0, output_head=True))
    with pytest.raises(ConfigError, match=r"is on the output head too\. Set peft\.output_head=true"):
        build(folders, "policy", lora=LoRAConfig(rank=4, alpha=8.0))
    with pytest.raises(ConfigError, match="is on the output head too, which this stage cannot train"):
        write_adapter(tmp_path / "sft", folders["policy"], HEAD_TOO)


def test_the_head_is_not_named_among_the_layers(folders: dict[str, str]) -> None:
    lora = LoRAConfig(target_modules=("lm_head",))
    with pytest.raises(ConfigError, match=r"has no linear layer lm_head.*peft\.output_head=true"):
        new_settings(lora, load_policy(folders["base"]), base=folders["base"], task=TaskType.CAUSAL_LM)


def test_the_head_concerns_ppo_alone() -> None:
    """Toggling it restarts no other stage, and it is refused where nothing would come of it."""
    off = RLHFConfig.model_validate({"peft": {"type": "lora"}, "model": {"path": "base"}})
    on = RLHFConfig.model_validate({"peft": {"type": "lora", "output_head": True}, "model": {"path": "base"}})
    for stage in ("sft", "reward_model"):
        assert lora_content(on, stage) == lora_content(off, stage) is not None
    assert lora_content(on, "ppo") != lora_content(off, "ppo")
    assert lora_content(on, "evaluate") is None
    with pytest.raises(ValidationError, match=r"concerns stage ppo, which peft\.stages leaves out"):
        LoRAConfig(output_head=True, stages=("sft",))


def test_the_dropout_concerns_sft_alone_and_the_list_of_stages_none() -> None:
    plain, other = (
        RLHFConfig.model_validate({"peft": {"type": "lora", **more}, "model": {"path": "base"}})
        for more in ({}, {"dropout": 0.1, "stages": ("sft", "ppo")})
    )
    assert lora_content(plain, "ppo") == lora_content(other, "ppo")
    assert lora_content(plain, "sft") != lora_content(other, "sft")
    assert lora_content(other, "reward_model") is None


def test_an_adapted_head_in_pieces_under_stage_3_is_refused() -> None:
    body = {"peft": {"type": "lora", "output_head": True}, "zero": {"stage": 3}, "ppo": {"logprob_chunk_tokens": 64}}
    with pytest.raises(ValidationError, match=r"Set peft\.output_head=false or ppo\.logprob_chunk_tokens=null"):
        RLHFConfig.model_validate(body)
    RLHFConfig.model_validate({**body, "zero": {"stage": 2}})
    RLHFConfig.model_validate({**body, "peft": {"type": "lora"}})
