"""Adapter folders: plain PEFT loads them, our loaders merge them, and what is missing is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file

from rlhf.config import RLHFConfig
from rlhf.config.peft import LoRAConfig, NoPEFT, lora_of, uses_lora
from rlhf.errors import ArtifactError, ConfigError
from rlhf.models import ScalarModel, check_model_path, load_policy, load_tokenizer, save_model
from rlhf.models.adapters import base_of, is_adapter
from rlhf.models.scalar import sequence_scores
from tests.adapter_example import LORA, adapted, fixed_batch, write_adapter, write_base

ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "qwen3", "gemma2", "mistral")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base, an SFT adapter on it and a reward adapter that went on from that."""
    folder = tmp_path_factory.mktemp("adapters")
    base = write_base(folder / "base")
    sft = write_adapter(folder / "sft", base)
    return {"base": base, "sft": sft, "reward": write_adapter(folder / "reward", sft, scores=True, seed=5)}


def copy_of(path: str, folder: Path) -> Path:
    return Path(shutil.copytree(path, folder))


def logits_of(model: Any) -> torch.Tensor:
    ids, mask = fixed_batch()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits[mask] if logits.dim() == 3 else logits


@pytest.mark.parametrize(
    ("section", "model", "stages"),
    [
        ({"type": "none"}, "gpt2", []),
        ({"type": "lora"}, "gpt2", ["sft", "reward_model", "ppo"]),
        ({"type": "lora"}, None, ["reward_model", "ppo"]),
        ({"type": "lora", "stages": ("ppo",)}, "gpt2", ["ppo"]),
        ({"type": "lora", "stages": ("sft",)}, None, ["sft"]),
    ],
)
def test_which_stages_train_adapters(section: dict[str, Any], model: str | None, stages: list[str]) -> None:
    config = RLHFConfig.model_validate({"peft": section, "model": {"path": model}})
    names = ("sft", "collect", "reward_model", "ppo", "evaluate", "report")
    assert [stage for stage in names if uses_lora(config, stage)] == stages
    assert all(lora_of(config, stage) == config.peft for stage in stages)


def test_the_sft_of_a_given_base_is_not_from_scratch() -> None:
    config = RLHFConfig.model_validate({"peft": {"type": "lora"}, "sft": {"base": "gpt2"}})
    assert uses_lora(config, "sft")
    assert isinstance(RLHFConfig().peft, NoPEFT)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_policy_has_the_adapters_logits(architecture: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", architecture)
    path = write_adapter(tmp_path / "sft", base)
    plain = AutoPeftModelForCausalLM.from_pretrained(path)
    merged = load_policy(path)
    assert not hasattr(merged, "peft_config")
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert float((logits_of(merged) - logits_of(plain)).abs().max()) < 1e-5
    assert float((logits_of(merged) - logits_of(load_policy(base))).abs().max()) > 1e-2
    # A merged model is a whole one: it can be saved, and an adapter can be put on top of it.
    save_model(merged, load_tokenizer(path), tmp_path / "merged")
    assert torch.equal(logits_of(load_policy(tmp_path / "merged")), logits_of(merged))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_row_42_a_reward_adapter_keeps_its_head_and_scores(architecture: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", architecture)
    model, tokenizer = adapted(base, scores=True)
    wrapped: Any = model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
                assert "lora_" in name or "score" in name
    save_model(model, tokenizer, tmp_path / "reward")
    plain = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "reward", num_labels=1)
    ours = ScalarModel.load(tmp_path / "reward")
    ids, mask = fixed_batch()
    head = wrapped.base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(ours.head.weight, head)
    with torch.no_grad():
        found = sequence_scores(ours(ids, mask), mask)
        for row in range(len(ids)):  # one at a time, since plain transformers finds the last token by the pad token
            single = ids[row][mask[row]][None]
            expected = [part(input_ids=single).logits.item() for part in (wrapped, plain)]
            assert expected[0] == expected[1]
            assert float(found[row]) == pytest.approx(expected[0], abs=1e-5)


def test_row_41_a_new_adapter_follows_from_its_seed_alone(folders: dict[str, str], tmp_path: Path) -> None:
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    for name, scores in (("policy", False), ("reward", True)):
        first, tokenizer = adapted(folders["base"], scores=scores)
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.rand(3)
        second, _ = adapted(folders["base"], scores=scores)
        other, _ = adapted(folders["base"], scores=scores, seed=4)
        for number, model in enumerate((first, second, other)):
            save_model(model, tokenizer, tmp_path / f"{name}{number}")
        files = [
            {file.name: file.read_bytes() for file in (tmp_path / f"{name}{number}").iterdir()} for number in range(3)
        ]
        assert files[0] == files[1]
        assert files[0]["adapter_model.safetensors"] != files[2]["adapter_model.safetensors"]
        torch.random.set_rng_state(state)


def test_the_config_file_has_the_same_bytes_in_every_process(folders: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.adapter_example import *; "
        "save_model(*adapted(sys.argv[1]), Path(sys.argv[2]))"
    )
    written = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        command = [sys.executable, "-c", code, folders["base"], str(folder)]
        environment = {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2], env=environment, capture_output=True)
        written.append((folder / "adapter_config.json").read_bytes())
    assert written[0] == written[1]
    assert json.loads(written[0])["base_model_name_or_path"] == folders["base"]


def test_only_adapter_and_head_are_trained(folders: dict[str, str]) -> None:
    model, _ = adapted(folders["base"], scores=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-2] for name in trained} == {"default"}
    assert len(trained) == 2 * 7 * 2 + 1  # A and B of seven layers in two blocks, and the head
    policy, _ = adapted(folders["base"])
    before = logits_of(load_policy(folders["base"]))
    assert torch.equal(logits_of(policy), before)  # B = 0


def test_a_reward_model_goes_on_from_the_sft_adapter_on_its_base(folders: dict[str, str]) -> None:
    model, _ = adapted(folders["sft"], scores=True)
    state, saved = model.state_dict(), load_file(Path(folders["sft"]) / "adapter_model.safetensors")
    assert saved
    for name, value in saved.items():
        assert torch.equal(state[name.replace(".weight", ".default.weight")], value), name
    assert base_of(folders["reward"]) == base_of(folders["sft"]) == folders["base"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rank": 8}, "peft.rank=4; the config says 8"),
        ({"alpha": 4.0}, "peft.alpha=8.0; the config says 4.0"),
        ({"target_modules": ("q_proj",)}, "peft.target_modules="),
    ],
)
def test_a_continued_adapter_must_be_what_the_config_says(
    folders: dict[str, str], change: dict[str, Any], named: str
) -> None:
    lora = LoRAConfig.model_validate({**LORA.model_dump(), **change})
    with pytest.raises(ConfigError) as caught:
        adapted(folders["sft"], lora)
    assert named in str(caught.value)
    assert folders["sft"] in str(caught.value)


def test_every_setting_changes_the_adapter(folders: dict[str, str]) -> None:
    def trained(**change: Any) -> dict[str, tuple[int, ...]]:
        model, _ = adapted(folders["base"], LoRAConfig.model_validate({**LORA.model_dump(), **change}))
        return {name: tuple(part.shape) for name, part in model.named_parameters() if part.requires_grad}

    assert {min(shape) for shape in trained().values()} == {4}
    assert {min(shape) for shape in trained(rank=2).values()} == {2}
    assert len(trained(target_modules=("q_proj", "v_proj"))) == 2 * 2 * 2
    scales = []
    for alpha in (8.0, 16.0):
        model: Any = adapted(folders["sft"])[0] if alpha == 8.0 else adapted(folders["base"], LoRAConfig(rank=4))[0]
        scales.append(model.base_model.model.model.layers[0].mlp.up_proj.scaling["default"])
    assert scales == [2.0, 8.0]  # alpha / rank
    with pytest.raises(ConfigError, match=r"no linear layer q, lm_head in its|no linear layer lm_head, q in its"):
        trained(target_modules=("q", "lm_head"))


def test_row_39_a_pad_token_that_the_base_lacks_is_added_again_on_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base's vocabulary is full and pads with EOS; the reward model needs a pad token of its own."""
    base = write_base(tmp_path / "base")
    tokenizer: Any = load_tokenizer(base)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(base)
    monkeypatch.setattr("rlhf.models.scalar.PAD_TOKENS", ("<added pad>",))
    model, tokenizer = adapted(base, scores=True)
    wrapped: Any = model
    assert tokenizer.pad_token_id == 270 == len(wrapped.get_input_embeddings().weight) - 1
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    save_model(model, tokenizer, tmp_path / "reward")
    assert not any("embed" in name for name in load_file(tmp_path / "reward/adapter_model.safetensors"))
    again = ScalarModel.load(tmp_path / "reward")
    assert again.model.config.pad_token_id == 270
    ids, mask = fixed_batch()
    with torch.no_grad():
        # As training sees it, padded on the right.
        rows = [ids[row][mask[row]] for row in range(len(ids))]
        padded = torch.full((3, 9), 270)
        for row, text in enumerate(rows):
            padded[row, : len(text)] = text
        logits = wrapped(input_ids=padded, attention_mask=padded != 270).logits[:, 0]
        found = sequence_scores(again(padded, padded != 270), padded != 270)
    assert float((found - logits).abs().max()) < 1e-5


def test_scorers_and_writers_are_not_confused(folders: dict[str, str]) -> None:
    with pytest.raises(ArtifactError, match="scores text and cannot write it"):
        load_policy(folders["reward"])
    with pytest.raises(ArtifactError, match="not a reward model"):
        ScalarModel.load(folders["sft"])
    # A critic from an SFT adapter has its merged transformer.
    critic = ScalarModel.from_policy(folders["sft"], seed=1, zero_head=True)
    weight = load_policy(folders["sft"]).state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(critic.state_dict()["model.model.layers.0.mlp.up_proj.weight"], weight)


def test_row_42_a_head_that_is_not_in_the_file_is_an_error(folders: dict[str, str], tmp_path: Path) -> None:
    path = copy_of(folders["reward"], tmp_path / "reward")
    weights = load_file(path / "adapter_model.safetensors")
    head = weights.pop("base_model.model.score.weight")
    save_file(weights, path / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="no head `score`"):
        ScalarModel.load(path)
    del weights[min(weights)]
    save_file({**weights, "base_model.model.score.weight": head}, path / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="lacks 1 of its weights"):
        ScalarModel.load(path)


def test_adapter_folders_pass_the_check_of_paths(folders: dict[str, str], tmp_path: Path) -> None:
    for name in ("base", "sft", "reward"):
        check_model_path(folders[name], "ppo.policy")
        assert is_adapter(folders[name]) == (name != "base")
    # The tokenizer may be the base's.
    path = copy_of(folders["sft"], tmp_path / "bare")
    for file in path.iterdir():
        if "adapter" not in file.name:
            file.unlink()
    check_model_path(str(path), "ppo.policy")
    assert load_tokenizer(path).get_vocab() == load_tokenizer(folders["base"]).get_vocab()
    load_policy(path)


def test_what_an_adapter_misses_is_named(folders: dict[str, str], tmp_path: Path) -> None:
    path = copy_of(folders["sft"], tmp_path / "sft")

    def message(**change: Any) -> str:
        config = json.loads((Path(folders["sft"]) / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ArtifactError) as caught:
            check_model_path(str(path), "ppo.policy")
        with pytest.raises(ArtifactError):
            load_policy(path)
        assert str(caught.value).startswith("ppo.policy")
        return str(caught.value)

    gone = message(base_model_name_or_path=str(tmp_path / "gone"))
    assert f"belongs to the base model {tmp_path / 'gone'}, and there is no such folder" in gone
    assert "does not name the model" in message(base_model_name_or_path=None)
    assert "is an adapter itself" in message(base_model_name_or_path=folders["sft"])
    (tmp_path / "empty").mkdir()
    broken = message(base_model_name_or_path=str(tmp_path / "empty"))
    assert f"base of the adapter {path}" in broken
    assert "no config.json" in broken
    (path / "adapter_model.safetensors").unlink()
    assert "no weights of its adapter" in message()
    (path / "adapter_config.json").write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        base_of(path)
