"""`distributed.determinism`: which of the libraries' faster, less repeatable ways of adding numbers up are allowed."""

from __future__ import annotations

import re
from collections.abc import MutableMapping

import torch

from rlhf.config.distributed import DistributedConfig
from rlhf.errors import ConfigError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
# What CUDA's documentation of cuBLAS names as deterministic with several streams.
_CUBLAS_VALUES = (":4096:8", ":16:8")
# transformers reads it for the package flash-attn, whose backward pass has a deterministic form.
_FLASH = "FLASH_ATTENTION_DETERMINISTIC"
_NO_FORM = re.compile(r"(\S+) does not have a deterministic implementation")


def prepare_environment(config: DistributedConfig, env: MutableMapping[str, str]) -> None:
    """Sets what libraries read when they start; call it before anything runs on a GPU.

    Raises `ConfigError` when CUBLAS_WORKSPACE_CONFIG is set to something that is not deterministic.
    """
    if config.determinism != "strict":
        return
    given = env.setdefault(CUBLAS, _CUBLAS_VALUES[0])
    if given not in _CUBLAS_VALUES:
        raise ConfigError(
            f"distributed.determinism=strict, but {CUBLAS}={given} lets cuBLAS choose differently from run to run. "
            f"Unset it, or set it to {' or '.join(_CUBLAS_VALUES)}."
        )
    env[_FLASH] = "1"


def apply_determinism(config: DistributedConfig, device: torch.device) -> None:
    """Sets torch's switches for this process.

    strict: an operation without a deterministic form on this device raises an error (see `explain_refusal`), cuDNN
    neither searches nor uses such forms, TF32 is off, and fresh memory is filled. default: torch's own choices on CUDA;
    on CPU, where deterministic forms cost next to nothing, they are taken where there are any.
    """
    strict = config.determinism == "strict"
    # What use_deterministic_algorithms does, which imports the compiler for a second.
    torch.set_deterministic_debug_mode("error" if strict else "warn" if device.type == "cpu" else "default")
    torch.utils.deterministic.fill_uninitialized_memory = strict  # type: ignore[attr-defined]
    if strict:
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")


def explain_refusal(error: BaseException) -> ConfigError | None:
    """What strict's refusal of an operation means; None for any other error."""
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    found = _NO_FORM.search(text)
    if found is None and CUBLAS not in text:
        return None
    what = f"{found[1]} has no deterministic form on this device" if found else text.partition(". ")[0]
    explained = ConfigError(
        f"distributed.determinism=strict: {what}. Set distributed.determinism=default, or distributed.device=cpu; "
        "--debug shows where it is used."
    )
    explained.__cause__ = error
    return explained
