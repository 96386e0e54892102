"""Loading from scratch and from folders: seeds, errors a user can act on, dropout, saved files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from rlhf.config.model import ModelConfig, ScratchConfig
from rlhf.errors import ArtifactError, ConfigError, UserError
from rlhf.models import (
    ScalarModel,
    build_from_scratch,
    check_vocabulary,
    disable_dropout,
    ensure_distinct_pad,
    load_policy,
    load_tokenizer,
    save_model,
)

TEXTS = ["the film was good", "a film that was not good at all", "what a film this was"] * 10
ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "qwen3", "gemma2", "mistral")


def scratch(architecture: str = "llama", seed: int = 1, **changes: Any) -> tuple[PreTrainedModel, Any]:
    fields = {"architecture": architecture, "hidden_size": 32, "vocab_size": 270, "max_positions": 48} | changes
    return build_from_scratch(ScratchConfig.model_validate(fields), TEXTS, seed)


@pytest.fixture(scope="module")
def folder_of_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "policy"
    model, tokenizer = scratch()
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture
def folder(folder_of_module: Path, tmp_path: Path) -> Path:
    """A model folder that the test may damage."""
    return Path(shutil.copytree(folder_of_module, tmp_path / "policy"))


def message_of(path: Path, kind: type[UserError], config: ModelConfig | None = None) -> str:
    with pytest.raises(kind) as caught:
        load_policy(path, config, key="sft.base")
    assert "sft.base" in str(caught.value) or "model.attention" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scratch_models_follow_from_their_seed_alone(architecture: str) -> None:
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    first, first_tokenizer = scratch(architecture, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(12)
    second, second_tokenizer = scratch(architecture, seed=1)
    other, _ = scratch(architecture, seed=2)
    for (name, left), right in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
    assert any(
        not torch.equal(left, right)
        for left, right in zip(first.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert first_tokenizer.get_vocab() == second_tokenizer.get_vocab()
    assert first_tokenizer.backend_tokenizer.to_str() == second_tokenizer.backend_tokenizer.to_str()
    assert first.config.vocab_size == 270
    assert first.config.max_position_embeddings == 48
    assert next(first.parameters()).dtype == torch.float32
    check_vocabulary(first, first_tokenizer, "scratch")


def test_scratch_tokenizer() -> None:
    model, tokenizer = scratch()
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert len(set(special)) == 3
    assert [model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id] == special
    text = "a new Füm 映画, was\ngood!"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert not set(ids[1:]) & set(special)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    chat = [{"role": "user", "content": "good?"}, {"role": "assistant", "content": "yes"}]
    whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert whole[: len(prompt)] == prompt
    assert whole.count(tokenizer.bos_token_id) == 1
    assert whole.count(tokenizer.eos_token_id) == 1


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"hidden_size \(30\) must be a multiple of model\.scratch\.num_heads \(4\)"):
        scratch(hidden_size=30)
    with pytest.raises(ConfigError, match="must be even for llama"):
        scratch(hidden_size=12)
    scratch("gpt2", hidden_size=12)


def test_saving_keeps_everything_and_forgets_where_it_came_from(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_policy(folder), load_tokenizer(folder)
    assert not model.training
    save_model(model, tokenizer, tmp_path / "again")
    assert model.config._name_or_path == str(folder)
    for file in (tmp_path / "again").iterdir():
        if file.suffix == ".json":
            assert str(tmp_path) not in file.read_text(), file.name
    assert load_file(folder / "model.safetensors").keys() == load_file(tmp_path / "again/model.safetensors").keys()
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "generation_config.json").exists()
    reread = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert reread.get_vocab() == tokenizer.get_vocab()
    assert reread.chat_template == tokenizer.chat_template
    assert [reread.pad_token, reread.bos_token, reread.eos_token] == ["<|pad|>", "<|bos|>", "<|eos|>"]


def test_saving_a_gathered_state_dict(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_policy(folder), load_tokenizer(folder)
    doubled = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    save_model(model, tokenizer, tmp_path / "doubled", doubled)
    plain = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(tmp_path / "doubled"))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, doubled[name]), name


def test_dtype_and_attention(folder: Path) -> None:
    model = load_policy(folder, ModelConfig(attention="eager"), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert load_policy(folder, ModelConfig()).config._attn_implementation == "sdpa"


def test_attention_that_would_be_wrong_is_refused(tmp_path: Path) -> None:
    model, tokenizer = scratch("gemma2")
    save_model(model, tokenizer, tmp_path / "gemma2")
    assert "cannot cap attention logits" in message_of(tmp_path / "gemma2", ConfigError, ModelConfig(attention="sdpa"))


def test_damaged_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "cut off or damaged" in message_of(folder, ArtifactError)
    weights.write_bytes(b"")
    assert "cut off or damaged" in message_of(folder, ArtifactError)


def test_weights_that_are_missing_or_of_another_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(
        {key: value for key, value in weights.items() if key != name}, folder / "model.safetensors", {"format": "pt"}
    )
    assert name in message_of(folder, ArtifactError)
    save_file(weights | {name: weights[name][:, :-2].contiguous()}, folder / "model.safetensors", {"format": "pt"})
    assert "do not fit its config.json" in message_of(folder, ArtifactError)


def test_another_kind_of_model(folder: Path) -> None:
    reward = ScalarModel.from_policy(folder, seed=0)
    reward.save(folder, ensure_distinct_pad(load_tokenizer(folder), reward.model))
    assert "LlamaForSequenceClassification, which scores text" in message_of(folder, ArtifactError)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"model_type": "no_such_model"}))
    assert "no_such_model" in message_of(folder, ArtifactError)


def test_hub_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"model\.path: nobody/no-such-model .*local folder"):
        load_policy("nobody/no-such-model")
    with pytest.raises(ConfigError, match=r"model\.path: nobody/no-such-model .*local folder"):
        load_tokenizer("nobody/no-such-model")


def test_tokenizer_without_eos(folder: Path) -> None:
    tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(folder))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"no EOS token(.|\n)*save_pretrained"):
        load_tokenizer(folder)


def test_tokenizer_with_more_ids_than_the_model(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<new>"])
    model = load_policy(folder)
    assert model.config.vocab_size == 270
    while len(tokenizer) <= 270:
        tokenizer.add_tokens([f"<new{len(tokenizer)}>"])
    with pytest.raises(ArtifactError, match="embeddings for 270 ids only"):
        check_vocabulary(model, tokenizer, folder)


def test_chat_template_from_the_config(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    for given in ("{{ messages }}", str(tmp_path / "template.jinja")):
        assert load_tokenizer(folder, ModelConfig(chat_template=given)).chat_template == "{{ messages }}"
    with pytest.raises(ConfigError, match=r"model\.chat_template"):
        load_tokenizer(folder, ModelConfig(chat_template="nowhere.jinja"))


def test_an_unusual_generation_config_can_be_saved_again(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(content | {"do_sample": False, "temperature": 0.6}))
    save_model(load_policy(folder), load_tokenizer(folder), tmp_path / "again")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_disabled_dropout_makes_training_mode_deterministic(architecture: str) -> None:
    model, _ = scratch(architecture)
    config = model.config
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.5)
    torch.manual_seed(0)
    dropping = cast(PreTrainedModel, cast(Any, AutoModelForCausalLM).from_config(config, attn_implementation="eager"))
    dropping.train()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert not torch.equal(dropping(input_ids=ids).logits, dropping(input_ids=ids).logits)
        disable_dropout(dropping)
        first = dropping(input_ids=ids).logits
        assert torch.equal(first, dropping(input_ids=ids).logits)
        dropping.gradient_checkpointing_enable()
        assert torch.equal(first, dropping(input_ids=ids, use_cache=False).logits)
    assert not any("drop" in name and value for name, value in vars(dropping.config).items())
