"""What a forward and backward pass keeps in memory, found by running the model's own code on the meta device.

Autograd keeps whatever the operations of an architecture ask for, so that is counted rather than estimated: the model
runs with one and with two blocks, without data, and every tensor that stays alive is added up. Differences give a
block's share. The attention kernel is stood in for by one that keeps what a fused kernel keeps.
"""

from __future__ import annotations

import functools
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf.errors import ConfigError
from rlhf.models.output_head import captured_input
from rlhf.planning.architecture import Architecture, add_empty_adapter, empty_model, experts_per_token

if TYPE_CHECKING:
    from rlhf.config.peft import LoRAConfig

_KERNEL = "rlhf_plan"
# Rows of the pass that is counted; everything is proportional to them.
_ROWS = 2


@dataclass(frozen=True)
class PassShape:
    """One forward pass: which precision, which lengths, and whether gradients flow.

    `num_prompt` is the encoder's length of an encoder-decoder model and 0 for a causal one, whose `num_tokens` are
    those of prompt and response. `autocast`: float32 weights, products in bfloat16. Without
    `gradients` only the working memory is found.
    """

    num_tokens: int
    num_prompt: int
    bfloat16: bool
    autocast: bool
    eager: bool
    dropout: bool = False
    gradients: bool = True


@dataclass(frozen=True)
class Activations:
    """Bytes that one row of a batch takes. `working` comes on top while a block is computed.

    `passing` is what the forward pass allocates and frees again. `counted` is False where all of it is an estimate, on
    the safe side.
    """

    kept: float
    kept_per_block: float
    block_input: float
    working_training: float
    working_inference: float
    passing: float
    counted: bool

    def training(self, rows: int, *, checkpointing: bool, num_layers: int) -> float:
        """What is alive when the last block's backward pass begins, working memory apart."""
        if not checkpointing:
            return rows * self.kept
        # Only the blocks' inputs are kept, and one block at a time is computed anew (Chen et al. 2016).
        outside = max(0.0, self.kept - num_layers * self.kept_per_block)
        return rows * (outside + num_layers * self.block_input + self.kept_per_block)


@functools.lru_cache(maxsize=256)
def count_activations(architecture: Architecture, shape: PassShape, lora: LoRAConfig | None = None) -> Activations:
    """The activations of a row. With `lora` the base is frozen and adapters are trained, as in the stages.

    A model that does not take the stand-in for a fused kernel is counted with its own attention, which keeps more. One
    whose code cannot run without data is estimated. In both cases `counted` is False.
    """
    for tried in (shape, replace(shape, eager=True)):
        try:
            return _counted(architecture, tried, lora, exact=tried == shape)
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, ConfigError):
            continue  # meta kernels that need values, and models' own code, raise several kinds of errors
    return _estimated(architecture, shape)


def _counted(architecture: Architecture, shape: PassShape, lora: LoRAConfig | None, *, exact: bool) -> Activations:
    two = _run(architecture, shape, lora, 2)
    one = _run(architecture, shape, lora, 1) if shape.gradients else two
    block = two.kept - one.kept
    return Activations(
        kept=(one.kept + (architecture.num_layers - 1) * block) / _ROWS,
        kept_per_block=block / _ROWS,
        block_input=_width(shape) * shape.num_tokens * architecture.hidden_size,
        working_training=two.working_training / _ROWS,
        working_inference=two.working_inference / _ROWS,
        passing=(one.passing + (architecture.num_layers - 1) * (two.passing - one.passing)) / _ROWS,
        counted=exact,
    )


@dataclass(frozen=True)
class _Counts:
    kept: int
    working_training: int
    working_inference: int
    passing: int


def _run(architecture: Architecture, shape: PassShape, lora: LoRAConfig | None, num_layers: int) -> _Counts:
    """Counts one forward and backward pass up to the output head, and one forward pass without gradients."""
    ALL_ATTENTION_FUNCTIONS.register(_KERNEL, _fused_attention)
    kernel = "eager" if shape.eager or not architecture.fused_attention else _KERNEL
    dtype = torch.bfloat16 if shape.bfloat16 else torch.float32
    model = empty_model(architecture.config, num_layers=num_layers, attention=kernel, dtype=dtype)
    if lora is not None:
        add_empty_adapter(model, lora)
        if shape.bfloat16 and not shape.autocast:
            for part in model.parameters():
                part.data = part.data.to(torch.bfloat16)  # PEFT makes adapters in float32, DeepSpeed casts them
    model.train(shape.dropout)
    arguments = _arguments(architecture, shape)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
    known = [*model.parameters(), *model.buffers(), *arguments.values()]
    with _LiveBytes(known) as live, torch.no_grad(), _precision(shape) as casts:
        hidden = _hidden_states(model, arguments)
        working_inference = live.peak - _bytes_of(casts)
        del hidden
    if not shape.gradients:
        return _Counts(0, 0, working_inference, 0)
    with _LiveBytes(known) as live:
        with _precision(shape) as casts:
            hidden = _hidden_states(model, arguments)
        for weight in [*model.parameters(), *(casts.copies.values() if casts is not None else ())]:
            if weight.requires_grad:
                weight.register_hook(live.ignore)
        kept, passing, mark = live.now, live.freed, live.mark()
        hidden.backward(torch.empty_like(hidden))  # type: ignore[no-untyped-call]
        working_training = live.most_since(mark)
    return _Counts(kept - _bytes_of(casts), working_training, working_inference, passing)


def _bytes_of(casts: _Autocast | None) -> int:
    """The copies of weights, which are counted apart: they do not grow with the batch."""
    return sum(copy.untyped_storage().nbytes() for copy in casts.copies.values()) if casts is not None else 0


def _arguments(architecture: Architecture, shape: PassShape) -> dict[str, Tensor]:
    def ids(length: int) -> Tensor:
        return torch.zeros(_ROWS, length, dtype=torch.long, device="meta")

    def mask(length: int) -> Tensor:
        return torch.ones(_ROWS, length, dtype=torch.bool, device="meta")

    if architecture.encoder_decoder:
        return {
            # Masks of an encoder are looked at for their values, which nothing on the meta device has.
            "input_ids": ids(shape.num_prompt),
            "decoder_input_ids": ids(shape.num_tokens),
        }
    return {
        "input_ids": ids(shape.num_tokens),
        "attention_mask": mask(shape.num_tokens),
        "position_ids": ids(shape.num_tokens),
    }


def _hidden_states(model: nn.Module, arguments: dict[str, Tensor]) -> Tensor:
    with captured_input(model) as inputs:
        model(**arguments, use_cache=False)
    return inputs.pop()


def _drop_gradient(parameter: Tensor) -> None:
    """Frees a gradient as soon as it is complete."""
    parameter.grad = None


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that are alive; those of `known` tensors do not count.

    Gradients of weights do not grow with the rows and are counted apart, where sharding decides how many there are.
    Which storages are theirs is known once they are complete, so `ignore` takes them out afterwards.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self.freed = 0
        self._changes: list[tuple[int, int]] = []  # number of the storage, bytes more or less
        self._numbers: dict[int, int] = {}
        self._ignored: set[int] = set()
        self._alive: dict[int, Any] = {}
        for tensor in known:
            storage = tensor.untyped_storage()
            self._alive[storage._cdata] = storage

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self.now += size
        self.peak = max(self.peak, self.now)
        number = len(self._changes)
        self._numbers[key] = number
        self._changes.append((number, size))

        def gone(_: object) -> None:
            self._alive.pop(key, None)
            self.now -= size
            self.freed += size
            self._changes.append((number, -size))

        self._alive[key] = weakref.ref(storage, gone)

    def ignore(self, tensor: Tensor) -> None:
        """Takes out a tensor, from its making on."""
        number = self._numbers.get(tensor.untyped_storage()._cdata)
        if number is not None:
            self._ignored.add(number)

    def mark(self) -> int:
        """The present moment, for `most_since`."""
        return len(self._changes)

    def most_since(self, mark: int) -> int:
        """The most bytes above those of a moment, without what is to be ignored."""
        now = peak = 0
        for number, change in self._changes[mark:]:
            if number not in self._ignored:
                now += change
                peak = max(peak, now)
        return peak


class _Autocast(TorchFunctionMode):
    """Matrix products take bfloat16 copies of their inputs, as under `torch.autocast`, which has no meta device."""

    _PRODUCTS = frozenset({nn.functional.linear, torch.matmul, Tensor.matmul, torch.bmm, torch.addmm, torch.baddbmm})

    def __init__(self) -> None:
        super().__init__()
        # Autocast keeps the copies of weights that need gradients until it ends.
        self.copies: dict[int, Tensor] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self._PRODUCTS or function is _Attention.apply:
            args = tree_map(self._lower, args)
        return function(*args, **(kwargs or {}))

    def _lower(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(torch.bfloat16)
        if id(value) not in self.copies:
            self.copies[id(value)] = value.to(torch.bfloat16)
        return self.copies[id(value)]


class _NoCasts(nullcontext[None]):
    """Stands for a pass without autocast."""


def _precision(shape: PassShape) -> Any:
    return _Autocast() if shape.autocast else _NoCasts()


class _Attention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: its inputs, its result, and a number for each row of the softmax."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        batch, _, length, _ = query.shape
        # Masks reach the kernel as numbers, one mask for all heads and each block its own copy.
        mask = query.new_empty(batch, 1, length, key.shape[2])
        normalizers = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, mask, normalizers)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, **kwargs: object
) -> tuple[Tensor, None]:
    """As transformers' own function for the fused kernel: with a mask, keys and values are repeated for all heads."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    result: Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return result.transpose(1, 2).contiguous(), None


def _width(shape: PassShape) -> int:
    return 2 if shape.bfloat16 else 4


def _estimated(architecture: Architecture, shape: PassShape) -> Activations:
    """A little more than what is counted for Llama (54 h bytes a token and block in bfloat16) and Mixtral (90 h)."""
    text: Any = architecture.config.get_text_config(decoder=True)
    inner = getattr(text, "intermediate_size", None) or 4 * architecture.hidden_size
    chosen = experts_per_token(architecture.config)
    per_token = (28 * architecture.hidden_size + 10 * chosen * inner) * _width(shape) / 2
    block = per_token * shape.num_tokens
    return Activations(
        kept=block * architecture.num_layers,
        kept_per_block=block,
        block_input=_width(shape) * shape.num_tokens * architecture.hidden_size,
        working_training=block,
        working_inference=block,
        passing=block * architecture.num_layers,
        counted=False,
    )
