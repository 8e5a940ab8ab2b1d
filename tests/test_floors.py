"""The house keeps its floors: modules import downward only, and heavy packages only where they are meant to be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ptebatch"

# From the ground up; modules of one floor do not import each other.
FLOORS = [
    {"errors", "memory", "_core"},
    {"arch", "semantics"},
    {"swap"},
    {"folio"},
    {"mm"},
    {"pmd"},
    {"checks"},
    {"batch", "reference"},
    {"impls"},
    {"zap", "protect"},
    {"explain", "fork", "fault"},
    {"capture", "diff", "snapshot", "workload"},
    {"live", "peers", "subject"},
    {"bench", "gate_worker", "verify"},
    {"gate"},
    {"report"},
    {"cli"},
    {"__main__"},
]
FLOOR = {module: number for number, floor in enumerate(FLOORS) for module in floor}

# Who may import what; and what only on first use, inside a function.
EXTENSIONS = {path.stem for path in PACKAGE.glob("_*.pyx")}
ONLY = {
    **{name: {"bench", "peers"} for name in EXTENSIONS},
    "_core": {"batch"},
    "typer": {"cli"},
    "rich": {"cli", "report"},
    "matplotlib": {"report"},
    "scipy": {"gate"},
    "numba": {"peers"},
}
LATE = {"matplotlib", "scipy", "numba"}

MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports(source: str) -> list[tuple[str, bool]]:
    """Imported modules, those of the package without its name, and whether at the top of the module."""
    found = []
    tree = ast.parse(source)
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the package: from ptebatch import ..."
            both = [f"{node.module}.{alias.name}" for alias in node.names]
            names = both if node.module == "ptebatch" else [node.module or ""]
        for name in names:
            first, _, rest = name.partition(".")
            found.append((rest.partition(".")[0] if first == "ptebatch" else first, id(node) not in inside))
    return [(name, top) for name, top in found if name]


def module_imports(module: str) -> list[tuple[str, bool]]:
    return imports((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    assert module in FLOOR, f"{module} has no floor yet: give it one here and in the design"
    above = {name for name, _ in module_imports(module) if name in FLOOR and FLOOR[name] >= FLOOR[module]}
    assert not above


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_stay_where_they_are_meant_to_be(module):
    for name, top in module_imports(module):
        if name in ONLY:
            assert module in ONLY[name], f"{name} is for {', '.join(sorted(ONLY[name]))} only"
        if name in LATE:
            assert not top, f"{name} is imported on first use, not at the top"


def test_the_checker_sees_what_it_is_meant_to_see():
    source = "from ptebatch import mm\nfrom ptebatch.fork import fork\nimport ptebatch.cli\ndef f(): import numba.core"
    assert imports(source) == [("mm", True), ("fork", True), ("cli", True), ("numba", False)]
