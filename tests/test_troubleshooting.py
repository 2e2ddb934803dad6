"""docs/troubleshooting.md is true: its commands are run, and print what it shows."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests import symptoms, troubleshooting
from tests.exporters.made import once
from tests.troubleshooting import Block, Command, alike, blocks, cut, differences, rewritten

TEXT = troubleshooting.PAGE.read_text("utf-8")
SECTIONS = re.findall(r"^## (.*)$", TEXT, re.M)

Found = list[tuple[Block, list[list[str]]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Every command of the page in order, with what it printed."""
    folder = tmp_path_factory.mktemp("troubleshooting")
    source, bundle = once("sd35", tmp_path_factory)
    shutil.copytree(source, folder / "sd35")
    shutil.copytree(bundle, folder / "sd35-bundle")
    symptoms.make(folder)
    done = list(troubleshooting.outputs(TEXT, folder))
    said = [line for _, reals in done for real in reals for line in real]
    assert not [line for line in said if str(folder) in line or "Traceback" in line]
    return done


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("section", SECTIONS)
def test_the_commands_print_what_the_page_shows(found: Found, section: str) -> None:
    mine = [one for one in found if one[0].section == section]
    assert mine
    for block, reals in mine:
        for command, real in zip(block.commands, reals, strict=True):
            lines = differences(command.shown, real)
            assert not lines, "\n".join([f"$ {command.line}", *lines])


def test_every_section_says_why_shows_and_helps() -> None:
    parts = re.split(r"^## .*$", TEXT, flags=re.M)[1:]
    assert len(parts) == len(SECTIONS) >= 8
    for part in parts:
        assert re.findall(r"^\*\*(.*?)\*\*", part, re.M) == ["Why.", "See it.", "Do this."]
    assert {one.section for one in blocks(TEXT) if not one.tpu} == set(SECTIONS)
    assert all(command.shown for one in blocks(TEXT) for command in one.commands)


def test_the_contents_lead_to_the_sections() -> None:
    """Headings become anchors as GitHub makes them."""
    slugs = {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in SECTIONS}
    contents = TEXT.split("\n## ", 1)[0]
    assert set(re.findall(r"\]\(#([^)]+)\)", contents)) == slugs
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) == slugs


@pytest.mark.parametrize(
    ("shown", "real", "same"),
    [
        ("done in 1.2 s", "done in 31.0 s", True),
        ("file 0123456789abcdef", "file fedcba9876543210", True),
        ("relative L2 7.72e-07", "relative L2 2.10e-07", True),
        ("relative L2 7.72e-07", "relative L2 7.72e-05", False),
        ("relative L2 3.77e-04", "relative L2 3.90e-04", True),
        ("relative L2 3.77e-04", "relative L2 7.90e-04", False),
        ("up to 1.062e+06", "up to 1.06e+05", False),
        ("5488 infinities", "5490 infinities", True),
        ("5488 infinities", "0 infinities", False),
        ("22 of 22", "21 of 22", False),
        ("unet: same", "unet: different", False),
        ("keep mid_block.1", "keep mid_block.2", False),
    ],
)
def test_what_may_differ(shown: str, real: str, same: bool) -> None:
    assert alike(shown, real) is same


def test_lines_that_are_not_shown() -> None:
    real = ["a", "b", "c", "d"]
    assert cut(["x", "[...]", "y"], real) == ["a", "[...]", "d"]
    assert cut(["x", "[...]", "y"], ["a", "b"]) == ["a", "b"]
    assert differences(["a", "[...]", "d"], real) == []
    assert len(differences(["a", "[...]", "x"], real)) == 1
    assert len(differences(["a", "b", "c"], real)) == 1
    assert len(differences(["a", "b", "c", "d", "e"], real)) == 1


def test_only_what_differs_is_written() -> None:
    page = "## One\n\n```console\n$ x\n1.0 s\n$ y\nold\n```\n\n```console tpu\n$ z\nkept\n```\n"
    first, second = blocks(page)
    assert first == Block("One", False, (Command("x", ("1.0 s",)), Command("y", ("old",))))
    assert second.tpu
    fresh = rewritten(page, {first: [["2.0 s"], ["new", "[exit code 1]"]]})
    assert fresh == page.replace("old", "new\n[exit code 1]")


def test_a_command_that_fails_shows_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert troubleshooting.run("sdopt adopt nowhere.onnx")[-1] == "[exit code 2]"
    assert troubleshooting.run("grep -c x nowhere")[-1] == "[exit code 2]"
