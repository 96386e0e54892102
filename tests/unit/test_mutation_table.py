"""The mutations still fit the code: `make mutation` breaks what the table says it breaks."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutation.run import ROOT, mutated
from tests.mutation.table import Module, Mutation
from tests.mutation.table_rest import MODULES


@pytest.mark.parametrize("module", MODULES, ids=lambda module: Path(module.path).stem)
def test_every_mutation_applies_once_and_is_python(module: Module) -> None:
    source = (ROOT / module.path).read_text()
    for mutation in module.mutations:
        ast.parse(mutated(source, mutation))
    assert all((ROOT / "tests" / "unit" / f"{name}.py").is_file() for name in module.tests)
    assert len({(mutation.operation, mutation.what) for mutation in module.mutations}) == len(module.mutations)


def test_every_operation_is_broken_somewhere() -> None:
    """A new function or class of `rlhf/ops` needs a mutation."""
    broken = {module.path: {mutation.operation for mutation in module.mutations} for module in MODULES}
    for path in sorted((ROOT / "rlhf" / "ops").glob("*.py")):
        tree = ast.parse(path.read_text())
        public = {
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        }
        name = path.relative_to(ROOT).as_posix()
        missing = public - broken.get(name, set())
        assert not missing, f"{name}: no mutation of {sorted(missing)}"


def test_a_line_that_is_gone_or_ambiguous_is_an_error() -> None:
    for source in ("b = 1\n", "a = 1\na = 1\n"):
        with pytest.raises(ValueError, match="must occur once"):
            mutated(source, Mutation("operation", "what", "a = 1", "a = 2"))
    with pytest.raises(ValueError, match="changes nothing"):
        mutated("a = 1\n", Mutation("operation", "what", "a = 1", "a = 1"))
