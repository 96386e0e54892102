"""What a plan is made of: parameter counts from config.json alone, and the arithmetic of ZeRO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import TaskType
from torch import nn

from rlhf.config import RLHFConfig
from rlhf.config.model import ModelConfig, ScratchConfig
from rlhf.config.peft import LoRAConfig
from rlhf.config.zero import ZeroConfig
from rlhf.errors import ConfigError
from rlhf.models.adapters import add_adapter
from rlhf.models.scratch import build_from_scratch
from rlhf.planning.activations import PassShape, count_activations
from rlhf.planning.architecture import Architecture, lora_parameters, read_architecture, scratch_architecture
from rlhf.planning.lengths import Lengths
from rlhf.planning.memory import Module, Setting, communication, training_states
from rlhf.planning.sources import find_sources
from rlhf.planning.speed import forward_flops
from rlhf.planning.stages import kv_cache_bytes, stage_phases
from rlhf.planning.table import SHAPES

# Meta's Llama-3-8B, from its model card and config.json.
LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def write_llama(folder: Path) -> Path:
    """A model folder that holds a config.json and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_3_8B))
    return folder


def scratch(architecture: Any = "llama", **sizes: Any) -> Architecture:
    return scratch_architecture(ModelConfig(scratch=ScratchConfig(architecture=architecture, **sizes)))


def test_llama_3_8b_is_counted_exactly(tmp_path: Path) -> None:
    found = read_architecture(str(write_llama(tmp_path)), ModelConfig(), "model.path")
    # 128,256 × 4,096, twice; a layer: two of 4096², two of 4096 × 1024, three of 4096 × 14336, two norms.
    assert found.embedding == found.head == 525_336_576
    assert found.layers == 32 * (2 * 16_777_216 + 2 * 4_194_304 + 3 * 58_720_256 + 2 * 4096) == 6_979_584_000
    assert found.total == 8_030_261_248
    assert (found.num_layers, found.num_heads, found.num_kv_heads, found.head_size) == (32, 32, 8, 128)
    assert not found.tied
    # The reward model: no head of 128,256 rows, one of a single row.
    assert found.scalar_total == 8_030_261_248 - 525_336_576 + 4096


@pytest.mark.parametrize(("name", "total"), [("7b", 6_738_415_616), ("13b", 13_015_864_320), ("70b", 68_976_648_192)])
def test_llama_2_is_counted_exactly(name: str, total: int) -> None:
    assert read_architecture(str(SHAPES / f"llama-2-{name}"), ModelConfig(), "model.path").total == total


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "qwen3", "gemma2", "mistral", "t5"])
def test_counts_are_those_of_a_real_model(architecture: Any) -> None:
    config = ScratchConfig(architecture=architecture, hidden_size=32, num_heads=4, vocab_size=300, num_layers=3)
    model, _ = build_from_scratch(config, ["a few words of text"], 1)
    found = scratch_architecture(ModelConfig(scratch=config))
    assert found.total == sum(parameter.numel() for parameter in model.parameters())
    # What is in the file and outside the blocks: embeddings, positions, last norms, the head.
    blocks = [part for name, part in model.named_parameters() if any(piece.isdigit() for piece in name.split("."))]
    assert found.layers == sum(part.numel() for part in blocks)
    assert found.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_adapters_are_counted_as_peft_makes_them(architecture: Any) -> None:
    config = ScratchConfig(architecture=architecture, hidden_size=32, num_heads=4, vocab_size=300, num_layers=3)
    model, _ = build_from_scratch(config, ["a few words of text"], 1)
    lora = LoRAConfig(rank=4)
    adapted = add_adapter(model, "unused", lora, task=TaskType.CAUSAL_LM, seed=1, key="model.path")
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert lora_parameters(scratch_architecture(ModelConfig(scratch=config)), lora) == trained


def test_an_adapter_on_llama_by_hand() -> None:
    """Rank 4 on one layer of width 32 with a gated MLP of 96: 4 × (in + out) for each of seven matrices."""
    one = scratch(hidden_size=32, num_heads=4, vocab_size=300, num_layers=1)
    assert lora_parameters(one, LoRAConfig(rank=4)) == 4 * (4 * 64 + 3 * 128)
    with_head = lora_parameters(one, LoRAConfig(rank=4, output_head=True), with_head=True)
    assert with_head == 4 * (4 * 64 + 3 * 128) + 4 * (32 + 300)


def setting(stage: Any, ranks: int, *, bfloat16: bool = True, **zero: Any) -> Setting:
    return Setting(ranks, 8, "cuda", bfloat16, ZeroConfig(stage=stage, **zero))


@pytest.mark.parametrize(
    ("stage", "gigabytes"),
    # 7.5 billion parameters on 64 GPUs: the first table of Rajbhandari et al. 2020.
    [(1, 31.4), (2, 16.6), (3, 1.9)],
)
def test_states_are_those_of_the_zero_paper(stage: int, gigabytes: float) -> None:
    module = Module(whole=7_500_000_000, trainable=7_500_000_000, largest=10**8, multiplied=0)
    theirs = {"data_types": {"grad_accum_dtype": "bf16"}}
    states = training_states(module, setting(stage, 64, extra=theirs))
    total = states.parameters + states.gradients + states.optimizer
    assert total / 1e9 == pytest.approx(gigabytes, abs=0.05)
    # On one rank nothing is shared out: 2 + 2 + 12 bytes a parameter.
    alone = training_states(module, setting(stage, 1, extra=theirs))
    assert alone.parameters + alone.gradients + alone.optimizer == 16 * 7_500_000_000


def test_states_without_zero_and_in_float32() -> None:
    module = Module(whole=1000, trainable=1000, largest=100, multiplied=0)
    plain = training_states(module, setting(0, 4))
    assert (plain.parameters, plain.gradients, plain.master, plain.moments) == (4000, 4000, 0, 8000)
    two = training_states(module, setting(2, 4, bfloat16=False))
    assert (two.parameters, two.gradients, two.master, two.moments) == (4000, 1000, 1000, 2000)
    three = training_states(module, setting(3, 4, bfloat16=False))
    # ZeRO-3 trains float32 partitions as they are.
    assert (three.parameters, three.gradients, three.master, three.moments) == (1000, 1000, 0, 2000)


def test_adapters_have_gradients_and_moments_of_their_own_only() -> None:
    module = Module(whole=1100, trainable=100, largest=50, multiplied=0, frozen_width=2)
    states = training_states(module, setting(0, 1))
    assert (states.parameters, states.gradients, states.optimizer) == (1000 * 2 + 100 * 4, 400, 800)
    sharded = training_states(module, setting(3, 10))
    assert (sharded.parameters, sharded.gradients, sharded.optimizer) == (220, 40, 120)


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_zero_3_loads_no_model_whole(stage: Any) -> None:
    """Of Llama-2-70B's 138 GB in bfloat16 a rank of 128 has its share, with float32 masters and gradients beside."""
    config = RLHFConfig.model_validate({"model": {"path": str(SHAPES / "llama-2-70b")}})
    load = stage_phases(stage, config, find_sources(config), setting(3, 128))[0]
    assert load.name == "load"
    assert load.device < 7e9


def test_offload_moves_the_optimiser_to_the_host() -> None:
    module = Module(whole=1000, trainable=1000, largest=100, multiplied=0)
    states = training_states(module, setting(3, 4, offload_optimizer=True, offload_parameters=True))
    assert (states.parameters, states.optimizer) == (0, 0)
    assert states.host_parameters == 500  # 1,000 × 2 / 4
    assert states.host_optimizer == 5000  # / 4: 4 master, 8 moments, 4 + 4 gradients


def test_buffers_follow_the_deepspeed_json() -> None:
    module = Module(whole=10**9, trainable=10**9, largest=10**8, multiplied=0)
    assert communication(module, setting(2, 4), ddp=False) == 2 * 50_000_000 * 2
    extra = {"zero_optimization": {"reduce_bucket_size": 1_000_000}}
    assert communication(module, setting(2, 4, extra=extra), ddp=False) == 2 * 1_000_000 * 2
    assert communication(module, setting(0, 4), ddp=True) == 4 * 10**9  # DDP has buckets for all gradients
    assert communication(module, setting(0, 1), ddp=True) == 0


def test_the_cache_by_hand(tmp_path: Path) -> None:
    """Llama-3-8B: 2 × 32 layers × 8 heads × 128 × 2 bytes = 128 KiB a token."""
    found = read_architecture(str(write_llama(tmp_path)), ModelConfig(), "model.path")
    assert kv_cache_bytes(found, 4, Lengths(100, 28), setting(3, 8)) == 4 * 128 * 131_072


def test_operations_by_hand() -> None:
    """One layer of 32 with an MLP of 96 and a head of 300: 2 a weight and token, and the attention's share."""
    one = scratch(hidden_size=32, num_heads=4, vocab_size=300, num_layers=1)
    weights = 4 * 32 * 32 + 3 * 32 * 96 + 2 * 32
    assert one.layers == weights
    flops = forward_flops(one, 5, Lengths(6, 4), head_tokens=20)
    assert flops == 50 * (2 * weights + 4 * 32 * 10 / 2) + 20 * 2 * 32 * 300


def kept_by_autograd(model: nn.Module, tokens: int) -> int:
    """Bytes that a real forward pass on the CPU keeps for its backward pass, weights apart."""
    seen: dict[int, torch.UntypedStorage] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in [*model.parameters(), *model.buffers()]}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return sum(storage.nbytes() for storage in seen.values())


# GPT-NeoX's kernels on the CPU keep a copy that those on the meta device do without.
@pytest.mark.parametrize(
    ("architecture", "tolerance"), [("llama", 0.02), ("gpt2", 0.02), ("qwen3", 0.02), ("gpt_neox", 0.12)]
)
def test_activations_are_those_that_autograd_keeps(architecture: Any, tolerance: float) -> None:
    """Against a real model with data on the CPU and its eager attention, per block: five blocks less three."""
    found = []
    for num_layers in (3, 5):
        config = ScratchConfig(
            architecture=architecture, hidden_size=64, num_heads=4, vocab_size=300, num_layers=num_layers
        )
        model, _ = build_from_scratch(config, ["a few words"], 1)
        model.set_attn_implementation("eager")
        found.append(kept_by_autograd(model, 32))
    shape = PassShape(num_tokens=32, num_prompt=0, bfloat16=False, autocast=False, eager=True)
    counted = count_activations(scratch_architecture(ModelConfig(scratch=config)), shape)
    assert counted.counted
    assert counted.kept_per_block == pytest.approx((found[1] - found[0]) / 2, rel=tolerance)


def test_gpt_activations_are_near_the_published_formula() -> None:
    """Korthikanti et al. 2022, equation 2, in 16 bits and with dropout: s b h (34 + 5 a s / h) bytes a layer.

    Ours is a little more: transformers' GPT-2 computes its GELU in several operations and keeps each one's input.
    """
    from transformers import GPT2Config

    from rlhf.planning.architecture import architecture_of

    tokens, hidden, heads = 256, 512, 8
    config = GPT2Config(n_embd=hidden, n_head=heads, n_layer=4, n_positions=tokens, activation_function="gelu")
    shape = PassShape(tokens, 0, bfloat16=True, autocast=False, eager=True, dropout=True)
    counted = count_activations(architecture_of(config, "gpt2"), shape)
    published = tokens * hidden * (34 + 5 * heads * tokens / hidden)
    assert counted.kept_per_block == pytest.approx(published, rel=0.35)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not there"),
        ("", "has no config.json"),
        ("{", "cannot be loaded"),
        ('{"model_type": "llama", "hidden_size": 100, "num_attention_heads": 0}', "no language model can be built"),
    ],
)
def test_a_folder_that_cannot_be_planned(tmp_path: Path, content: str | None, message: str) -> None:
    folder = tmp_path / "model"
    if content is not None:
        folder.mkdir()
    if content:
        (folder / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_architecture(str(folder), ModelConfig(), "model.path")
