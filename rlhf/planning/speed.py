"""How long it takes: floating-point operations and bytes moved, on a stated GPU at a stated efficiency.

Peaks are the makers' for dense bfloat16 on the SXM boards: NVIDIA A100 data sheet (312 TFLOP/s; 1,555 GB/s with 40 GB,
2,039 GB/s with 80 GB), H100 data sheet (989 TFLOP/s, 3,350 GB/s, 80 GB), H200 data sheet (989 TFLOP/s, 4,800 GB/s,
141 GB). `memory_gib` is what a GPU of the kind reports to torch, rounded down. In float32 the matrix units run TF32
only where it is asked for, which nothing here does: the plain units' peak counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.config import RLHFConfig
from rlhf.config.peft import uses_lora
from rlhf.config.plan import GPUName
from rlhf.planning.architecture import Architecture
from rlhf.planning.lengths import Lengths, TrainedStage, lengths_of
from rlhf.planning.memory import Setting
from rlhf.planning.sources import Sources
from rlhf.planning.stages import kv_cache_bytes, rows_of_rollout

_FORWARD = 1


@dataclass(frozen=True)
class GPU:
    """Peaks in FLOP/s and bytes/s."""

    memory_gib: float
    bfloat16_flops: float
    float32_flops: float
    bandwidth: float


GPUS: dict[GPUName, GPU] = {
    "a100-40gb": GPU(39.0, 312e12, 19.5e12, 1.555e12),
    "a100-80gb": GPU(79.0, 312e12, 19.5e12, 2.039e12),
    "h100": GPU(79.0, 989e12, 67e12, 3.35e12),
    "h200": GPU(139.0, 989e12, 67e12, 4.8e12),
}


@dataclass(frozen=True)
class Work:
    """One optimiser step (SFT, reward model) or one update (PPO), over all ranks.

    `flops` of all ranks together; `seconds` is None for the CPU, of which no peak is stated. `steps` is how many there
    are, None where the data decides.
    """

    tokens: float
    flops: float
    seconds: float | None
    rollout_seconds: float | None
    steps: int | None


def forward_flops(architecture: Architecture, rows: float, lengths: Lengths, *, head_tokens: float) -> float:
    """Multiplications and additions of one forward pass: 2 a weight and token, and the attention's products.

    Kaplan et al. 2020 (arXiv 2001.08361), section 2.1, with the causal half of the attention. An encoder-decoder model
    is counted as if each token went through half of the blocks; of a mixture of experts, those that a token chooses.
    """
    tokens = rows * lengths.whole
    blocks = architecture.active_layers / (2 if architecture.encoder_decoder else 1)
    width = architecture.num_heads * architecture.head_size
    attention = 4 * architecture.num_layers * width * lengths.whole / 2
    return tokens * (2 * blocks + attention) + head_tokens * 2 * architecture.head_products()


def stage_work(stage: TrainedStage, config: RLHFConfig, sources: Sources, setting: Setting) -> Work:
    """Work and time of one step or update of the stage, without communication and without loading."""
    if stage == "ppo":
        return _ppo_work(config, sources, setting)
    section = config.sft if stage == "sft" else config.reward_model
    architecture = (sources.base if stage == "sft" else sources.reward_base).architecture
    lengths = lengths_of(config, stage, architecture)
    rows = section.batch_size * (1 if stage == "sft" else config.reward_model.loss.num_responses)
    tokens = rows * lengths.whole
    flops = _passes(stage, config) * forward_flops(
        architecture, rows, lengths, head_tokens=tokens if stage == "sft" else 0
    )
    members = 1 if stage == "sft" else config.reward_model.num_members
    steps = None if section.max_steps is None else members * section.max_steps
    return Work(tokens, flops, _seconds(flops, config, setting), None, steps)


def _passes(stage: TrainedStage, config: RLHFConfig) -> int:
    """What a training pass takes, in forward passes.

    A backward pass has two products for each one of the forward pass, for the inputs and for the weights, which are
    frozen under adapters; recomputation is a forward pass more.
    """
    backward = 1 if uses_lora(config, stage) else 2
    return _FORWARD + backward + (_FORWARD if getattr(config, stage).gradient_checkpointing else 0)


def _ppo_work(config: RLHFConfig, sources: Sources, setting: Setting) -> Work:
    section, policy = config.ppo, sources.policy.architecture
    lengths = lengths_of(config, "ppo", policy)
    rows, responses = section.batch_size, section.batch_size * lengths.response
    of_policy = forward_flops(policy, rows, lengths, head_tokens=responses)
    scored = 2 * of_policy  # the policy's and the reference's log-probs
    trained = of_policy
    for source in sources.rewards:
        scored += forward_flops(source.architecture, rows, lengths, head_tokens=0)
    if sources.critic is not None:
        of_critic = forward_flops(sources.critic.architecture, rows, lengths, head_tokens=0)
        scored, trained = scored + of_critic, trained + of_critic
    updating = _passes("ppo", config) * section.num_epochs * trained
    sampling = of_policy
    flops = sampling + scored + updating
    computing = _seconds(scored + updating, config, setting)
    rollout = _rollout_seconds(config, policy, lengths, setting)
    seconds = None if computing is None or rollout is None else computing + rollout
    return Work(rows * lengths.whole, flops, seconds, rollout, section.num_updates)


def _rollout_seconds(config: RLHFConfig, policy: Architecture, lengths: Lengths, setting: Setting) -> float | None:
    """Sampling: every token reads all weights and, on average, half of the cache; or computes, if that takes longer."""
    if setting.device == "cpu":
        return None
    gpu, share = GPUS[config.plan.gpu], config.plan.efficiency
    per_rank = -(-config.ppo.batch_size // setting.num_ranks)
    rows = min(rows_of_rollout(config.ppo, setting), per_rank)
    batches = -(-per_rank // rows)
    prompt = Lengths(lengths.prompt, 0)
    prefill = forward_flops(policy, rows, prompt, head_tokens=rows) / (_peak(config, setting) * share)
    weights = (policy.layers + policy.head_products()) * setting.runtime_width
    cache = kv_cache_bytes(policy, rows, lengths, setting) * (lengths.prompt + lengths.response / 2) / lengths.whole
    computed = rows * 2 * (policy.active_layers + policy.head_products()) / _peak(config, setting)
    token = max((weights + cache) / gpu.bandwidth, computed) / share
    return batches * (prefill + lengths.response * token)


def _peak(config: RLHFConfig, setting: Setting) -> float:
    gpu = GPUS[config.plan.gpu]
    return gpu.bfloat16_flops if setting.bfloat16 else gpu.float32_flops


def _seconds(flops: float, config: RLHFConfig, setting: Setting) -> float | None:
    if setting.device == "cpu":
        return None
    return flops / (setting.num_ranks * _peak(config, setting) * config.plan.efficiency)
