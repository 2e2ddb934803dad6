"""What ``sdopt eval`` prints and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runtime import toy
from tests.test_cli import Shell

WORDS = ("eval", "b", "--prompts", "p.tsv", "--steps", "1", "--width", "64", "--height", "64")


@pytest.fixture
def sdopt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Shell:
    monkeypatch.chdir(tmp_path)
    toy.restage(toy.bundle(tmp_path / "b"), "unet", "other")
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\na cat\tX\na horse\tY\na cow\tX\n")
    (tmp_path / "mine.py").write_text("def long(images, prompts):\n    return map(len, prompts)\n")
    return Shell(monkeypatch, capsys)


def test_tables_go_to_people_and_the_folder_to_pipes(sdopt: Shell) -> None:
    words = (*WORDS, "--stage", "model", "--stage", "other", "--scorer", "mine.py:long")
    code, out, err = sdopt(*words, "--images-per-prompt", "2", "--html", "page.html")
    assert (code, out) == (0, "evaluation\n")
    lines = [line.split() for line in err.splitlines()]
    # a cat, a horse, a cow: 5, 7, 5 letters; their deviation is 2 / sqrt(3), over sqrt(3).
    assert lines[2][:8] == ["model", "6", "5.6667", "±", "0.6667", "5.6667", "±", "0.6667"]
    assert lines[3][8:12] == ["+0.0000", "±", "0.0000", "1.0000"]
    assert ["X", "2", "5.0000", "±", "0.0000", "5.0000", "±", "0.0000"] in lines
    assert ["Y", "1", "7.0000", "7.0000"] in lines
    assert Path("page.html").read_text().count("<figure><img src=") == 6


def test_json_is_what_was_written(sdopt: Shell) -> None:
    code, out, err = sdopt(*WORDS, "--categories", "X, Y", "--limit", "2", "-o", "out", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found == json.loads(Path("out/evaluation.json").read_text())
    assert [one["text"] for one in found["prompts"]] == ["a cat", "a horse"]
    assert found["stages"][0]["score"] is None
    code, out, err = sdopt(*WORDS, "--steps", "2", "-o", "out")
    assert (code, out) == (2, "")
    assert "steps was 1, is 2" in err
