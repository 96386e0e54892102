"""The phases of each training stage, from its config and the models that it will hold (`rlhf.stages` does the work)."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.config import RLHFConfig
from rlhf.config.peft import LoRAConfig, lora_of
from rlhf.config.ppo import PPOConfig
from rlhf.config.training import TrainingConfig
from rlhf.planning.activations import PassShape, count_activations
from rlhf.planning.architecture import Architecture, lora_parameters
from rlhf.planning.lengths import Lengths, TrainedStage, lengths_of
from rlhf.planning.memory import Module, Setting, weight_copies
from rlhf.planning.phases import (
    Loaded,
    Pass,
    Phase,
    Training,
    load_phase,
    on_one_memory,
    resting,
    save_phase,
    scored_logits,
    softmax_blocks,
    trainer_logits,
    update_phase,
    worst,
)
from rlhf.planning.sources import Source, Sources

# Bytes a token of the vocabulary while one is drawn: float32 logits, their exponentials, a float64 running sum.
_DRAWING = 16


def stage_phases(stage: TrainedStage, config: RLHFConfig, sources: Sources, setting: Setting) -> list[Phase]:
    """The stage's phases in order. Raises `ConfigError` for adapters that do not fit the model."""
    phases = {"sft": _sft, "reward_model": _reward_model, "ppo": _ppo}[stage](config, sources, setting)
    return [on_one_memory(phase, setting) for phase in phases]


def rows_of_training(section: TrainingConfig, setting: Setting) -> tuple[int, int]:
    """Examples of a forward pass on a rank, and forward passes of an optimiser step."""
    rows = max(1, section.batch_size // setting.num_ranks)
    micro = min(section.micro_batch_size or rows, rows)
    return micro, -(-rows // micro)


def rows_of_update(section: PPOConfig, setting: Setting) -> tuple[int, int]:
    """Responses of a training forward on a rank, and forwards of an optimiser step."""
    rows = max(1, section.batch_size // section.num_minibatches // setting.num_ranks)
    micro = min(section.micro_batch_size or rows, rows)
    return micro, -(-rows // micro)


def rows_of_rollout(section: PPOConfig, setting: Setting) -> int:
    """Responses sampled and scored at a time on a rank."""
    return min(section.rollout_batch_size, -(-section.batch_size // setting.num_ranks))


def _shape(
    config: RLHFConfig, architecture: Architecture, lengths: Lengths, setting: Setting, *, dropout: bool = False
) -> PassShape:
    return PassShape(
        num_tokens=lengths.response if architecture.encoder_decoder else lengths.whole,
        num_prompt=lengths.prompt if architecture.encoder_decoder else 0,
        bfloat16=setting.bfloat16 and not setting.autocast,
        autocast=setting.autocast,
        eager=config.model.attention == "eager",
        dropout=dropout,
    )


def _largest(architecture: Architecture, lora: LoRAConfig | None) -> int:
    if lora is None:
        return architecture.largest
    return lora.rank * max(architecture.hidden_size, architecture.layers // max(1, 8 * architecture.hidden_size))


def _module(architecture: Architecture, lora: LoRAConfig | None, extra: int, frozen_width: int) -> Module:
    """A network in training, whole or by adapters; `extra` are trained parameters beside the transformer's."""
    multiplied = architecture.matmul_parameters + architecture.head_products()
    if lora is None:
        whole = architecture.total + extra
        return Module(whole, whole, architecture.largest, multiplied, tied=architecture.tied)
    adapters = lora_parameters(architecture, lora) + extra
    return Module(architecture.total + adapters, adapters, _largest(architecture, lora), 0, frozen_width, tied=False)


def _loaded(source: Source, parameters: int, width: int, placed: int, *, trained: bool = True) -> Loaded:
    """`width` and `placed` are the bytes of a weight in memory, and on the device before anything is sharded."""
    stored = parameters * source.architecture.stored_bytes
    return Loaded(file=stored, memory=parameters * width, placed=parameters * placed, trained=trained)


def _head_gradient(architecture: Architecture, lora: LoRAConfig | None, setting: Setting) -> float:
    """Bytes of the gradient of the output head's weights, which are frozen under adapters."""
    return 0.0 if lora is not None else architecture.head_products() * setting.trained_width


def _sft(config: RLHFConfig, sources: Sources, setting: Setting) -> list[Phase]:
    section, architecture = config.sft, sources.base.architecture
    lora, lengths = lora_of(config, "sft"), lengths_of(config, "sft", architecture)
    micro, accumulation = rows_of_training(section, setting)
    module = _module(architecture, lora, 0, frozen_width=4)
    activations = count_activations(architecture, _shape(config, architecture, lengths, setting, dropout=True), lora)
    if architecture.encoder_decoder:
        head = scored_logits(architecture, micro, lengths.response, setting, None)
    else:
        head = trainer_logits(architecture, micro * lengths.whole, setting)
    one = Pass(
        activations,
        micro,
        architecture.num_layers,
        module.trainable,
        *head,
        _head_gradient(architecture, lora, setting),
    )
    return _trained_by_trainer(section, sources.base, architecture.total, module, one, accumulation, setting)


def _reward_model(config: RLHFConfig, sources: Sources, setting: Setting) -> list[Phase]:
    section, architecture = config.reward_model, sources.reward_base.architecture
    lora, lengths = lora_of(config, "reward_model"), lengths_of(config, "reward_model", architecture)
    micro, accumulation = rows_of_training(section, setting)
    module = _scalar_module(architecture, lora, frozen_width=4)
    activations = count_activations(architecture, _shape(config, architecture, lengths, setting), lora)
    one = Pass(activations, section.loss.num_responses * micro, architecture.num_layers, module.trainable)
    return _trained_by_trainer(
        section, sources.reward_base, architecture.scalar_total, module, one, accumulation, setting
    )


def _scalar_module(architecture: Architecture, lora: LoRAConfig | None, frozen_width: int) -> Module:
    if lora is None:
        whole = architecture.scalar_total
        return Module(whole, whole, architecture.largest, architecture.matmul_parameters)
    adapters = lora_parameters(architecture, lora) + architecture.hidden_size
    whole = architecture.scalar_total - architecture.hidden_size + adapters
    return Module(whole, adapters, _largest(architecture, lora), 0, frozen_width)


def _trained_by_trainer(
    section: TrainingConfig,
    source: Source,
    loaded: int,
    module: Module,
    one: Pass,
    accumulation: int,
    setting: Setting,
) -> list[Phase]:
    """The phases of a stage that TRL's trainer trains."""
    training = Training(
        module=module,
        setting=setting,
        passes=(one,),
        checkpointing=section.gradient_checkpointing,
        accumulates=accumulation > 1,
        ddp=True,
        multiplied=module.multiplied,
    )
    # ZeRO-3 places and shares out one parameter at a time: nothing is whole on a device.
    placed = 0 if setting.stage == 3 else setting.trained_width
    load = load_phase([_loaded(source, loaded, 4, placed)], module, setting)
    # Under ZeRO the weights are cloned before they are written; without it they are written as they are.
    copies = module.whole * setting.trained_width if setting.stage else 0.0
    return [load, update_phase("update", training), save_phase(training, copies=copies)]


@dataclass(frozen=True)
class _PPO:
    """What PPO's phases share."""

    config: RLHFConfig
    sources: Sources
    setting: Setting
    lora: LoRAConfig | None
    lengths: Lengths
    shape: PassShape
    policy: Architecture
    critic: Architecture | None
    module: Module
    frozen: float
    training: Training

    @property
    def section(self) -> PPOConfig:
        return self.config.ppo


def _ppo(config: RLHFConfig, sources: Sources, setting: Setting) -> list[Phase]:
    ppo = _prepare_ppo(config, sources, setting)
    phases = [_load_ppo(ppo)]
    if setting.stage == 3:
        phases.append(worst("gather", {"weights gathered": resting(ppo.training, whole=True)}))
    phases += [_rollout(ppo), _score_policy(ppo, "score with policy and reference")]
    if sources.rewards:
        phases.append(_score_rewards(ppo))
    phases.append(update_phase("update", ppo.training))
    copied = ppo.module.whole if setting.stage == 3 else 0
    saved = ppo.module.trainable if ppo.lora is not None else ppo.module.whole
    phases.append(save_phase(ppo.training, copies=(copied + max(saved, 0)) * setting.trained_width))
    return phases


def _prepare_ppo(config: RLHFConfig, sources: Sources, setting: Setting) -> _PPO:
    section, policy = config.ppo, sources.policy.architecture
    lora = lora_of(config, "ppo")
    lengths = lengths_of(config, "ppo", policy)
    critic = sources.critic.architecture if sources.critic is not None else None
    module = _trained_in_ppo(policy, critic, lora, setting)
    shape = _shape(config, policy, lengths, setting)
    if lora is not None and setting.bfloat16:
        # The base of the adapters is held in bfloat16 also without ZeRO.
        shape = PassShape(shape.num_tokens, shape.num_prompt, True, shape.autocast, shape.eager)
    micro, accumulation = rows_of_update(section, setting)
    activations = count_activations(policy, shape, lora)
    head = scored_logits(policy, micro, lengths.response, setting, section.logprob_chunk_tokens)
    own = module.trainable if critic is None else module.trainable // 2
    gradient = _head_gradient(policy, lora, setting)
    passes = [Pass(activations, micro, policy.num_layers, own, *head, gradient)]
    if critic is not None:
        of_critic = count_activations(critic, shape, lora)
        passes.append(Pass(of_critic, micro, critic.num_layers, module.trainable - own))
    frozen = _frozen(config, sources, lora, setting)
    training = Training(
        module=module,
        setting=setting,
        passes=tuple(passes) + _demonstrations(config, policy, shape, setting, accumulation),
        checkpointing=section.gradient_checkpointing,
        accumulates=accumulation > 1,
        ddp=False,
        frozen=frozen,
        multiplied=module.multiplied,
    )
    return _PPO(config, sources, setting, lora, lengths, shape, policy, critic, module, frozen, training)


def _trained_in_ppo(
    policy: Architecture, critic: Architecture | None, lora: LoRAConfig | None, setting: Setting
) -> Module:
    """Policy and critic as one module: two transformers, one with two heads, or adapters on one base."""
    if lora is not None:
        adapters = lora_parameters(policy, lora, with_head=lora.output_head)
        adapters += lora_parameters(policy, lora) if critic is not None else 0
        adapters += policy.hidden_size
        whole = policy.total + adapters
        return Module(whole, adapters, _largest(policy, lora), 0, setting.runtime_width)
    multiplied = policy.matmul_parameters + policy.head_products()
    whole, largest = policy.total + policy.hidden_size + 1, policy.largest
    if critic is not None:
        whole = policy.total + critic.scalar_total
        multiplied += critic.matmul_parameters
        largest = max(largest, critic.largest)
    return Module(whole, whole, largest, multiplied, tied=policy.tied)


def _demonstrations(
    config: RLHFConfig, policy: Architecture, shape: PassShape, setting: Setting, accumulation: int
) -> tuple[Pass, ...]:
    """The forward pass over demonstrations that are mixed in, if they are."""
    section = config.ppo
    if not section.ptx_coefficient:
        return ()
    rows = -(-section.ptx_batch_size // setting.num_ranks // accumulation) or 1
    lengths = lengths_of(config, "sft", policy)
    tokens = lengths.response if policy.encoder_decoder else lengths.whole
    prompt = lengths.prompt if policy.encoder_decoder else 0
    own = PassShape(tokens, prompt, shape.bfloat16, shape.autocast, shape.eager)
    activations = count_activations(policy, own, lora_of(config, "ppo"))
    head = scored_logits(policy, rows, lengths.response, setting, section.logprob_chunk_tokens)
    return (Pass(activations, rows, policy.num_layers, 0, *head),)


def _frozen(config: RLHFConfig, sources: Sources, lora: LoRAConfig | None, setting: Setting) -> float:
    """Bytes of the reference and of the reward models on a rank."""
    share = setting.num_ranks if setting.zero.shard_frozen else 1
    # Without ZeRO the reference keeps float32 weights, so that it rounds as the policy does.
    width = setting.runtime_width if setting.stage > 0 else 4
    reference = sources.reference.architecture.total * width / share
    rewards = 0.0
    for source in sources.rewards:
        if lora is not None and source.adapter:
            rewards += (lora_parameters(source.architecture, lora) + source.architecture.hidden_size) * 4
        else:
            rewards += source.architecture.scalar_total * setting.runtime_width / share
    if lora is not None:
        copied = config.ppo.reference_refresh_every is not None or sources.reference.adapter
        reference = lora_parameters(sources.policy.architecture, lora) * 4 if copied else 0.0
    return reference + rewards


def _load_ppo(ppo: _PPO) -> Phase:
    setting, sources, runtime = ppo.setting, ppo.sources, ppo.setting.runtime_width
    models = []
    whole = 0 if setting.stage == 3 else setting.trained_width
    frozen_whole = 0 if setting.zero.shard_frozen else 1
    if ppo.lora is not None:
        models.append(_loaded(sources.policy, ppo.policy.total, runtime, min(whole, runtime)))
    else:
        models.append(_loaded(sources.policy, ppo.policy.total, 4, whole))
        width = runtime if setting.stage > 0 else 4
        total = sources.reference.architecture.total
        models.append(_loaded(sources.reference, total, width, width * frozen_whole, trained=False))
        if ppo.critic is not None and sources.critic is not None:
            models.append(_loaded(sources.critic, ppo.critic.scalar_total, 4, whole))
    for source in sources.rewards:
        if ppo.lora is None or not source.adapter:
            placed = runtime * frozen_whole
            models.append(_loaded(source, source.architecture.scalar_total, runtime, placed, trained=False))
    return load_phase(models, ppo.module, setting, frozen=ppo.frozen)


def kv_cache_bytes(architecture: Architecture, rows: int, lengths: Lengths, setting: Setting) -> float:
    """Keys and values of all layers for whole sequences, taken at once; of an encoder-decoder model both caches."""
    # Under autocast rotated keys are float32 and values bfloat16.
    width = 3.0 if setting.autocast else setting.runtime_width
    caches = 2 * architecture.num_kv_heads * architecture.num_layers
    return caches * architecture.head_size * rows * lengths.whole * width


def _rollout(ppo: _PPO) -> Phase:
    """Sampling: the prompts at once, then token by token with the cache."""
    setting, policy = ppo.setting, ppo.policy
    rows = rows_of_rollout(ppo.section, setting)
    shape = PassShape(
        num_tokens=1 if policy.encoder_decoder else ppo.lengths.prompt,
        num_prompt=ppo.lengths.prompt if policy.encoder_decoder else 0,
        bfloat16=ppo.shape.bfloat16,
        autocast=ppo.shape.autocast,
        # On a CPU the generator takes the two matrix products.
        eager=ppo.shape.eager or setting.device == "cpu",
        gradients=False,
    )
    held = resting(ppo.training, whole=True) | {
        "KV cache": kv_cache_bytes(policy, rows, ppo.lengths, setting),
        "buffers": weight_copies(ppo.module.multiplied, ppo.setting),
    }
    drawing = rows * policy.vocab_size * (setting.runtime_width + _DRAWING)
    prefill = {"activations": rows * count_activations(policy, shape, ppo.lora).working_inference}
    return worst("rollout", {"reading the prompts": held | prefill, "drawing tokens": held | {"logits": drawing}})


def _score_policy(ppo: _PPO, name: str) -> Phase:
    """Log-probs of the responses under policy and reference, one after the other."""
    setting, policy = ppo.setting, ppo.policy
    rows = rows_of_rollout(ppo.section, setting)
    chunk = ppo.section.logprob_chunk_tokens
    logits, _ = scored_logits(policy, rows, ppo.lengths.response, setting, chunk)
    held = resting(ppo.training, whole=True) | {"buffers": weight_copies(ppo.module.multiplied, ppo.setting)}
    working = rows * count_activations(policy, ppo.shape, ppo.lora).working_inference
    exact = 0.0
    if ppo.section.exact_kl_rows:
        # Two models' logits of one response.
        entries = (ppo.lengths.response + 1) * policy.vocab_size
        exact = 2 * entries * setting.runtime_width + 2 * softmax_blocks(entries)
    return worst(
        name,
        {
            "in the blocks": held | {"activations": working},
            "at the head": held | logits.parts,
            "exact KL of one response": held | {"logits": exact},
        },
    )


def _score_rewards(ppo: _PPO) -> Phase:
    """The reward models and the critic, which have no vocabulary."""
    rows = rows_of_rollout(ppo.section, ppo.setting)
    held = resting(ppo.training, whole=True) | {"buffers": weight_copies(ppo.module.multiplied, ppo.setting)}
    networks = [source.architecture for source in ppo.sources.rewards]
    working = max(rows * count_activations(one, ppo.shape).working_inference for one in networks)
    return worst("score with rewards", {"in the blocks": held | {"activations": working}})
