"""examples/write_a_pass: built, installed beside sdopt, found, run, and tested by its own test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from sdopt import graph, modelfile
from tests.toolkit import model_of

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "write_a_pass"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plug-in as pip installs it; building leaves nothing in the repository."""
    folder = tmp_path_factory.mktemp("plugin")
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    shutil.copytree(EXAMPLE, folder / "source", ignore=ignored)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"),
            *("--no-build-isolation", "--target", folder / "site", folder / "source"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def python(installed: Path, *arguments: object) -> str:
    """What a Python that sees the plug-in prints; fails with it where that fails."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{installed / 'site'}{os.pathsep}{ROOT}"},
        cwd=installed / "source",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_sdopt_lists_it_and_prints_its_page(installed: Path) -> None:
    assert "swap_gelu" in python(installed, "-m", "sdopt", "passes")
    page = python(installed, "-m", "sdopt", "passes", "swap_gelu")
    for heading in ("Before / After:", "Applies when:", "Numerics: lossy", "Options:"):
        assert f"\n{heading}" in page
    assert "form (tanh or sigmoid; required): `tanh` or `sigmoid`." in page
    assert "Comes after:   raise_ops\n" in page
    # The file in docs/ holds the built-in ones, whatever else is installed.
    assert "swap_gelu" not in python(installed, "-m", "sdopt", "passes", "--markdown")


def test_sdopt_runs_it(installed: Path, tmp_path: Path) -> None:
    before, after = tmp_path / "in.onnx", tmp_path / "out.onnx"
    body = "a = Identity(x)\n y = Gelu(a)"
    modelfile.save(model_of(f"g (float[N] x) => (float[N] y) {{ {body} }}"), before)
    passes = ("--passes", "clean,swap_gelu=tanh", "--require", "gelu=all")
    python(installed, "-m", "sdopt", "optimize", before, "-o", after, *passes)
    (node,) = modelfile.load(after).graph
    assert node.op_type == "Gelu"
    assert graph.attribute(node, "approximate") == "tanh"
    assert ir.load(before).graph[1].attributes.get("approximate") is None


def test_its_own_tests_pass(installed: Path) -> None:
    said = python(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert " passed" in said
