"""What a user installs: metadata, extras, pins, the wheel, and the commands that CI calls."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    if line and not line.startswith("#")
]
PINNED = {pin.name.lower().replace("_", "-"): pin for pin in PINS}
NOT_INSTALLED = {"tensorrt"}
"""The compiler that the tested set leaves to whoever has the device for it."""


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [
        Requirement(text) for text in (*PROJECT["dependencies"], *(t for e in extras for t in e))
    ]


def test_the_extras_are_those_that_the_documents_name() -> None:
    documented = {
        "export",
        "ort",
        "trt",
        "ray",
        "sweep",
        "trt-rtx",
        "simplify",
        "graphsurgeon",
        "report",
        "ui",
        "dev",
    }
    assert set(PROJECT["optional-dependencies"]) == documented | {"bench"}


def test_version_is_written_once() -> None:
    sdopt = importlib.import_module("sdopt")
    assert sdopt.__version__ == PROJECT["version"]


def test_python_versions_agree_with_the_script_that_looks_for_one() -> None:
    supported = SpecifierSet(PROJECT["requires-python"])
    assert [minor for minor in range(8, 20) if f"3.{minor}" in supported] == [11, 12, 13]
    script = (ROOT / ".ci/find-python").read_text("utf-8")
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in script


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_requirement_has_a_pin_that_satisfies_it(requirement: Requirement) -> None:
    name = requirement.name.lower().replace("_", "-")
    if name in NOT_INSTALLED:
        assert name not in PINNED
        return
    (pin,) = PINNED[name].specifier
    assert pin.operator == "=="
    assert pin.version in requirement.specifier


def test_pins_are_names_and_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pattern = r'[a-z0-9._-]+==[0-9][a-z0-9.]*( ; python_version >= "3\.1[0-9]")?'
    wrong = [
        line for line in lines if not line.startswith("#") and not re.fullmatch(pattern, line)
    ]
    assert not wrong
    assert len(PINNED) == len(PINS)


def test_the_command_is_where_the_entry_point_says() -> None:
    module, _, attribute = PROJECT["scripts"]["sdopt"].partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))


def test_ci_runs_what_a_developer_runs() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    text = script.read_text("utf-8")
    assert "set -euo pipefail" in text
    assert "make test" in text


def test_a_python_that_is_too_old_or_missing_is_named(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'Python 3.9.1'\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        [ROOT / ".ci/find-python", old, tmp_path / "python3.12"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "needs Python 3.11, 3.12 or 3.13" in done.stderr
    assert f"{old}: Python 3.9.1" in done.stderr
    found = subprocess.run(
        [ROOT / ".ci/find-python", old, sys.executable], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == sys.executable


def test_a_machine_without_python_3_10_is_told_what_to_do(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "printf"):
        (tools / name).symlink_to(shutil.which(name) or "")
    done = subprocess.run(
        [ROOT / ".ci/find-python310", sys.executable],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": str(tools)},
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "tpu_mlir needs Python 3.10" in done.stderr
    assert "make PYTHON310=" in done.stderr
    right = tmp_path / "python3.10"
    right.write_text("#!/bin/sh\nexit 0\n")
    right.chmod(0o755)
    found = subprocess.run(
        [ROOT / ".ci/find-python310", sys.executable, right],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(right)


def test_the_tpu_environment_is_pinned_whole_and_made_before_the_tests() -> None:
    lines = (ROOT / "constraints-tpu.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all([one.operator for one in pin.specifier] == ["=="] for pin in pins)
    assert "tpu_mlir==1.30.2" in lines or "tpu-mlir==1.30.2" in lines
    commands = (ROOT / ".ci/run").read_text("utf-8").splitlines()
    assert commands.index("make tpu-env") < commands.index("make test")


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("sdopt", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('../wheel'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert f"sdopt-{PROJECT['version']}-py3-none-any.whl" == wheel.name
    modules = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "sdopt").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == modules
    assert "sdopt/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
