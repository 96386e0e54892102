"""Counts that are easy to get wrong: gradients among activations, adapters, experts, sub-groups, unusual models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.model import ModelConfig, ScratchConfig
from rlhf.config.peft import LoRAConfig
from rlhf.config.zero import ZeroConfig
from rlhf.distributed.memory import Measured, MemoryMeter
from rlhf.errors import ConfigError
from rlhf.planning import activations
from rlhf.planning.activations import PassShape, count_activations
from rlhf.planning.architecture import Architecture, lora_parameters, read_architecture, scratch_architecture
from rlhf.planning.during_run import StageMemory
from rlhf.planning.memory import Module, Setting, reduction_copies, standing_gradients, step_memory, training_states

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
HALF = PassShape(num_tokens=16, num_prompt=0, bfloat16=True, autocast=False, eager=False)


def written(folder: Path, **content: Any) -> Architecture:
    """The architecture of a folder with this config.json."""
    (folder / "config.json").write_text(json.dumps({"vocab_size": 300, **content}))
    return read_architecture(str(folder), ModelConfig(), "model.path")


def tiny() -> Architecture:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_heads": 4, "vocab_size": 4000, "num_layers": 3}
    return scratch_architecture(ModelConfig(scratch=ScratchConfig(architecture="llama", **sizes)))


@pytest.mark.parametrize("autocast", [False, True])
def test_no_gradient_of_a_weight_is_an_activation(monkeypatch: pytest.MonkeyPatch, autocast: bool) -> None:
    """Those grow with the rows, so two rows and sixteen give the same for one; a gradient does not grow."""
    shape = PassShape(16, 0, bfloat16=False, autocast=autocast, eager=False)
    two = count_activations(tiny(), shape)
    monkeypatch.setattr(activations, "_ROWS", 16)
    assert count_activations(tiny(), shape).working_training == pytest.approx(two.working_training)


def test_adapters_compute_in_the_precision_of_their_base() -> None:
    """In bfloat16 what adapters keep of each layer is half of what they keep in float32, not as much."""
    extra = []
    for shape in (HALF, PassShape(16, 0, bfloat16=False, autocast=False, eager=False)):
        extra.append(count_activations(tiny(), shape, LoRAConfig(rank=4)).kept_per_block)
    assert extra[0] < 0.6 * extra[1]


def test_values_may_be_narrower_than_queries(tmp_path: Path) -> None:
    found = written(
        tmp_path,
        model_type="deepseek_v3",
        **SIZES,
        n_routed_experts=4,
        moe_intermediate_size=8,
        n_group=1,
        topk_group=1,
    )
    assert count_activations(found, HALF).counted


def test_what_cannot_be_counted_is_marked_and_on_the_safe_side(tmp_path: Path) -> None:
    """Falcon has its own list of attention kernels, which does not take the stand-in."""
    found = written(tmp_path, model_type="falcon", **SIZES)
    assert not count_activations(found, HALF).counted
    assert activations._estimated(tiny(), HALF).kept > count_activations(tiny(), HALF).kept


def test_a_token_goes_through_the_experts_that_it_chooses(tmp_path: Path) -> None:
    found = written(tmp_path, model_type="mixtral", **SIZES, num_local_experts=8, num_experts_per_tok=2)
    experts = 3 * 8 * 3 * 64 * 128  # layers, experts, matrices
    assert found.layers - found.active_layers == experts * 6 / 8


def test_of_text_and_images_only_the_text_counts(tmp_path: Path) -> None:
    text = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 2}
    found = written(tmp_path, model_type="gemma3", text_config=text, vision_config=vision)
    assert found.num_layers == 3
    assert count_activations(found, HALF).kept_per_block > 16 * 64 * 2


def test_models_that_cannot_be_planned_are_mistakes_of_the_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mamba.*cannot be planned"):
        written(tmp_path, model_type="mamba", hidden_size=64, num_hidden_layers=2)
    odd = written(tmp_path, model_type="llama4_text", **SIZES, num_local_experts=2, head_dim=16)
    with pytest.raises(ConfigError, match="cannot adapt Llama4ForCausalLM"):
        lora_parameters(odd, LoRAConfig(rank=4))


def setting(stage: Any, ranks: int, **zero: Any) -> Setting:
    return Setting(ranks, 8, "cuda", True, ZeroConfig(stage=stage, **zero))


def test_a_step_of_zero_3_takes_one_sub_group_at_a_time() -> None:
    module = Module(whole=70 * 10**9, trainable=70 * 10**9, largest=10**9, multiplied=0)
    assert step_memory(module, setting(3, 8)) == (10**9 * (4 + 4), 0.0)
    extra = {"zero_optimization": {"sub_group_size": 10**8}}
    assert step_memory(module, setting(3, 8, extra=extra)) == (10**8 * (4 + 4), 0.0)


def test_gradients_wait_in_float32() -> None:
    """4 bytes; ZeRO-1 in bfloat16 has them for all parameters on every rank, beside those of the backward pass."""
    module = Module(whole=1000, trainable=1000, largest=100, multiplied=0)
    assert [training_states(module, setting(stage, 4)).gradients for stage in (1, 2, 3)] == [6000, 1000, 1000]
    assert [standing_gradients(module, setting(stage, 4)) for stage in (1, 2, 3)] == [4000, 0, 1000]
    assert reduction_copies(module, setting(1, 4)) == 6000
    assert step_memory(module, setting(2, 4)) == (1000, 0.0)  # in place: one temporary tensor of Adam's


def test_a_model_too_small_to_judge_by_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    for predicted, said in ((85, True), (300, False)):
        meter = MemoryMeter.start(torch.device("cpu"))
        StageMemory("sft", predicted * 2**20, meter, 45 * 2**20).summary([Measured(60 * 2**20, 50 * 2**20)])
        assert ("(a model so small says little: 45 MiB of it are for libraries)" in capsys.readouterr().out) is said
