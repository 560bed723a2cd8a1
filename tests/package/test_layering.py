"""The direction of imports, read from the sources."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.package.process import ROOT

PACKAGE = ROOT / "rkfast"
# A module imports its own layer and lower ones. A new module is given its place here.
LAYERS = {
    "native": 0,
    "extras": 0,
    "files": 0,
    "flops": 0,
    "tableau": 0,
    "measure": 0,
    "dispatch": 1,
    "ops": 2,
    "nn": 3,
    "models": 4,
    "ode": 4,
    "tsc": 4,
    "swap": 4,
    "__init__": 5,
    "papers": 5,
    "info": 6,
    "demo": 6,
    "plot": 6,
    "timm": 6,
    "lightning": 6,
    "transformers": 6,
    "commands": 6,
    "train": 6,
    "bench": 6,
    "cli": 7,
    "__main__": 8,
}
BACKENDS = {"cpu", "cuda", "triton"}
TRITON_FILES = {"rkfast.ops.kernels", "rkfast.ops.products"}  # beside the triton.py of each op
REQUIRED = {"torch"}


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(module: str, source: str, top_level_only: bool = False) -> Iterator[str]:
    """Every module that ``source`` imports, and of rkfast's own the submodules that it takes out of a package."""
    tree = ast.parse(source)
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = module.split(".") if MODULES.get(module, Path()).name == "__init__.py" else module.split(".")[:-1]
            base = ".".join([*home[: len(home) - node.level + 1], *([node.module] if node.module else [])])
            base = base if node.level else str(node.module)
            submodules = [f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in MODULES]
            # `from rkfast.ops import layout` needs rkfast.ops too; `from rkfast import native` is everyone's.
            yield from submodules or [base]


def violations(module: str, source: str) -> list[str]:
    found = []
    backend = module.split(".")[-1] if module.startswith("rkfast.ops.") else ""
    backend = "triton" if module in TRITON_FILES else backend
    for target in imports(module, source):
        parts = target.split(".")
        if parts[0] == "triton" and backend != "triton":
            found.append(f"{target}: only Triton files import triton")
        if parts[0] != "rkfast":
            continue
        if target in ("rkfast._C", "rkfast._cuda"):
            found.append(f"{target}: only rkfast.native loads an extension")
            continue
        if LAYERS[layer(target)] > LAYERS[layer(module)]:
            found.append(f"{target}: {layer(module)} does not import {layer(target)}")
        if parts[1:2] == ["ops"] and parts[-1] in BACKENDS and backend != parts[-1]:
            found.append(f"{target}: only dispatch imports a backend, by name")
        if target in TRITON_FILES and backend != "triton":
            found.append(f"{target}: only Triton files import it")
    return found


def test_every_module_has_a_layer() -> None:
    assert {layer(module) for module in MODULES} <= set(LAYERS), "give the new module its place in LAYERS"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    assert violations(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    (
        ("rkfast.ops.rk_sum", "from rkfast.nn import step"),
        ("rkfast.ops.rk_sum", "from rkfast import nn"),
        ("rkfast.nn", "def f():\n    from .. import models"),
        ("rkfast.nn.step", "from rkfast.ops.rk_sum import triton"),
        ("rkfast.ops.rk_sum", "from . import cpu"),
        ("rkfast.ops.bn_rk_sum.cpu", "from rkfast.ops.rk_sum import triton"),
        ("rkfast.ops.layout", "import triton.language as tl"),
        ("rkfast.ops.layout", "from rkfast.ops import kernels"),
        ("rkfast.dispatch", "import rkfast.ops"),
        ("rkfast.native", "from rkfast import dispatch"),
        ("rkfast.ops.rk_sum.cpu", "import rkfast._C"),
        ("rkfast.models", "import rkfast"),
    ),
)
def test_a_violation_is_found(module: str, source: str) -> None:
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    (
        ("rkfast.nn.step", "from rkfast.ops import rk_sum"),
        ("rkfast.ops.rk_sum", "from rkfast import dispatch"),
        ("rkfast.ops.rk_sum", "from . import reference"),
        ("rkfast.ops.rk_sum.triton", "import triton\nfrom rkfast.ops import kernels"),
        ("rkfast.ops.bn_rk_sum.cpu", "from rkfast.ops.channel_moments import cpu"),
    ),
)
def test_what_is_allowed_is_not_found(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_no_cycles() -> None:
    """Among the modules that are imported while others are; an import inside a function may look back."""
    graph = {
        module: {t for t in imports(module, file.read_text(), top_level_only=True) if t in MODULES} - {module, "rkfast"}
        for module, file in MODULES.items()
    }
    while graph:
        free = [module for module, targets in graph.items() if not targets & graph.keys()]
        # A package and its submodules come as one: only its own files may look up to it.
        assert free, f"these import each other: {graph}"
        for module in free:
            del graph[module]


@pytest.mark.parametrize("module", [m for m in MODULES if LAYERS[layer(m)] <= LAYERS["models"]])
def test_torch_is_all_it_needs(module: str) -> None:
    """Standard library and torch; Triton's files also Triton and what it brings."""
    allowed = REQUIRED | {"rkfast"} | set(sys.stdlib_module_names)
    if module.endswith(".triton") or module in TRITON_FILES:
        allowed |= {"triton", "numpy"}
    seen = {target.split(".")[0] for target in imports(module, MODULES[module].read_text(), top_level_only=True)}
    assert seen <= allowed


def stems(folder: str, pattern: str, suffix: str = "") -> set[str]:
    return {file.stem.removesuffix(suffix) for file in (ROOT / folder).glob(pattern)}


def test_one_stem_per_op() -> None:
    ops = {file.parent.name for file in (PACKAGE / "ops").glob("*/__init__.py")}
    for op in ops:
        home = PACKAGE / "ops" / op
        assert (home / "reference.py").exists(), f"{op} has no reference"
        assert (home / "cpu.py").exists() == (ROOT / "csrc" / "cpu" / f"{op}.cpp").exists(), f"{op}: csrc/cpu"
        assert (home / "cuda.py").exists() == (ROOT / "csrc" / "cuda" / f"{op}.cu").exists(), f"{op}: csrc/cuda"
        assert (ROOT / "tests" / "ops" / f"test_{op}.py").exists(), f"{op} has no tests"
        assert (ROOT / "bench" / "ops" / f"{op}.py").exists(), f"{op} has no benchmark"
    # Kernels that are no op are those of a header, such as winograd.h.
    assert stems("csrc/cpu", "*_kernel.cpp", "_kernel") - ops <= stems("csrc/cpu", "*.h")
    assert stems("bench/ops", "*.py") - {"__init__"} <= ops
