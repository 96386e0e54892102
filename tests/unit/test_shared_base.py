"""One base, four roles: KL 0 at the start, roles that do not touch each other, gradients, copies and saved folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rlhf.config.peft import LoRAConfig
from rlhf.errors import ArtifactError, ConfigError
from rlhf.models import ScalarModel, load_policy, load_tokenizer
from rlhf.models.scalar import sequence_scores
from rlhf.models.scoring import response_logprobs
from rlhf.models.shared_base import Role, SharedBase
from rlhf.ops.kl import k1
from tests.adapter_example import LORA, fixed_batch, write_adapter, write_base

NUM_PROMPT = 5
Folders = dict[str, str]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """`base`, and on it the adapters `sft`, `other`, `reward` (from `sft`) and `base_reward` (from `base`)."""
    folder = tmp_path_factory.mktemp("shared")
    base = write_base(folder / "base")
    sft = write_adapter(folder / "sft", base)
    return {
        "base": base,
        "sft": sft,
        "other": write_adapter(folder / "other", base, seed=8),
        "reward": write_adapter(folder / "reward", sft, scores=True, seed=5),
        "base_reward": write_adapter(folder / "base_reward", base, scores=True, seed=6),
        "elsewhere": write_base(folder / "elsewhere", seed=12),
    }


def build(policy: str, reference: str, reward: str | None = None, **arguments: Any) -> SharedBase:
    given = {"value_model": None, "lora": LORA, "model_config": None, "seed": 1, **arguments}
    return SharedBase.build(policy=policy, reference=reference, reward_model=reward, **given)


def logprobs(base: SharedBase | nn.Module, role: Role = "policy") -> Tensor:
    """Of the response tokens (3, 4)."""
    ids, mask = fixed_batch()
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "num_prompt": NUM_PROMPT, "temperature": 0.7}
    with torch.no_grad():
        if not isinstance(base, SharedBase):
            return response_logprobs(base, **arguments)
        with base.role(role) as model:
            return response_logprobs(model, **arguments)


def values(base: SharedBase, role: Role) -> Tensor:
    with torch.no_grad():
        return base.response_values(role, *fixed_batch(), NUM_PROMPT)


def perturb(base: SharedBase, role: Role) -> None:
    with torch.no_grad():
        for parameter in base.parameters_of(role):
            parameter.add_(0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("policy", "reward", "kind"), [("base", "base_reward", "adapter_off"), ("sft", "reward", "adapter_copy")]
)
def test_row_24_the_kl_to_the_reference_is_0_at_step_0(
    folders: Folders, policy: str, reward: str, kind: str, dtype: torch.dtype, training: bool
) -> None:
    base = build(folders[policy], folders[policy], folders[reward], dtype=dtype)
    base.train(training)
    assert base.reference_kind == kind
    assert base.policy_adapter_source == (None if policy == "base" else folders[policy])
    ours, reference = logprobs(base, "policy"), logprobs(base, "reference")
    assert torch.equal(k1(logprobs=ours, reference_logprobs=reference), torch.zeros(3, 4))
    assert torch.equal((ours - reference).exp(), torch.ones(3, 4))


def test_row_24_a_reference_that_is_not_where_the_policy_starts_is_known(folders: Folders) -> None:
    forgotten = build(folders["sft"], folders["base"], value_init="policy")
    assert (forgotten.reference_kind, forgotten.policy_adapter_source) == ("adapter_off", folders["sft"])
    assert not torch.equal(logprobs(forgotten, "policy"), logprobs(forgotten, "reference"))
    assert torch.equal(logprobs(forgotten, "reference"), logprobs(load_policy(folders["base"])))
    other = build(folders["sft"], folders["other"], value_init="policy")
    assert other.reference_kind == "adapter_copy"
    assert not torch.equal(logprobs(other, "policy"), logprobs(other, "reference"))


@pytest.mark.parametrize("own_reference", [False, True])
def test_a_role_is_the_merged_model_of_its_folder(folders: Folders, own_reference: bool) -> None:
    base = build(folders["sft"], folders["other"], folders["reward"], own_reference=own_reference)
    names: dict[Role, str] = {"policy": "sft", "reference": "other"}
    for role, name in names.items():
        assert float((logprobs(base, role) - logprobs(load_policy(folders[name]))).abs().max()) < 1e-5
    scalar = ScalarModel.load(folders["reward"])
    with torch.no_grad():
        expected = scalar.response_values(*fixed_batch(), NUM_PROMPT)
    real = torch.cat([torch.ones(3, 1, dtype=torch.bool), fixed_batch()[1][:, NUM_PROMPT:]], dim=1)
    scorers: tuple[Role, ...] = ("value", "reward")
    for role in scorers:
        found = values(base, role)
        assert found.dtype == torch.float32
        assert float((found - expected)[real].abs().max()) < 1e-5
        with torch.no_grad():
            ids, mask = fixed_batch()
            assert float((base.scores(role, ids, mask) - sequence_scores(scalar(ids, mask), mask)).abs().max()) < 1e-5


def test_a_value_from_the_policy_has_its_adapter_and_a_head_of_zeros(folders: Folders) -> None:
    for name in ("base", "sft"):
        base = build(folders[name], folders[name], folders["reward"], value_init="policy")
        assert torch.equal(values(base, "value"), torch.zeros(3, 5))
        pairs = list(zip(base.parameters_of("policy"), base.parameters_of("value"), strict=False))
        assert len(pairs) == len(base.parameters_of("value")) - 1
        assert all(torch.equal(one, other) and one is not other for one, other in pairs)
        assert base.has_role("reward")
    assert torch.equal(
        values(build(folders["sft"], folders["sft"], None, value_model=folders["reward"]), "value"),
        values(build(folders["sft"], folders["sft"], folders["reward"]), "value"),
    )


def test_roles_do_not_touch_each_other(folders: Folders) -> None:
    for own_reference in (False, True):
        base = build(folders["base"], folders["base"], folders["base_reward"], own_reference=own_reference)
        before = {role: logprobs(base, role) for role in ("policy", "reference")}
        numbers = {role: values(base, role) for role in ("value", "reward")}
        perturb(base, "value")
        for role in ("policy", "reference"):
            assert torch.equal(logprobs(base, role), before[role])
        assert torch.equal(values(base, "reward"), numbers["reward"])
        assert not torch.equal(values(base, "value"), numbers["value"])
        changed = values(base, "value")
        perturb(base, "policy")
        assert not torch.equal(logprobs(base, "policy"), before["policy"])
        assert torch.equal(logprobs(base, "reference"), before["reference"])
        assert torch.equal(values(base, "value"), changed)


def test_row_23_a_step_of_the_policy_leaves_the_reference_alone(folders: Folders) -> None:
    base = build(folders["sft"], folders["sft"], folders["reward"])
    before = logprobs(base, "reference")
    optimizer = torch.optim.SGD([part for part in base.parameters() if part.requires_grad], lr=0.1)
    loss(base).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert torch.equal(logprobs(base, "reference"), before)
    assert not torch.equal(logprobs(base, "policy"), before)


def loss(base: SharedBase) -> Tensor:
    """Of policy and value together, both forward passes before the backward pass, with the reference in between."""
    ids, mask = fixed_batch()
    with base.role("policy") as model:
        ours = response_logprobs(model, input_ids=ids, attention_mask=mask, num_prompt=NUM_PROMPT, temperature=1.0)
    with torch.no_grad(), base.role("reference") as model:
        reference = response_logprobs(model, input_ids=ids, attention_mask=mask, num_prompt=NUM_PROMPT, temperature=1.0)
    real = mask[:, NUM_PROMPT:]
    critic = base.response_values("value", ids, mask, NUM_PROMPT)[:, :-1]
    return ((ours - reference - 1.0)[real].square().sum() + (critic - 1.0)[real].square().sum()) / 10


def gradients(base: SharedBase) -> tuple[dict[str, Tensor], int]:
    """Of `loss`, and how often the first adapted layer was called for it."""
    layer = next(module for module in base.modules() if isinstance(module, LoraLayer))
    calls: list[str | None] = []
    hook = cast(nn.Module, layer).register_forward_pre_hook(lambda *_: calls.append(base.active_adapter))
    base.zero_grad()
    base.train()
    loss(base).backward()  # type: ignore[no-untyped-call]
    hook.remove()
    return {name: part.grad.clone() for name, part in base.named_parameters() if part.grad is not None}, len(calls)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_row_9_gradient_checkpointing_changes_no_gradient(architecture: str, tmp_path: Path) -> None:
    path = write_base(tmp_path / "base", architecture)
    sft = write_adapter(tmp_path / "sft", path)
    base = build(sft, sft, write_adapter(tmp_path / "reward", sft, scores=True))
    plain, num_calls = gradients(base)
    assert set(plain) == {name for name, part in base.named_parameters() if part.requires_grad}
    base.enable_gradient_checkpointing()
    again, num_calls_again = gradients(base)
    # Policy, reference and value; in the backward pass policy and value once more.
    assert (num_calls, num_calls_again) == (3, 5)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert bool(gradient.any()), name
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)
    assert base.active_adapter is None


def test_only_policy_and_value_are_trained(folders: Folders) -> None:
    base = build(folders["sft"], folders["sft"], folders["reward"], own_reference=True)
    trained = {id(part) for part in base.parameters() if part.requires_grad}
    assert trained == {id(part) for role in ("policy", "value") for part in base.parameters_of(role)}
    num_matrices = 2 * 7 * 2
    roles: tuple[Role, ...] = ("policy", "reference", "value", "reward")
    sizes = {role: len(base.parameters_of(role)) for role in roles}
    assert sizes == {
        "policy": num_matrices,
        "reference": num_matrices,
        "value": num_matrices + 1,
        "reward": num_matrices + 1,
    }
    assert {part.dtype for part in base.parameters()} == {torch.float32}
    low = build(folders["sft"], folders["sft"], folders["reward"], dtype=torch.bfloat16)
    assert {part.dtype for role in roles for part in low.parameters_of(role)} == {torch.float32}
    assert {part.dtype for part in low.parameters()} == {torch.float32, torch.bfloat16}
    assert values(low, "value").dtype == torch.float32


def active(base: SharedBase) -> str | None:
    return base.active_adapter


def fail_within(base: SharedBase, role: Role) -> None:
    with base.role(role):
        assert base.active_adapter == role
        raise ValueError("inner")


def test_a_role_ends_also_on_an_error_and_within_itself(folders: Folders) -> None:
    base = build(folders["sft"], folders["sft"], folders["reward"])
    required = {name: part.requires_grad for name, part in base.named_parameters()}
    context = base.role("policy")
    with context:
        with base.role("value"), context:
            assert active(base) == "policy"
        assert active(base) == "policy"
        with pytest.raises(ValueError, match="inner"):
            fail_within(base, "reference")
        assert active(base) == "policy"
    assert active(base) is None
    assert {name: part.requires_grad for name, part in base.named_parameters()} == required
    with torch.no_grad():
        idle = response_logprobs(
            base.model, input_ids=fixed_batch()[0], attention_mask=fixed_batch()[1], num_prompt=5, temperature=0.7
        )
    assert torch.equal(idle, logprobs(load_policy(folders["base"])))


def test_the_reference_is_refreshed_by_a_copy(folders: Folders) -> None:
    for name in ("base", "sft"):
        base = build(folders[name], folders[name], None, own_reference=True)
        assert base.reference_kind == "adapter_copy"
        perturb(base, "policy")
        kept = values(base, "value")
        base.copy_adapter("policy", "reference")
        assert torch.equal(logprobs(base, "policy"), logprobs(base, "reference"))
        assert torch.equal(values(base, "value"), kept)
        perturb(base, "policy")
    with pytest.raises(ValueError, match="own_reference=True"):
        build(folders["base"], folders["base"], None).copy_adapter("policy", "reference")


def test_a_reward_model_that_is_not_on_the_base_is_left_to_the_caller(folders: Folders, tmp_path: Path) -> None:
    elsewhere = write_adapter(tmp_path / "reward", folders["elsewhere"], scores=True)
    for path in (None, folders["elsewhere"], elsewhere):
        base = build(folders["sft"], folders["sft"], path, value_init="policy")
        assert not base.has_role("reward")
        with pytest.raises(ValueError, match="no role reward"):
            base.role("reward")
    with pytest.raises(ConfigError, match=r"ppo\.value_init=policy"):
        build(folders["sft"], folders["sft"], elsewhere)
    with pytest.raises(ConfigError, match=r"ppo\.value_init=policy"):
        build(folders["sft"], folders["sft"], folders["elsewhere"])
    assert not build(folders["sft"], folders["sft"], elsewhere, with_value=False).has_role("value")


def test_what_does_not_fit_is_named(folders: Folders) -> None:
    with pytest.raises(ConfigError, match=r"ppo\.reference=.*neither the policy's base"):
        build(folders["sft"], folders["elsewhere"])
    with pytest.raises(ConfigError, match=r"ppo\.policy: the adapter .* made with peft\.rank=4; the config says 2"):
        build(folders["sft"], folders["sft"], lora=LoRAConfig(rank=2, alpha=8.0))
    with pytest.raises(ArtifactError, match="not a reward model"):
        build(folders["sft"], folders["sft"], folders["other"])
    base = build(folders["sft"], folders["sft"], folders["reward"])
    ids, mask = fixed_batch()
    with pytest.raises(ValueError, match="bool"):
        base.response_values("value", ids, mask.long(), NUM_PROMPT)
    with pytest.raises(ValueError, match="num_prompt"):
        base.response_values("value", ids, mask, 0)
    # Spelled in another way it is the same base.
    spelled = build(folders["sft"], folders["base"] + "/../base", folders["reward"])
    assert spelled.reference_kind == "adapter_off"


def test_row_41_new_adapters_follow_from_the_seed_alone(folders: Folders) -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = build(folders["base"], folders["base"], folders["base_reward"])
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(2)
    second = build(folders["base"], folders["base"], folders["base_reward"]).state_dict()
    other = build(folders["base"], folders["base"], folders["base_reward"], seed=2).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.state_dict().items())
    assert not all(torch.equal(value, other[name]) for name, value in first.state_dict().items())


def test_row_42_saved_roles_load_with_the_same_numbers(folders: Folders, tmp_path: Path) -> None:
    base = build(folders["sft"], folders["sft"], folders["reward"])
    roles: tuple[Role, ...] = ("policy", "value")
    for role in roles:
        perturb(base, role)
    tokenizer = load_tokenizer(folders["reward"])
    whole = {name: value.clone() for name, value in base.state_dict().items()}
    found, numbers = logprobs(base), values(base, "value")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.zero_()  # what is saved comes from the given weights
    for role in roles:
        base.save_role(role, tmp_path / role, tokenizer, whole)
    assert float((logprobs(load_policy(tmp_path / "policy")) - found).abs().max()) < 1e-5
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert float((logprobs(plain) - found).abs().max()) < 1e-5
    with torch.no_grad():
        again = ScalarModel.load(tmp_path / "value").response_values(*fixed_batch(), NUM_PROMPT)
    real = torch.cat([torch.ones(3, 1, dtype=torch.bool), fixed_batch()[1][:, NUM_PROMPT:]], dim=1)
    assert float((again - numbers)[real].abs().max()) < 1e-5
    # And they go on as roles.
    policy, value = str(tmp_path / "policy"), str(tmp_path / "value")
    continued = build(policy, folders["sft"], folders["reward"], value_model=value)
    assert torch.equal(logprobs(continued), found)
    assert torch.equal(values(continued, "value"), numbers)
    off = build(folders["base"], folders["base"])
    with pytest.raises(ValueError, match="which is a folder already"):
        off.save_role("reference", tmp_path / "reference", tokenizer)


def test_encoder_decoder_bases_are_refused(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf.models import shared_base

    model = load_policy(folders["base"])
    model.config.is_encoder_decoder = True
    monkeypatch.setattr(shared_base, "load_policy", lambda *arguments: model)
    with pytest.raises(ConfigError, match="only decoder-only models"):
        build(folders["base"], folders["base"])
