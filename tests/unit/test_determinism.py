"""`distributed.determinism`: what strict sets, what it refuses, and that a run under it ends with the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf.config.distributed import DistributedConfig
from rlhf.config.zero import ZeroConfig
from rlhf.distributed.determinism import explain_refusal, prepare_environment
from rlhf.distributed.facts import compute_facts
from rlhf.distributed.zero import deepspeed_json
from rlhf.errors import ConfigError
from rlhf.worker import exit_code_of, explain
from tests.command import environment

STRICT = DistributedConfig(determinism="strict", device="cpu")
SETTINGS = """
import json, os, sys, torch
from rlhf.config.distributed import DistributedConfig
from rlhf.config.zero import ZeroConfig
from rlhf.distributed.runtime import Runtime

def settings(**fields):
    runtime = Runtime.start(DistributedConfig(device="cpu", **fields), ZeroConfig(), 1)
    return {
        "mode": torch.get_deterministic_debug_mode(),
        "filled": torch.utils.deterministic.fill_uninitialized_memory,
        "cudnn": [torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32],
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "precision": torch.get_float32_matmul_precision(),
        "threads": [torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]],
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "flash": os.environ.get("FLASH_ATTENTION_DETERMINISTIC"),
        "strict": runtime.strict,
    }

torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
found = [settings(), settings(determinism="strict"), settings(determinism="strict", num_threads=2)]
try:
    torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
except RuntimeError as error:
    found.append(str(error))
found.append(settings())
print(json.dumps(found))
"""


def test_what_strict_sets() -> None:
    env = environment({"OMP_NUM_THREADS": "2"})
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        env.pop(name, None)
    answer = subprocess.run([sys.executable, "-c", SETTINGS], env=env, capture_output=True, text=True, check=True)
    default, strict, two, refusal, again = json.loads(answer.stdout)
    assert (default["mode"], default["filled"], default["strict"]) == (1, False, False)
    assert (default["threads"], default["cublas"]) == ([2, "2"], None)
    assert strict == {
        "mode": 2,
        "filled": True,
        "cudnn": [True, False, False],
        "tf32": False,
        "precision": "highest",
        "threads": [1, "1"],
        "cublas": ":4096:8",
        "flash": "1",
        "strict": True,
    }
    assert two["threads"] == [2, "2"]
    assert "put_ does not have a deterministic implementation" in refusal
    assert (again["mode"], again["filled"]) == (1, False)  # the next stage of the process, as configured


def test_a_workspace_that_is_not_deterministic_is_refused() -> None:
    env = {"CUBLAS_WORKSPACE_CONFIG": ":0:0"}
    prepare_environment(DistributedConfig(), env)
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG=:0:0 .* set it to :4096:8 or :16:8"):
        prepare_environment(STRICT, env)
    env = {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    prepare_environment(STRICT, env)
    assert env["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_a_refused_operation_is_explained_to_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError(
        "cumsum_cuda_kernel does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'."
    )
    assert exit_code_of(error, None) == explain(error, None, debug=False) == 2
    told = capsys.readouterr().err
    assert told.startswith("rlhf: error: distributed.determinism=strict: cumsum_cuda_kernel has no deterministic form")
    assert "distributed.determinism=default" in told
    cublas = RuntimeError("Deterministic behavior was enabled with CUBLAS. Set CUBLAS_WORKSPACE_CONFIG=:4096:8.")
    assert "Deterministic behavior was enabled with CUBLAS." in str(explain_refusal(cublas)) + "."
    assert explain_refusal(RuntimeError("shapes do not match")) is None
    assert explain_refusal(ValueError("put_ does not have a deterministic implementation")) is None


def test_threads_are_the_machines_only_by_default() -> None:
    assert DistributedConfig().fixed_threads is None
    assert STRICT.fixed_threads == 1
    assert DistributedConfig(determinism="strict", num_threads=3).fixed_threads == 3


@pytest.mark.parametrize(
    ("device", "overlap", "expected"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_strict_lets_deepspeed_add_up_in_one_order(device: Any, overlap: bool, expected: bool) -> None:
    body = deepspeed_json(
        ZeroConfig(stage=2),
        precision="fp32",
        micro_batch_size=1,
        accumulation_steps=1,
        max_grad_norm=1.0,
        device_type=device,
        overlap=overlap,
    )
    assert body is not None
    assert body["zero_optimization"]["overlap_comm"] is expected


def test_layer_norm_adds_up_in_another_order_on_two_threads() -> None:
    """Why strict fixes the threads: each adds up a part of the rows, and the parts are added up then."""
    before = torch.get_num_threads()
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(4096, 256, generator=generator)
    gradient = torch.randn(4096, 256, generator=generator)
    found: list[torch.Tensor] = []
    try:
        for threads in (1, 1, 2, 2):
            torch.set_num_threads(threads)
            weight = torch.ones(256, requires_grad=True)
            normed = torch.nn.functional.layer_norm(values, (256,), weight)
            found += torch.autograd.grad(normed, weight, gradient)
    finally:
        torch.set_num_threads(before)
    one, again, two, two_again = found
    assert torch.equal(one, again)
    assert torch.equal(two, two_again)
    assert not torch.equal(one, two)
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def test_the_manifest_has_the_variables_that_decide_how_sums_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime: Any = SimpleNamespace(device=torch.device("cpu"), precision="fp32", world_size=1)
    names = ("FLASH_ATTENTION_DETERMINISTIC", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "DNNL_MAX_CPU_ISA")
    for name in names:
        monkeypatch.setenv(name, "x")
    assert dict.fromkeys(names, "x").items() <= compute_facts(runtime)["variables"].items()
