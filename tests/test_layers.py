"""The one-way rule of docs/design.md and the house's limits, checked on the source itself."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdopt import registry
from sdopt.spec import snake_case

PACKAGE = Path(__file__).parent.parent / "sdopt"

LAYERS = (
    ("errors", "importing", "machine", "units"),
    ("reading", "spec", "shapes"),
    ("manifest",),
    ("blocks",),
    ("weights",),
    ("graph", "datafile", "session", "safetensors_header", "companions", "origins", "locking"),
    ("fingerprint", "onnx_metadata", "wellformed"),
    ("modelfile",),
    ("tolerance", "registry", "flops", "artifacts", "recorded"),
    ("report",),
    ("requirements", "nonfinite", "drawing", "stage_report"),
    ("bundle",),
    ("adapters",),
    ("passes",),
    ("pipeline", "exporters", "targets", "runtime"),
    ("provenance", "merging"),
    ("adopting", "compare", "exporting", "inspection", "packing", "pages", "staging"),
    ("building", "bench", "evaluating", "precision"),
    ("reporting", "sweep"),
    ("api",),
    ("ui",),
    ("cli",),
    ("__main__",),
)
"""From the bottom up; a module may import from the layers below its own."""

RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}

ISLANDS = ("passes", "targets")
"""Packages whose public modules know nothing of one another."""

SHARED = {"passes": {"base"}, "targets": {"base"}}
"""The modules of an island that its others build on."""

MAX_LINES = 300
MAX_PASS_LINES = 150

FILES = sorted(PACKAGE.rglob("*.py"))
NOT_CLI = [path for path in FILES if path.parent.name != "cli"]
IN_ISLANDS = [path for path in FILES if path.parent.name in ISLANDS]
MAIN = PACKAGE / "__init__.py"
"""The front door, which imports lazily from the top."""


def by_path(paths: list[Path]) -> pytest.MarkDecorator:
    names = [str(path.relative_to(PACKAGE)) for path in paths]
    return pytest.mark.parametrize("path", paths, ids=names)


def dotted(path: Path) -> str:
    """``sdopt/passes/tome.py`` to ``sdopt.passes.tome``; a package's ``__init__`` to itself."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path) for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """The modules of sdopt that a file imports, at its top, in functions or for types only."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name in MODULES and a.name != "sdopt")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module in MODULES:
            children = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = children & MODULES
            if modules != children and node.module != "sdopt":
                modules.add(node.module)
            yield from modules


def unit(module: str) -> str:
    return module.split(".")[1]


def is_private(module: str) -> bool:
    return module.rpartition(".")[2].startswith("_")


def test_the_reader_of_imports_sees_all_forms(tmp_path: Path) -> None:
    source = (
        "import sdopt.graph\n"
        "from sdopt import weights as w\n"
        "from sdopt.passes import base\n"
        "def later():\n    from sdopt.errors import SdoptError\n"
    )
    file = tmp_path / "x.py"
    file.write_text(source)
    assert set(imports(file)) == {
        "sdopt.graph",
        "sdopt.weights",
        "sdopt.passes.base",
        "sdopt.errors",
    }


def test_every_module_has_a_place() -> None:
    unplaced = {unit(module) for module in MODULES if module != "sdopt"} - set(RANK)
    assert not unplaced, f"give these a layer in LAYERS and in docs/design.md: {unplaced}"


@by_path([path for path in FILES if path != MAIN])
def test_imports_go_one_way(path: Path) -> None:
    module = dotted(path)
    for imported in imports(path):
        if unit(imported) != unit(module):
            assert RANK[unit(imported)] < RANK[unit(module)], f"{module} imports {imported}"


@by_path(IN_ISLANDS)
def test_siblings_do_not_import_siblings(path: Path) -> None:
    island, shared = path.parent.name, SHARED[path.parent.name]
    siblings = {name for name in imports(path) if unit(name) == island}
    public = {name for name in siblings if not is_private(name)}
    assert public <= {f"sdopt.{island}.{name}" for name in shared}
    if path.stem in shared:
        assert not siblings, "what the others build on imports none of them"


@by_path(FILES)
def test_private_modules_stay_in_their_package(path: Path) -> None:
    for imported in imports(path):
        if is_private(imported):
            assert imported.rpartition(".")[0] in (dotted(path), dotted(path).rpartition(".")[0])


def test_no_import_runs_in_a_circle() -> None:
    graph = {dotted(path): set(imports(path)) for path in FILES if path != MAIN}
    tuple(graphlib.TopologicalSorter(graph).static_order())


@by_path(NOT_CLI)
def test_only_the_cli_writes_to_the_terminal(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        assert not (isinstance(node, ast.Name) and node.id == "print"), f"line {node.lineno}"
        is_stream = isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr")
        if is_stream and isinstance(node.value, ast.Name):
            assert node.value.id != "sys", f"line {node.lineno}"


@by_path(NOT_CLI)
def test_only_the_cli_parses_arguments_or_colours_text(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not {name.split(".")[0] for name in names} & {"typer", "click", "rich", "argparse"}


@by_path(FILES)
def test_files_are_small(path: Path) -> None:
    lines = len(path.read_text("utf-8").splitlines())
    is_pass = dotted(path).startswith("sdopt.passes.") and path.name in {
        f"{name}.py" for name in registry.PASSES
    }
    assert lines <= (MAX_PASS_LINES if is_pass else MAX_LINES)


@pytest.mark.parametrize("kind", ["passes", "targets"])
def test_word_file_and_class_have_one_name(kind: str) -> None:
    built_in = {"passes": registry.PASSES, "targets": registry.TARGETS}[kind]
    for word, place in built_in.items():
        module, _, attribute = place.partition(":")
        assert module == f"sdopt.{kind}.{word}"
        assert snake_case(attribute) == word
        assert module in MODULES


def test_every_pass_file_is_in_the_registry() -> None:
    files = {path.stem for path in (PACKAGE / "passes").glob("[!_]*.py")}
    assert files - {"base", "presets"} == set(registry.PASSES)
