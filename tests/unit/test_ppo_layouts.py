"""Stage ppo in every layout of its models: two transformers, one trunk with two heads, adapters on one base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from rlhf.batches import PPOBatch, make_ppo_batch
from rlhf.config import RLHFConfig
from rlhf.models.loading import load_policy
from rlhf.stages.ppo import loop
from rlhf.stages.ppo.findings import SelfTestError
from rlhf.stages.ppo.models import AdapterActorCritic, ReferenceRole
from rlhf.stages.ppo.prepare import load_models, prepare_job
from rlhf.stages.ppo.rewards import RewardRole
from tests.adapter_example import LORA, write_adapter
from tests.ppo_example import ppo_config, ppo_context, write_models
from tests.stage_example import metrics_of

ADAPTERS = {"type": "lora", "rank": LORA.rank, "alpha": LORA.alpha}
Inputs = dict[str, str]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Inputs, dict[str, Any]]]:
    """Inputs and config sections of each layout, by name."""
    folder = tmp_path_factory.mktemp("layouts")
    full = write_models(folder)
    base = full["policy"]
    sft = write_adapter(folder / "sft", base)
    reward = write_adapter(folder / "reward", sft, scores=True, seed=5)
    on_base = {**full, "reward_model": reward, "value_model": reward}
    on_adapter = {**on_base, "policy": sft, "reference": sft}
    trunk = {"ppo": {"value_network": "shared_trunk"}}

    def without_value(inputs: Inputs) -> Inputs:
        return {name: path for name, path in inputs.items() if name != "value_model"}

    return {
        "two_models": (full, {}),
        "one_trunk": (without_value(full), trunk),
        "new_adapter_on_full_model": (on_base, {"peft": ADAPTERS}),
        "sft_adapter": (on_adapter, {"peft": ADAPTERS}),
        "sft_adapter_one_trunk": (without_value(on_adapter), {"peft": ADAPTERS, **trunk}),
        "sft_adapter_full_reward": ({**on_adapter, "reward_model": full["reward_model"]}, {"peft": ADAPTERS}),
        "sft_adapter_merged": (on_adapter, {}),
    }


NAMES = (
    "two_models",
    "one_trunk",
    "new_adapter_on_full_model",
    "sft_adapter",
    "sft_adapter_one_trunk",
    "sft_adapter_full_reward",
    "sft_adapter_merged",
)


def _config(sections: dict[str, Any], **ppo: Any) -> RLHFConfig:
    body = ppo_config(**{**sections.get("ppo", {}), **ppo}).model_dump()
    return RLHFConfig.model_validate({**body, "peft": sections.get("peft", {"type": "none"})})


def _folder(run: Path) -> dict[str, bytes]:
    """The published weights."""
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in run.glob("stages/ppo/*model/*.safetensors")}


@pytest.mark.parametrize("name", NAMES)
def test_rows_8_and_24_the_first_kl_is_zero_and_the_policy_moves(name: str, layouts: Any, tmp_path: Path) -> None:
    inputs, sections = layouts[name]
    config = _config(sections, num_epochs=1, num_minibatches=1)
    loop.run(ppo_context(config, tmp_path, inputs))
    first, second = metrics_of(tmp_path, "ppo")
    assert first["ppo/kl_to_reference"] == pytest.approx(0.0, abs=1e-6)
    assert first["ppo/exact_kl_to_reference"] == pytest.approx(0.0, abs=1e-6)
    assert first["ppo/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert first["ppo/approx_kl"] == pytest.approx(0.0, abs=1e-9)
    assert abs(second["ppo/kl_to_reference"]) > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_row_25_a_killed_run_goes_on_bit_for_bit(
    name: str, layouts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, sections = layouts[name]
    # Everything with a state of its own is on.
    config = _config(
        sections,
        num_updates=4,
        ema_decay=0.5,
        reference_refresh_every=1,
        kl_target_nats_per_sequence=0.01,
        score_normalization="running",
        ptx_coefficient=0.1,
        ptx_batch_size=3,
    )
    loop.run(ppo_context(config, tmp_path / "whole", inputs))
    real, calls = make_ppo_batch, 0

    def die_in_the_third_update(*arguments: Any, **named: Any) -> PPOBatch:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise InterruptedError("killed")
        return real(*arguments, **named)

    monkeypatch.setattr(loop, "make_ppo_batch", die_in_the_third_update)
    with pytest.raises(InterruptedError):
        loop.run(ppo_context(config, tmp_path / "killed", inputs))
    # The second attempt has two updates left to do.
    calls = 10
    loop.run(ppo_context(config, tmp_path / "killed", inputs))
    assert calls == 12
    monkeypatch.undo()
    assert _folder(tmp_path / "killed") == _folder(tmp_path / "whole")
    assert metrics_of(tmp_path / "killed", "ppo") == metrics_of(tmp_path / "whole", "ppo")


@pytest.mark.parametrize("name", ["one_trunk", "sft_adapter", "sft_adapter_one_trunk"])
@pytest.mark.parametrize(
    ("field", "value"), [("gradient_checkpointing", True), ("micro_batch_size", 3), ("logprob_chunk_tokens", 5)]
)
def test_row_10_sizes_change_rounding_only(name: str, field: str, value: object, layouts: Any, tmp_path: Path) -> None:
    inputs, sections = layouts[name]
    loop.run(ppo_context(_config(sections), tmp_path / "plain", inputs))
    loop.run(ppo_context(_config(sections, **{field: value}), tmp_path / "other", inputs))
    for ours, theirs in zip(metrics_of(tmp_path / "other", "ppo"), metrics_of(tmp_path / "plain", "ppo"), strict=True):
        for metric in ("ppo/loss", "ppo/score_mean", "ppo/grad_norm", "ppo/entropy"):
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-4, abs=1e-6), metric


def test_four_roles_lie_on_one_base(layouts: Any, tmp_path: Path) -> None:
    inputs, sections = layouts["sft_adapter"]
    models = load_models(ppo_context(_config(sections), tmp_path, inputs))
    assert isinstance(models.actor_critic, AdapterActorCritic)
    assert isinstance(models.reference, ReferenceRole)
    assert isinstance(models.rewards.rewards[0].reward, RewardRole)
    base = models.actor_critic.base
    assert models.reference.base is base
    assert models.rewards.rewards[0].reward.base is base
    whole = sum(parameter.numel() for parameter in load_policy(inputs["policy"]).parameters())
    # Three more copies of the model would make it four times as large; these adapters are smaller than the base.
    assert sum(parameter.numel() for parameter in base.parameters()) < 2 * whole


def test_row_27_one_update_changes_every_trained_adapter_and_nothing_else(layouts: Any, tmp_path: Path) -> None:
    inputs, sections = layouts["sft_adapter"]
    context = ppo_context(_config(sections), tmp_path, inputs)
    before = {name: value.clone() for name, value in load_models(context).actor_critic.state_dict().items()}
    job = prepare_job(context)
    loop.train(job)
    after = job.models.actor_critic.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    trained = {name for name, part in job.models.actor_critic.named_parameters() if part.requires_grad}
    assert changed == trained
    assert all(".policy." in name or ".value." in name or "heads.value" in name for name in trained)


def test_what_is_published_is_an_adapter_that_plain_peft_loads(layouts: Any, tmp_path: Path) -> None:
    inputs, sections = layouts["sft_adapter"]
    loop.run(ppo_context(_config(sections), tmp_path, inputs))
    folder = tmp_path / "stages/ppo/model"
    assert not (folder / "model.safetensors").exists()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        ours = load_policy(str(folder))(input_ids=ids).logits
        plain = AutoPeftModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("peft", [ADAPTERS, {"type": "none"}])
def test_row_24_the_base_as_reference_of_an_adapter_stops_the_run(
    peft: dict[str, Any], layouts: Any, tmp_path: Path
) -> None:
    inputs, _ = layouts["sft_adapter"]
    base = layouts["two_models"][0]["policy"]
    given = {**inputs, "reference": base}
    with pytest.raises(
        SelfTestError, match=r"the reference is the base model .* but the policy carries the SFT adapter"
    ):
        loop.run(ppo_context(_config({"peft": peft}), tmp_path / "stopped", given))
    loop.run(ppo_context(_config({"peft": peft}, self_test=False), tmp_path / "meant", given))
    assert metrics_of(tmp_path / "meant", "ppo")[0]["ppo/kl_to_reference"] != pytest.approx(0.0, abs=1e-3)


def test_another_reference_on_purpose_is_no_fault(layouts: Any, tmp_path: Path) -> None:
    inputs, sections = layouts["two_models"]
    other = tmp_path / "other"
    shutil.copytree(inputs["policy"], other)
    model = load_policy(str(other))
    model.get_output_embeddings().weight.data += 0.1 * torch.randn_like(model.get_output_embeddings().weight)
    model.save_pretrained(other)
    loop.run(ppo_context(_config(sections), tmp_path / "run", {**inputs, "reference": str(other)}))
    assert metrics_of(tmp_path / "run", "ppo")[0]["ppo/exact_kl_to_reference"] > 1e-4
