"""Which way imports point, and what an import may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "rlhf"

_RECORDS = {"errors", "records", "terminal"}
_SHARED = {"errors", "terminal", "ops", "config", "records", "batches", "statistics"}
_LIBRARY = _SHARED | {"data", "models", "chat", "rewards", "preferences", "evaluation", "distributed", "runs"}
_EVERYTHING = _LIBRARY | {
    "planning",
    "stages",
    "sweeps",
    "stage_inputs",
    "pipeline",
    "cached_stages",
    "bookkeeping",
    "rank_pipeline",
    "worker",
    "supervisor",
    "sbatch",
    "trainer",
}

# What each part of the package may import besides itself. A new part gets a line here.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "terminal": set(),
    # The sockets of the servers.
    "listening": {"errors"},
    "ops": {"errors"},
    "config": {"errors"},
    "records": {"errors"},
    "statistics": {"errors"},
    "batches": {"errors", "ops"},
    "data": _SHARED,
    # A model folder's tokenizer gets its chat template from the data's.
    "models": _SHARED | {"data"},
    # Models that answer chats: one of ours in memory, or an address.
    "chat": _SHARED | {"data", "models"},
    # An annotator may be a model that is asked, or a reward.
    "preferences": _SHARED | {"data", "models", "chat", "rewards", "runs", "listening"},
    # A learned reward is a tokenized text through a model.
    "rewards": _SHARED | {"data", "models", "chat"},
    "distributed": {"errors", "config", "terminal"},
    "runs": _RECORDS | {"config", "statistics"},
    "evaluation": _LIBRARY,
    # The reward server.
    "serving": _LIBRARY | {"listening"},
    # A plan is made of configs and of models without weights; a running stage is planned by what it has.
    "planning": _LIBRARY,
    "stages": _LIBRARY,
    "sweeps": _EVERYTHING,
    "trainer": _EVERYTHING,
    "studies": _EVERYTHING,
    "sbatch": {"errors", "config", "runs"},
    "pipeline": _EVERYTHING,
    # Stages that runs share.
    "cached_stages": _EVERYTHING,
    "bookkeeping": _EVERYTHING | {"studies"},
    # The pipeline in ranks of another launcher.
    "rank_pipeline": _EVERYTHING,
    # What each stage reads.
    "stage_inputs": _EVERYTHING,
    "worker": _EVERYTHING,
    "supervisor": _EVERYTHING | {"studies"},
    # A proof plans a config and runs it on stand-ins.
    "proving": _EVERYTHING,
    "doctor": _EVERYTHING,
    # Runs compared, made again and judged.
    "evidence": _EVERYTHING | {"studies", "supervisor"},
    "cli": _EVERYTHING | {"doctor", "proving", "evidence", "serving"},
    "__main__": {"cli"},
}
STAGES = {"sft", "collect", "reward_model", "reward_report", "ppo", "dpo", "best_of_n", "evaluate"}
# Libraries that one part alone may touch, at any depth of a function.
OWNED = {"accelerate": "distributed", "deepspeed": "distributed", "torch.distributed": "distributed"}
# Modules that must be importable without these libraries in memory.
HEAVY = ("torch", "transformers", "trl", "deepspeed", "accelerate", "peft", "datasets", "wandb", "sklearn")
LIGHT = ["rlhf.config", "rlhf.cli", "rlhf.pipeline", "rlhf.supervisor", "rlhf.worker", "rlhf.data", "rlhf.errors"]
LIGHT += [
    "rlhf.doctor",
    "rlhf.evidence.replay",
    "rlhf.evidence.verify",
    "rlhf.records",
    "rlhf.distributed.launch",
    "rlhf.distributed.leader",
    "rlhf.distributed.zero",
    "rlhf.preferences.annotators",
    "rlhf.preferences.page.command",
    "rlhf.preferences.resolution",
    "rlhf.preferences.selection",
    "rlhf.preferences.store",
    "rlhf.preferences.waiting",
    "rlhf.preferences.command",
    "rlhf.preferences.exchange",
    "rlhf.sweeps.command_line",
    "rlhf.sweeps.page",
]


def _modules() -> list[str]:
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("rlhf", *path.relative_to(PACKAGE).with_suffix("").parts)
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def _path(module: str) -> Path:
    base = PACKAGE.parent.joinpath(*module.split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def _imports_of(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Every dotted name that a module imports, wherever in the file: `from a import b` gives `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + (1 if is_package else 0)]
                base = ".".join([*parents, base] if base else parents)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def _imports(module: str) -> frozenset[str]:
    path = _path(module)
    return frozenset(_imports_of(ast.parse(path.read_text()), module, path.name == "__init__.py"))


def _parts(names: frozenset[str]) -> set[str]:
    """The parts of the package that these imports touch; `rlhf` itself (its version) is none."""
    return {
        name.split(".")[1] for name in names if name.startswith("rlhf.") and not name.startswith("rlhf.__version__")
    }


def _part(module: str) -> str | None:
    return module.split(".")[1] if "." in module else None


def test_the_walk_sees_every_kind_of_import() -> None:
    source = (
        "import a.b\nfrom . import c\nfrom ..d import e\ndef f():\n    from rlhf.g import h\nif x:\n    import i as j\n"
    )
    found = set(_imports_of(ast.parse(source), "rlhf.part.module", False))
    assert found == {"a.b", "rlhf.part", "rlhf.part.c", "rlhf.d", "rlhf.d.e", "rlhf.g", "rlhf.g.h", "i"}
    assert set(_imports_of(ast.parse("from . import c"), "rlhf.part", True)) == {"rlhf.part", "rlhf.part.c"}


@pytest.mark.parametrize("module", _modules())
def test_imports_point_one_way(module: str) -> None:
    part = _part(module)
    if part is None:
        # `rlhf` itself may offer names, lazily; what it costs is tested below.
        return
    assert part in ALLOWED, f"{part} is new: say in tests/unit/test_imports.py what it may import"
    used = _parts(_imports(module)) - {part}
    wrong = used - ALLOWED[part]
    assert not wrong, f"{module} imports {sorted(wrong)}, but rlhf/{part} may only import {sorted(ALLOWED[part])}"


@pytest.mark.parametrize("module", [name for name in _modules() if name.startswith("rlhf.stages.")])
def test_stages_never_import_each_other(module: str) -> None:
    stage = module.split(".")[2]
    others = {name.split(".")[2] for name in _imports(module) if name.startswith("rlhf.stages.")} & STAGES
    assert others <= {stage}, f"{module} imports the stages {sorted(others - {stage})}"


@pytest.mark.parametrize("module", _modules())
def test_one_part_owns_a_library(module: str) -> None:
    names = _imports(module)
    for library, owner in OWNED.items():
        uses = any(name == library or name.startswith(f"{library}.") for name in names)
        assert not uses or _part(module) == owner, f"{module} imports {library}, which belongs to rlhf/{owner}"


@pytest.mark.parametrize("module", [name for name in _modules() if name.startswith("rlhf.ops")])
def test_ops_import_torch_only(module: str) -> None:
    tops = {name.partition(".")[0] for name in _imports(module)} - set(sys.stdlib_module_names)
    assert tops <= {"torch", "jaxtyping", "rlhf"}


def _loaded_after(statement: str) -> set[str]:
    """Top-level libraries in memory after a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(' '.join(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=PACKAGE.parent
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def _run_modules() -> list[str]:
    return [name for name in _modules() if name == "rlhf.runs" or name.startswith("rlhf.runs.")]


@pytest.mark.parametrize("module", ["rlhf", *LIGHT])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    heavy = _loaded_after(f"import {module}") & set(HEAVY)
    assert not heavy, f"import {module} loads {sorted(heavy)}"


def test_every_module_of_runs_data_and_config_is_light() -> None:
    """All of them in one interpreter, so that no module hides behind another."""
    names = [name for name in _modules() if _part(name) in {"runs", "data", "config"}]
    assert _run_modules()
    heavy = _loaded_after("\n".join(f"import {name}" for name in names)) & set(HEAVY)
    assert not heavy, f"rlhf.runs, rlhf.data or rlhf.config loads {sorted(heavy)}"


def test_ops_and_batches_load_torch_only() -> None:
    names = [name for name in _modules() if _part(name) in {"ops", "batches"}]
    loaded = _loaded_after("\n".join(f"import {name}" for name in names))
    assert "torch" in loaded
    assert not loaded & (set(HEAVY) - {"torch"})


@pytest.mark.parametrize(("module", "before"), [("rlhf.config", "sys"), ("rlhf.ops.losses", "torch")])
def test_config_and_ops_import_quickly(module: str, before: str) -> None:
    """Well under a second of processor time on a fast core; for the maths, besides torch itself. The best of three."""
    code = f"import time, {before}\nstart = time.process_time()\nimport {module}\nprint(time.process_time() - start)"
    seconds = []
    for _ in range(3):
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
        )
        seconds.append(float(result.stdout))
        if seconds[-1] < 0.5:
            break
    assert min(seconds) < 0.8, f"import {module} takes {min(seconds):.2f} s of processor time"
