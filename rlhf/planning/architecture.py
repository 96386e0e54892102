"""What a model is made of, read off its config: exact parameter counts, from modules on the meta device."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import TaskType
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from rlhf.errors import ArtifactError, ConfigError
from rlhf.models.adapter_shape import new_settings
from rlhf.models.adapters import inject_adapter
from rlhf.models.loading import hub_arguments, load_errors, quiet
from rlhf.models.paths import base_of, is_adapter, is_local, single_model
from rlhf.models.scratch import scratch_model_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from rlhf.config.model import ModelConfig
    from rlhf.config.peft import LoRAConfig

# Names of the number of layers, and of fields that hold one entry a layer, in the configs of transformers.
_LAYER_FIELDS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")
_EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts")
_PER_LAYER_FIELDS = ("layer_types", "attention_layers", "attention_types")


@dataclass(frozen=True, eq=False)
class Architecture:
    """Sizes of a language model. All counts are of parameters; `layers` is the sum over all blocks of all stacks.

    `active_layers` are those of `layers` that one token is multiplied with: of a mixture of experts its experts.
    """

    name: str
    config: PreTrainedConfig
    total: int
    embedding: int
    layers: int
    active_layers: int
    head: int
    tied: bool
    largest: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    encoder_decoder: bool
    stored_bytes: int
    fused_attention: bool

    @property
    def scalar_total(self) -> int:
        """Parameters of the reward model or critic on this transformer: no output head, one number a token."""
        if self.encoder_decoder:
            # T5's classifier has a whole tanh layer below its output (docs of `ScalarModel`).
            return self.total - self.head + self.hidden_size**2 + 2 * self.hidden_size + 1
        return self.total - self.head + self.hidden_size

    @property
    def matmul_parameters(self) -> int:
        """Parameters that tokens are multiplied with, the output head apart."""
        return self.layers

    def head_products(self) -> int:
        """Multiplications of one token with the output head, tied or not."""
        return self.hidden_size * self.vocab_size


def read_architecture(path: str, model: ModelConfig, key: str) -> Architecture:
    """The architecture of a folder, of an adapter's base, or of a hub id; only its config.json is read.

    Raises `ConfigError` for a folder without one, for an unknown model and for one that cannot be planned.
    """
    path = single_model(path, key)
    source = base_of(path, key) if is_adapter(path) else path
    if is_local(source):
        folder = Path(source).expanduser()
        if not (folder / "config.json").is_file():
            what = "has no config.json" if folder.is_dir() else "is not there"
            raise ConfigError(
                f"{key}={source}: a plan is made from a model's config.json, and {folder.absolute()} {what}. Give a "
                "folder that save_pretrained of transformers wrote, or a hub id"
            )
    try:
        with load_errors(source, key), quiet():
            config = AutoConfig.from_pretrained(source, **hub_arguments(source, model))
    except ArtifactError as error:
        raise ConfigError(str(error)) from error
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(_not_buildable(key, source, error)) from error
    return architecture_of(config, Path(source).name, key)


def scratch_architecture(model: ModelConfig) -> Architecture:
    """The architecture that `model.scratch` makes. Raises `ConfigError` for sizes that do not fit each other."""
    return architecture_of(scratch_model_config(model.scratch), f"{model.scratch.architecture} from scratch", "model")


def architecture_of(config: PreTrainedConfig, name: str, key: str = "model.path") -> Architecture:
    """Counts what transformers would build. Raises `ConfigError` where it cannot build a language model."""
    model = empty_model(config, key=key)
    embedding = cast(nn.Embedding, model.get_input_embeddings()).weight
    head = cast(Any, model.get_output_embeddings())
    tied = head is None or head.weight is embedding
    parameters = {id(part): part for part in model.parameters()}.values()
    total = sum(part.numel() for part in parameters)
    text = config.get_text_config(decoder=True)
    # Of a model for text and images only the text's decoder is run.
    composite = getattr(config, "text_config", None) is not None
    blocks = _blocks(cast(nn.Module, model.get_decoder()) if composite else model)
    num_heads = int(getattr(text, "num_attention_heads", 0) or getattr(text, "num_heads", 0) or 0)
    hidden_size = int(getattr(text, "hidden_size", 0) or getattr(text, "d_model", 0) or 0)
    if not (blocks and num_heads and hidden_size):
        raise ConfigError(
            f"{key}: {name} ({config.model_type}) cannot be planned: a plan is for models whose config.json "
            "gives layers, a hidden size and attention heads"
        )
    head_size = getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or hidden_size // num_heads
    return Architecture(
        name=name,
        config=config,
        total=total,
        embedding=embedding.numel(),
        layers=sum(part.numel() for block in blocks for part in block.parameters()),
        active_layers=_active(blocks, text),
        head=0 if tied else sum(part.numel() for part in head.parameters()),
        tied=tied,
        largest=max(part.numel() for part in parameters),
        num_layers=len(blocks) // (2 if config.is_encoder_decoder else 1),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=int(getattr(text, "num_key_value_heads", None) or num_heads),
        head_size=int(head_size),
        vocab_size=int(embedding.shape[0]),
        encoder_decoder=bool(config.is_encoder_decoder),
        stored_bytes=2 if getattr(config, "dtype", None) in (torch.bfloat16, torch.float16) else 4,
        fused_attention=model.config._attn_implementation != "eager",
    )


def empty_model(
    config: PreTrainedConfig,
    *,
    num_layers: int | None = None,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    key: str = "model.path",
) -> PreTrainedModel:
    """A model without weights, on the meta device; with `num_layers` blocks in each stack where that is given.

    Raises `ConfigError` for a config that transformers makes no language model of.
    """
    config = copy.deepcopy(config)
    if num_layers is not None:
        sizes: Any = getattr(config, "text_config", None) or config
        for name in _LAYER_FIELDS:
            if getattr(sizes, name, None) is not None:
                setattr(sizes, name, num_layers)
        for name in _PER_LAYER_FIELDS:
            if isinstance(getattr(sizes, name, None), list):
                setattr(sizes, name, getattr(sizes, name)[:num_layers])
    factory: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    arguments: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        with torch.device("meta"), quiet():
            model: PreTrainedModel = factory.from_config(config, dtype=dtype, **arguments)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, ZeroDivisionError, RuntimeError) as error:
        # Whatever a config.json with sizes that do not fit each other makes transformers raise.
        raise ConfigError(_not_buildable(key, config.model_type, error)) from error
    model.tie_weights()
    return model


def _not_buildable(key: str, what: str, error: Exception) -> str:
    return f"{key}: no language model can be built from the config.json of {what}: {type(error).__name__}: {error}"


def _active(blocks: list[nn.Module], config: PreTrainedConfig) -> int:
    """Parameters of the blocks that one token is multiplied with: of experts as many as each token chooses."""
    chosen = experts_per_token(config)
    number = next((found for name in _EXPERT_FIELDS if (found := getattr(config, name, None))), None)
    share = min(1.0, chosen / number) if number else 1.0
    parts = (item for block in blocks for item in block.named_parameters())
    return round(sum(part.numel() * (share if "experts" in name.split(".") else 1.0) for name, part in parts))


def experts_per_token(config: PreTrainedConfig) -> int:
    """How many experts of a layer compute a token; 1 for a model without experts."""
    text: Any = config.get_text_config(decoder=True)
    return int(getattr(text, "num_experts_per_tok", None) or getattr(text, "num_experts_per_token", None) or 1)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer's blocks: the members of its module lists that are not within another one."""
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.extend(child)
            else:
                walk(child)

    walk(model)
    return found


@functools.lru_cache(maxsize=64)
def lora_parameters(architecture: Architecture, lora: LoRAConfig, *, with_head: bool = False) -> int:
    """Parameters of one adapter, without a classifier's head: what PEFT itself puts into one and two blocks, extended.

    Raises `ConfigError` for layers that the model does not have.
    """
    sizes = []
    for num_layers in (1, 2):
        model = empty_model(architecture.config, num_layers=num_layers)
        add_empty_adapter(model, lora, with_head=with_head)
        sizes.append(sum(part.numel() for name, part in model.named_parameters() if ".lora_" in name))
    return sizes[0] + (architecture.num_layers - 1) * (sizes[1] - sizes[0])


def add_empty_adapter(model: PreTrainedModel, lora: LoRAConfig, *, with_head: bool = False) -> None:
    """Puts an adapter without weights into an empty model and freezes all else.

    Raises `ConfigError` for a model that takes none.
    """
    try:
        settings = new_settings(lora, model, base="", task=TaskType.CAUSAL_LM, with_head=with_head)
        with torch.device("meta"):
            inject_adapter(model, settings, "planned", None)
    except AttributeError as error:
        name = type(model).__name__
        raise ConfigError(f"peft=lora cannot adapt {name}: {error}. Set peft=none") from error
    for name, part in model.named_parameters():
        part.requires_grad_(".lora_" in name)
