"""A stage as phases with the memory of each: what is alive at its worst moment, by what it is for.

A phase has several moments (the end of the forward pass, the head's backward pass, the last block's, the optimiser's
step); the one that takes most is kept. Bytes of a rank; `host` is CPU memory besides the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from rlhf.planning.activations import Activations
from rlhf.planning.architecture import Architecture
from rlhf.planning.memory import (
    Module,
    Setting,
    communication,
    live_parameters,
    reduction_copies,
    standing_gradients,
    step_memory,
    training_states,
    weight_copies,
    whole_parameters,
)

# The softmax of logits runs over blocks of at most this many float32 entries (`rlhf.ops.logprobs`), a few at a time.
_BLOCK_ENTRIES = 2**22
_BLOCKS = 4
# TRL's loss over the head: tiles of tokens times vocabulary; without Triton seven float32 tensors of a tile and a mask.
_TILE_TOKENS, _TILE_VOCABULARY, _TILE_COPIES = 4096, 32768, 7.25
# What a CPU rank grows by even with a model of next to nothing: code and tables that libraries load on first use,
# without and with DeepSpeed. Measured with `nothing` and `nothing zero3` of tests/distributed/plan_worker.py.
_LIBRARIES_BYTES, _DEEPSPEED_BYTES = 45 * 2**20, 90 * 2**20
# Components that glibc serves from its heap, from which little goes back, and the largest block that it does so.
_SMALL_BLOCKS = ("activations", "log-probs", "KV cache")
_LARGEST_SMALL_BLOCK = 32 * 2**20
# Share of what a forward pass allocates and frees again that stays with the process as holes. Fitted to measurements.
_HOLES = 1 / 3
COMPONENTS = (
    "parameters",
    "frozen models",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "log-probs",
    "KV cache",
    "buffers",
)


@dataclass(frozen=True)
class Phase:
    """One phase of a stage. `parts` are bytes on the device by component, at the phase's worst moment, `moment`.

    `estimated`: its activations could not be counted.
    """

    name: str
    parts: dict[str, float]
    host: float = 0.0
    moment: str = ""
    moments: dict[str, dict[str, float]] = field(default_factory=dict)
    estimated: bool = False

    @property
    def device(self) -> float:
        """All parts together."""
        return sum(self.parts.values())


def worst(name: str, moments: dict[str, dict[str, float]], host: float = 0.0) -> Phase:
    """The phase at the moment that takes most."""
    moment = max(moments, key=lambda key: sum(moments[key].values()))
    return Phase(name, {part: value for part, value in moments[moment].items() if value}, host, moment, moments)


def peak_of(phases: list[Phase], setting: Setting) -> float:
    """The most that a rank needs in any phase, in bytes; on the CPU above the imported libraries.

    On a GPU torch's allocator hands memory back, so it is the worst moment. On the CPU it is glibc's, which keeps what
    it has given out in blocks of up to 32 MiB: activations and caches stay with the process at their largest, whatever
    else there is at another moment. To that come the libraries' own parts that are loaded on first use.
    """
    worst_moment = max(phase.device for phase in phases)
    if setting.device == "cuda":
        return worst_moment
    moments = [parts for phase in phases for parts in (phase.moments.values() or [phase.parts])]
    kept = max(sum(parts.get(name, 0.0) for name in _SMALL_BLOCKS) for parts in moments)
    rest = max(sum(value for name, value in parts.items() if name not in _SMALL_BLOCKS) for parts in moments)
    return max(worst_moment, kept + rest) + libraries_bytes(setting)


def libraries_bytes(setting: Setting) -> float:
    """What libraries load on first use, in bytes; counted on the CPU only."""
    return _DEEPSPEED_BYTES if setting.stage else _LIBRARIES_BYTES


class Head(NamedTuple):
    """Bytes of logits, and of what log-probs take besides or, on the CPU, in blocks that its allocator keeps."""

    logits: float = 0.0
    working: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """As components of a phase."""
        return {"logits": self.logits, "log-probs": self.working}

    def __add__(self, other: Head) -> Head:  # type: ignore[override]
        return Head(self.logits + other.logits, self.working + other.working)


NO_HEAD = Head()


@dataclass(frozen=True)
class Pass:
    """The training forward pass of one network: its activations for `rows`, and its head's memory (forward, backward).

    `weights` are the network's trained parameters, `head_gradient` the bytes of the gradient of its output head.
    """

    activations: Activations
    rows: int
    num_layers: int
    weights: int
    head_forward: Head = NO_HEAD
    head_backward: Head = NO_HEAD
    head_gradient: float = 0.0


@dataclass(frozen=True)
class Training:
    """What the phases of a training need to know."""

    module: Module
    setting: Setting
    passes: tuple[Pass, ...]
    checkpointing: bool
    accumulates: bool
    ddp: bool
    frozen: float = 0.0
    multiplied: int = field(default=0)


def update_phase(name: str, training: Training) -> Phase:
    """Forward, backward and optimiser step, in the state they have from the second step on."""
    module, setting = training.module, training.setting
    states = training_states(module, setting)
    standing = {
        "parameters": states.parameters + live_parameters(module, setting),
        "frozen models": training.frozen,
        "optimizer": states.optimizer,
        "buffers": communication(module, setting, ddp=training.ddp) + weight_copies(training.multiplied, setting),
    }
    before = states.gradients if training.accumulates else standing_gradients(module, setting)
    kept = [
        one.activations.training(one.rows, checkpointing=training.checkpointing, num_layers=one.num_layers)
        + _holes(one, setting)
        for one in training.passes
    ]
    moments: dict[str, dict[str, float]] = {}
    # 1. All networks have run forwards; 2. the backward pass takes them in the opposite order.
    moments["end of the forward pass"] = standing | {
        "gradients": before,
        "activations": sum(kept),
        **sum((one.head_forward for one in training.passes), start=NO_HEAD).parts,
    }
    done = 0.0
    share = module.trainable and states.gradients / module.trainable
    for number in reversed(range(len(training.passes))):
        one = training.passes[number]
        gradients = max(before, share * done) if not training.accumulates else before
        working = one.rows * one.activations.working_training
        rest = sum((other.head_forward for other in training.passes[:number]), start=NO_HEAD)
        moments[f"backward pass of the head {number + 1}"] = standing | {
            "gradients": gradients + one.head_gradient,
            "activations": sum(kept[: number + 1]),
            **(rest + one.head_backward).parts,
        }
        moments[f"backward pass of the last block {number + 1}"] = standing | {
            "gradients": gradients,
            "activations": sum(kept[: number + 1]) + working,
            **rest.parts,
        }
        done += one.weights
    # 3. All gradients are there, and the last one comes whole on top where it has two parts or what stays is a share.
    doubled = module.tied or training.accumulates or setting.stage >= 2
    twice = module.largest * setting.trained_width if doubled else 0.0
    first = training.passes[0]
    moments["end of the backward pass"] = standing | {
        "gradients": states.gradients + twice,
        "activations": first.rows * (first.activations.kept_per_block + first.activations.working_training),
        "buffers": standing["buffers"] + reduction_copies(module, setting),
    }
    step, host_step = step_memory(module, setting)
    moments["optimiser step"] = standing | {
        "parameters": states.parameters,
        "gradients": states.gradients,
        "buffers": communication(module, setting, ddp=training.ddp) + step,
    }
    phase = worst(name, moments, states.host_parameters + states.host_optimizer + host_step)
    return replace(phase, estimated=not all(one.activations.counted for one in training.passes))


def _holes(one: Pass, setting: Setting) -> float:
    """Bytes between activations that a CPU's heap has no other use for: a share of what passed through it."""
    small = one.rows * one.activations.block_input <= _LARGEST_SMALL_BLOCK
    return _HOLES * one.rows * one.activations.passing if setting.device == "cpu" and small else 0.0


def resting(training: Training, *, whole: bool) -> dict[str, float]:
    """What is there between the steps; `whole`: ZeRO-3 has gathered the module."""
    module, setting = training.module, training.setting
    states = training_states(module, setting)
    return {
        "parameters": states.parameters + (whole_parameters(module, setting) if whole else 0.0),
        "frozen models": training.frozen,
        "gradients": standing_gradients(module, setting),
        "optimizer": states.optimizer,
    }


def host_states(training: Training) -> float:
    """CPU memory that offload takes all the time."""
    states = training_states(training.module, training.setting)
    return states.host_parameters + states.host_optimizer


def save_phase(training: Training, *, copies: float) -> Phase:
    """Publishing: rank 0 has the weights as copies in CPU memory, of `copies` bytes."""
    return worst("save", {"weights copied": resting(training, whole=False)}, host_states(training) + copies)


@dataclass(frozen=True)
class Loaded:
    """A model on its way into memory: bytes in the file, in memory, and on the device once it is placed whole.

    Models in training (`trained`) are placed after the frozen ones, together.
    """

    file: float
    memory: float
    placed: float
    trained: bool


def load_phase(models: list[Loaded], module: Module, setting: Setting, *, frozen: float = 0.0) -> Phase:
    """Loading one model after the other, then placing and sharding the trained module.

    A model is copied out of its mapped file, so that both are in memory for a moment. What of a model is on the device
    before it is sharded its `placed` says; `frozen` is what the frozen ones come to afterwards. At stage 3 the trained
    module is moved and sharded parameter by parameter.
    """
    held = reading = 0.0
    for model in models:
        reading = max(reading, held + model.file + model.memory)
        # On a GPU the frozen ones leave the host as soon as they are placed.
        held += model.memory if setting.device == "cpu" or model.trained else 0.0
    states = training_states(module, setting)
    width = setting.trained_width
    whole = sum(model.placed for model in models if model.trained)
    flat = module.whole * width + module.trainable * width if setting.stage in (1, 2) else 0.0
    sharded = module.largest * width + states.parameters + states.master + standing_gradients(module, setting)
    trained = max(whole, flat, sharded if setting.stage == 3 else 0.0)
    placed = sum(model.placed for model in models if not model.trained)
    moments = {
        "placing the frozen models": {"frozen models": placed},
        "placing the trained module": {"frozen models": frozen, "parameters": trained},
    }
    if setting.device == "cpu":
        moments["reading"] = {"parameters": reading}
        return worst("load", moments)
    return worst("load", moments, reading)


def on_one_memory(phase: Phase, setting: Setting) -> Phase:
    """On the CPU what would be offloaded or copied to the host lies in the same memory."""
    if setting.device == "cuda" or not phase.host:
        return phase

    def together(parts: dict[str, float]) -> dict[str, float]:
        return {**parts, "buffers": parts.get("buffers", 0.0) + phase.host}

    moments = {name: together(parts) for name, parts in phase.moments.items()}
    return replace(phase, parts=together(phase.parts), host=0.0, moments=moments)


def softmax_blocks(entries: float) -> float:
    """Float32 working memory of log-probs over logits of so many entries."""
    return _BLOCKS * min(entries, _BLOCK_ENTRIES) * 4


def _head(logits: float, working: float, block: float, setting: Setting) -> Head:
    """`block` is the size of one tensor of `logits`: on the CPU small ones are the heap's."""
    small = setting.device == "cpu" and block <= _LARGEST_SMALL_BLOCK
    return Head(0.0, logits + working) if small else Head(logits, working)


def scored_logits(
    architecture: Architecture, rows: int, num_response: int, setting: Setting, chunk: int | None
) -> tuple[Head, Head]:
    """Logits of `rows` responses in PPO: after the forward pass, and at most in the backward pass."""
    positions = rows * (num_response if architecture.encoder_decoder else num_response + 1)
    chunked = chunk is not None and chunk < rows * num_response
    entries = (chunk if chunked and chunk is not None else positions) * architecture.vocab_size
    block, working = entries * setting.runtime_width, softmax_blocks(entries)
    # Nothing of a piece outlives it: the backward pass makes it anew and writes its gradient over it.
    forward = _head(block, working, block, setting)
    return forward, _head(2 * block, working, block, setting)


def trainer_logits(architecture: Architecture, tokens: int, setting: Setting) -> tuple[Head, Head]:
    """Memory of TRL's loss, which computes the head in tiles: forwards and backwards."""
    # The head's gradient is added up in float32, and the states' too.
    sums = (architecture.head_products() if setting.runtime_width < 4 else 0) + tokens * architecture.hidden_size
    if setting.device == "cuda":
        tile = min(tokens, _TILE_TOKENS) * _TILE_VOCABULARY * setting.runtime_width
        return Head(tile), Head(tile, 4.0 * sums)
    entries = min(tokens, _TILE_TOKENS) * min(architecture.vocab_size, _TILE_VOCABULARY)
    tiles = entries * (setting.runtime_width + _TILE_COPIES * 4)
    return _head(tiles, 0.0, 4 * entries, setting), _head(tiles, 4.0 * sums, 4 * entries, setting)
