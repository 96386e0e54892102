"""`PPOTrainer(peft_config=...)`, and the other layouts of the models: as the stage has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf import LoRAConfig, PPOTrainer, UserError
from rlhf.config import RLHFConfig
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.records import prompt_to_json
from rlhf.stages.ppo import loop
from rlhf.stages.ppo.models import AdapterActorCritic
from rlhf.stages.sampling import load_encoded_prompts
from rlhf.trainer.adapters import lora_config
from tests import trainer_example
from tests.adapter_example import LORA, write_adapter
from tests.ppo_example import ppo_config, ppo_context, write_models
from tests.trainer_example import process_state

ADAPTERS = {"type": "lora", "rank": LORA.rank, "alpha": LORA.alpha}
Folders = dict[str, str]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A whole policy and reward model, and adapters of both on that policy."""
    folder = tmp_path_factory.mktemp("adapters")
    full = write_models(folder)
    sft = write_adapter(folder / "sft", full["policy"])
    reward = write_adapter(folder / "reward", sft, scores=True, seed=5)
    return {"policy": full["policy"], "reward_model": full["reward_model"], "sft": sft, "reward_adapter": reward}


@pytest.fixture(autouse=True)
def _process_state() -> Iterator[None]:
    with process_state():
        yield


def make(model: Any, **changes: Any) -> PPOTrainer:
    return trainer_example.make(model, **{"args": ppo_config(num_epochs=1).ppo, **changes})


@pytest.mark.parametrize(
    ("policy", "reward", "lora", "trunk"),
    [
        ("policy", "reward_model", False, True),
        ("sft", "reward_adapter", False, False),
        ("policy", "reward_adapter", True, False),
        ("sft", "reward_adapter", True, False),
        ("sft", "reward_model", True, True),
    ],
)
def test_the_stage_and_the_trainer_give_the_same_weights_in_every_layout(
    policy: str, reward: str, lora: bool, trunk: bool, folders: Folders, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"num_epochs": 1, "value_network": "shared_trunk"} if trunk else {"num_epochs": 1}
    body = ppo_config(**changes).model_dump()
    config = RLHFConfig.model_validate({**body, "peft": ADAPTERS if lora else {"type": "none"}})
    inputs = {"policy": folders[policy], "reference": folders[policy], "reward_model": folders[reward]}
    if not trunk:
        inputs["value_model"] = folders[reward]
    loop.run(ppo_context(config, tmp_path / "run", inputs))
    prompts = load_encoded_prompts(config.data, load_tokenizer(folders[policy]), print)["train"]
    trainer = make(
        folders[policy],
        reward_model=folders[reward],
        train_dataset=[{"prompt": prompt_to_json(prompt.content), **prompt.columns} for prompt in prompts],
        args=config.ppo,
        peft_config=LORA if lora else None,
    )
    trainer.train()
    trainer.save_model(tmp_path / "model")
    parts = ["model"] if trunk else ["model", "value_model"]
    if trunk:
        with pytest.raises(UserError, match="no value_model of its own"):
            trainer.save_value_model(tmp_path / "value_model")
    else:
        trainer.save_value_model(tmp_path / "value_model")
    for part in parts:
        published = tmp_path / "run" / "stages" / "ppo" / part
        for file in published.iterdir():
            assert (tmp_path / part / file.name).read_bytes() == file.read_bytes(), f"{part}/{file.name}"


def test_an_instance_trains_an_adapter_and_stays_as_it_was(folders: Folders, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["policy"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = peft.LoraConfig(r=LORA.rank, lora_alpha=int(LORA.alpha), target_modules="all-linear")
    by_instance = make(model, peft_config=settings)
    assert isinstance(by_instance.models.actor_critic, AdapterActorCritic)
    result = by_instance.train()
    assert result.history[0]["ppo/kl_to_reference"] == pytest.approx(0.0, abs=1e-6)
    assert result.history[1]["ppo/kl_to_reference"] != 0.0
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    by_instance.save_model(tmp_path / "instance")
    by_folder = make(folders["policy"], peft_config=LORA)
    by_folder.train()
    by_folder.save_model(tmp_path / "folder")
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("instance", "folder")]
    assert weights[0] == weights[1]
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "instance").merge_and_unload()
    merged = load_policy(str(tmp_path / "folder"))
    ids = torch.tensor([[5, 40, 60, 7]])
    torch.testing.assert_close(loaded(ids).logits, merged(ids).logits)


def test_a_refreshed_reference_lies_on_the_base_too(folders: Folders) -> None:
    section = ppo_config(num_updates=3, reference_refresh_every=1).ppo
    for model in (folders["policy"], AutoModelForCausalLM.from_pretrained(folders["policy"])):
        result = make(model, peft_config=LORA, args=section).train()
        # The reference is the policy again before every rollout.
        assert [line["ppo/kl_to_reference"] for line in result.history] == pytest.approx([0.0] * 3, abs=1e-5)


def test_peft_settings_become_ours() -> None:
    given = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["v_proj", "q_proj"])
    assert lora_config(given) == LoRAConfig(rank=4, alpha=8.0, target_modules=("q_proj", "v_proj"))
    assert lora_config(peft.LoraConfig(r=2, lora_alpha=3)) == LoRAConfig(rank=2, alpha=3.0)
    for wrong, message in (
        (peft.LoraConfig(use_dora=True), "sets use_dora"),
        (peft.LoraConfig(bias="all", use_rslora=True), "sets bias, use_rslora"),
        (peft.LoraConfig(target_modules=".*q_proj"), "is a pattern"),
        (peft.IA3Config(), "not IA3Config"),
    ):
        with pytest.raises(UserError, match=message):
            lora_config(wrong)


def test_with_adapters_reference_and_critic_lie_on_the_base(folders: Folders) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["policy"])
    for changes, message in (
        ({"ref_model": model}, "ref_model is an adapter on the policy's base"),
        ({"value_model": folders["reward_model"]}, "is an adapter on the policy's base"),
        ({"ref_model": folders["reward_adapter"] + "x"}, "reward"),
    ):
        with pytest.raises(UserError, match=message):
            make(folders["policy"], peft_config=LORA, **changes)
    with pytest.raises(UserError, match="leave value_model out"):
        make(model, peft_config=LORA, value_model=folders["reward_adapter"])
    model.config._name_or_path = ""
    nowhere = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(UserError, match="names its base"):
        make(nowhere, processing_class=load_tokenizer(folders["policy"]), peft_config=LORA)
