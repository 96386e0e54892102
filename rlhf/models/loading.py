"""Loading policies and tokenizers from a local folder or the hub, with errors a user can act on."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from rlhf.data.hub_access import use_cache_if_hub_is_silent
from rlhf.data.templates import chat_template
from rlhf.data.tokenization import use_encoder_prompts
from rlhf.errors import ArtifactError, ConfigError
from rlhf.models.paths import base_of, check_model_path, has_tokenizer, is_adapter, is_local, single_model
from rlhf.models.seq2seq import check_encoder_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.config.model import ModelConfig

# Tokens that vocabularies reserve for padding: none of them ever stands in a text.
PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and warnings; errors still rise."""
    verbosity = transformers_logging.get_verbosity()
    progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress:
            transformers_logging.enable_progress_bar()


@contextmanager
def load_errors(path: str, key: str) -> Iterator[None]:
    """Turns what transformers raises while it loads `path`, named by the config key `key`, into a `UserError`.

    For a hub id it first sees to it that a hub that does not answer costs seconds and not minutes.
    """
    place = f"{key}: {Path(path).absolute() if is_local(path) else path}"
    silent = None if is_local(path) else use_cache_if_hub_is_silent()
    try:
        yield
    except (SafetensorError, EOFError, pickle.UnpicklingError) as error:
        raise ArtifactError(
            f"{place} has a weight file that is cut off or damaged ({error}). Copy or save the model again"
        ) from error
    except RuntimeError as error:
        raise ArtifactError(f"{place} has weights that do not fit its config.json: {error}") from error
    except ImportError as error:
        raise ConfigError(f"{place} needs a package that is not installed: {error}") from error
    except OSError as error:
        if is_local(path):
            raise ArtifactError(f"{place} cannot be loaded: {error}") from error
        raise ConfigError(f"{place} {_hub_reason(error, silent)}") from error
    except (ValueError, KeyError) as error:
        hint = ". Code that comes with a model runs only with model.trust_remote_code=true"
        raise ArtifactError(
            f"{place} cannot be loaded: {error}{hint if 'trust_remote_code' in str(error) else ''}"
        ) from error


def _hub_reason(error: BaseException, silent: str | None) -> str:
    """Why the hub did not deliver, and what to do, from the chain of errors; `silent`: why it did not answer at all."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    if silent is not None:
        return (
            f"is not in the cache, and the hub does not answer ({silent}). Check the network and HF_ENDPOINT, or give "
            "a local folder"
        )
    for kind, reason in (
        (GatedRepoError, "is gated: accept its terms on huggingface.co, then log in with `hf auth login`"),
        (RevisionNotFoundError, "has no such model.revision; see its branches and tags on huggingface.co"),
        (
            RepositoryNotFoundError,
            "is no folder here and no model on huggingface.co (if it is private: `hf auth login`). Check the spelling",
        ),
        (OfflineModeIsEnabled, "is not in the cache and HF_HUB_OFFLINE is set. Unset it, or give a local folder"),
        (
            LocalEntryNotFoundError,
            "is not in the cache and huggingface.co cannot be reached. Check the network, or give a local folder",
        ),
    ):
        if any(isinstance(link, kind) for link in chain):
            return reason
    return f"is not a folder here and could not be loaded from huggingface.co: {error}"


def hub_arguments(path: str, config: ModelConfig | None) -> dict[str, Any]:
    """Arguments every `from_pretrained` gets. The revision belongs to `model.path` alone, not to stage outputs."""
    if config is None:
        return {"trust_remote_code": False}
    arguments: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.revision is not None and path == config.path and not is_local(path):
        arguments["revision"] = config.revision
    return arguments


def load_tokenizer(
    path: str | Path, config: ModelConfig | None = None, key: str = "model.path"
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id, with EOS, a pad token and the config's chat template if it has one.

    A tokenizer without a pad token gets a reserved one of its vocabulary, else EOS: masks are carried, so padding may
    look like EOS. Raises `ConfigError` for a path that is not there and for a tokenizer without EOS, `ArtifactError`
    for files that are missing or broken.
    """
    path = str(path)
    check_model_path(path, key)
    path = single_model(path, key)
    if is_adapter(path) and not has_tokenizer(Path(path).expanduser()):
        path = base_of(path, key)
    with load_errors(path, key), quiet():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **hub_arguments(path, config))
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{key}: the tokenizer of {path} has no EOS token, so a response could never end. Set it once: "
            f't = AutoTokenizer.from_pretrained("{path}"); t.eos_token = "<token of its vocabulary>"; '
            "t.save_pretrained(folder)"
        )
    if tokenizer.pad_token_id is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = next((token for token in PAD_TOKENS if token in vocabulary), tokenizer.eos_token)
    if config is not None and config.chat_template is not None:
        tokenizer.chat_template = chat_template(config.chat_template)
    if load_config(base_of(path, key) if is_adapter(path) else path, config, key).is_encoder_decoder:
        use_encoder_prompts(tokenizer)
    return tokenizer


def attention_arguments(config: ModelConfig | None, model_config: PreTrainedConfig) -> dict[str, Any]:
    """The kernel `model.attention` asks for; nothing for `auto`. Raises `ConfigError` where it would be wrong."""
    if config is None or config.attention == "auto":
        return {}
    if config.attention == "sdpa" and getattr(model_config, "attn_logit_softcapping", None) is not None:
        raise ConfigError(
            f"model.attention=sdpa cannot cap attention logits, which {model_config.model_type} needs; "
            "use auto, eager or flash_attention_2"
        )
    return {"attn_implementation": config.attention}


def load_config(path: str, config: ModelConfig | None, key: str) -> PreTrainedConfig:
    """The model's own config, after the checks of `check_model_path`; an ensemble's is that of its first member."""
    check_model_path(path, key)
    path = single_model(path, key)
    with load_errors(path, key), quiet():
        loaded: PreTrainedConfig = AutoConfig.from_pretrained(path, **hub_arguments(path, config))
    return loaded


def load_policy(
    path: str | Path,
    config: ModelConfig | None = None,
    dtype: torch.dtype = torch.float32,
    key: str = "model.path",
) -> PreTrainedModel:
    """A causal or encoder-decoder language model of a folder or hub id, in evaluation mode, dropout as configured.

    The folder of an adapter gives its base with the adapter merged in.

    Raises `ConfigError` for a path that is not there, `ArtifactError` for a folder that holds another kind of model,
    or weights that are missing, damaged or of other shapes.
    """
    path = str(path)
    if is_adapter(path):
        from rlhf.models.adapters import load_merged_policy

        return load_merged_policy(path, config, dtype, key)
    model_config = load_config(path, config, key)
    architecture = (model_config.architectures or ["unknown"])[0]
    if architecture.endswith(("Classification", "QuestionAnswering", "RewardModel")):
        raise ArtifactError(
            f"{key}: {path} holds a {architecture}, which scores text and cannot write it. Expected a causal language "
            "model (…ForCausalLM); is the path of the reward model given where the policy belongs?"
        )
    check_encoder_decoder(model_config, path, key)
    factory: Any = AutoModelForSeq2SeqLM if model_config.is_encoder_decoder else AutoModelForCausalLM
    arguments = hub_arguments(path, config) | attention_arguments(config, model_config)
    with load_errors(path, key), quiet():
        result: Any = factory.from_pretrained(path, dtype=dtype, output_loading_info=True, **arguments)
    model: PreTrainedModel = result[0]
    check_no_missing_weights(result[1]["missing_keys"], path, key)
    own_memory(model)
    train_every_embedding(model)
    mend_generation_config(model)
    model.eval()
    return model


def place(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model on `device`, in evaluation mode. (transformers' own `.to` has a wrong type.)"""
    torch.nn.Module.to(model, device)
    model.eval()
    return model


def train_every_embedding(model: PreTrainedModel) -> None:
    """Lets the pad token's embedding have a gradient: where pad is EOS, that is the token at which scores are read."""
    embeddings: Any = model.get_input_embeddings()
    embeddings.padding_idx = None


def check_no_missing_weights(missing: set[str] | list[str], path: str, key: str) -> None:
    """Raises `ArtifactError` when weights were left at random values because the files do not hold them."""
    if missing:
        shown = ", ".join(sorted(missing)[:4])
        raise ArtifactError(
            f"{key}: {path} lacks {len(missing)} of the model's weights ({shown}{', …' if len(missing) > 4 else ''}); "
            "they would be random. Save the whole model again"
        )


def own_memory(model: nn.Module) -> None:
    """Copies weights out of the mapped file into aligned memory.

    A mapped tensor starts wherever the file's header ends, and matrix products on unaligned memory round otherwise:
    equal weights from two files gave logits that differ in the last bit. The file may then also be replaced.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def mend_generation_config(model: PreTrainedModel) -> None:
    """Some published models set a temperature without sampling, which transformers then refuses to save."""
    generation = model.generation_config
    if generation is not None and not generation.do_sample:
        try:
            generation.validate(strict=True)
        except ValueError:
            generation.do_sample = True


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Raises `ArtifactError` when the tokenizer has ids for which the model has no embedding."""
    largest = max(tokenizer.get_vocab().values())
    rows = num_embeddings(model)
    if largest >= rows:
        raise ArtifactError(
            f"{path}: the tokenizer goes up to id {largest}, but the model has embeddings for {rows} ids only. "
            "Give the tokenizer that belongs to the model, or call model.resize_token_embeddings and save both"
        )


def num_embeddings(model: PreTrainedModel) -> int:
    """How many token ids the model has an input embedding for (also where its weights are sharded)."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.num_embeddings)


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0: modules, attention's functional dropout, and the config that sets them."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if _is_dropout(name, value):
                setattr(module, name, 0.0)
    config = getattr(model, "config", None)
    for name, value in list(vars(config).items()) if config is not None else ():
        if _is_dropout(name, value):
            setattr(config, name, 0.0)


def _is_dropout(name: str, value: object) -> bool:
    return isinstance(value, float) and value > 0 and any(part in name for part in ("dropout", "pdrop", "layerdrop"))
