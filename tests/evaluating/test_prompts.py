"""Prompts as PartiPrompts has them: what is read, and which line an error names."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from sdopt.errors import UnknownNameError, UsageError
from sdopt.evaluating.prompts import UNSPECIFIED, Prompt, read_prompts
from tests.runtime.toy import DIGITS

HEADER = "Prompt\tCategory\tChallenge\tNote\n"


def table(folder: Path, text: str) -> Path:
    path = folder / "prompts.tsv"
    path.write_text(text, "utf-8")
    return path


def test_a_table_with_quotes_blank_lines_and_missing_notes(tmp_path: Path) -> None:
    text = (
        "\ufeff" + HEADER + "a cat\tAnimals\tBasic\t\n"
        '"a sign that says ""Héllo"""\tArts\tWriting\n\n'
        "  a dog \tAnimals\n"
    )
    assert read_prompts(table(tmp_path, text)) == (
        Prompt(0, "a cat", "Animals"),
        Prompt(1, 'a sign that says "Héllo"', "Arts"),
        Prompt(2, "a dog", "Animals"),
    )


def test_columns_go_by_their_names(tmp_path: Path) -> None:
    text = "Note\tCategory\tPrompt\r\nx\tArts\ta bust\r\n"
    assert read_prompts(table(tmp_path, text)) == (Prompt(0, "a bust", "Arts"),)


def test_what_is_left_out_moves_no_index(tmp_path: Path) -> None:
    path = table(tmp_path, HEADER + "a\tX\nb\tY\nc\tX\nd\tY\n")
    assert [one.index for one in read_prompts(path, categories=["Y"])] == [1, 3]
    assert read_prompts(path, categories=["Y"], limit=1) == (Prompt(1, "b", "Y"),)
    with pytest.raises(UnknownNameError, match="'Z'"):
        read_prompts(path, categories=["Z"])


def test_text_has_a_prompt_a_line_without_a_category(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog\tin a tab\n")
    assert read_prompts(path) == (
        Prompt(0, "a cat", UNSPECIFIED),
        Prompt(1, "a dog\tin a tab", UNSPECIFIED),
    )
    assert read_prompts(["x"], limit=5) == (Prompt(0, "x"),)


@pytest.mark.parametrize(
    ("text", "where", "why"),
    [
        ("Prompt\tKind\na\tb\n", "line 1", "'Prompt', 'Kind'"),
        ("prompt\tcategory\na\tb\n", "line 1", "'prompt', 'category'"),
        (HEADER + "a\tX\nb\t\n", "line 3", "Category is empty"),
        (HEADER + "a\tX\nb\n", "line 3", "Category is empty"),
        (HEADER + "a\tX\n\tX\n", "line 3", "Prompt is empty"),
        (HEADER + "a\tX\t\t\ty\n", "line 2", "5 fields, the header has 4"),
        (HEADER + 'a\tX\n"b\tX\nc\tX\n', "line 3", ""),
        (HEADER + 'a\tX\n"b" c\tX\n', "line 3", ""),
        ("Prompt\tCategory\tNote\tNote\na\tX\n", "line 1", "one name"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, where: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_prompts(table(tmp_path, text))
    assert (caught.value.where or "").endswith(where)
    assert why in (caught.value.why or "")


def test_what_is_no_file_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for path, why in (("latin.txt", "UTF-8"), ("nowhere.tsv", "No such file")):
        with pytest.raises(UsageError) as caught:
            read_prompts(tmp_path / path)
        assert why in str(caught.value)
    with pytest.raises(UsageError, match="no prompt in it"):
        read_prompts(table(tmp_path, HEADER))
    with pytest.raises(UsageError, match="limit"):
        read_prompts(["a"], limit=0)


def test_the_digits_have_a_table_that_their_scorer_understands() -> None:
    spec = importlib.util.spec_from_file_location("digits_scorer", DIGITS / "scorer.py")
    assert spec is not None
    assert spec.loader is not None
    scorer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scorer)
    found = read_prompts(DIGITS / "prompts.tsv")
    assert [scorer.digit_of(one.text) for one in found] == list(range(10))
    assert [one.category for one in found] == ["Even", "Odd"] * 5
    data = scorer._digits()[0].load_data()
    pictures = scorer._digits()[0].draw(data.held_x[:20])
    asked = [f"the digit {digit}" for digit in data.held_y[:20]]
    assert sum(scorer.right(pictures, asked)) >= 19
    assert 0.8 < sum(scorer.sure(pictures, asked)) / 20 < 1
    others = [f"the digit {(digit + 1) % 10}" for digit in data.held_y[:20]]
    assert sum(scorer.right(pictures, others)) <= 1
    assert sum(scorer.sure(pictures, others)) / 20 < 0.1
    for wrong in ("a cat", "a handwritten one and 2"):
        with pytest.raises(ValueError, match="digits"):
            scorer.right(pictures[:1], [wrong])
