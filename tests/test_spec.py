from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdopt import spec
from sdopt.errors import SpecError

WORD = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
VALUE = st.text(st.characters(codec="ascii", exclude_characters="\"'"), min_size=1, max_size=12)
PARTS = st.lists(VALUE, min_size=1, max_size=3).map(tuple)


@dataclass(frozen=True)
class Example:
    count: int
    ratio: float = 0.5
    keep: tuple[str, ...] = ()
    mode: Literal["resize", "crop"] = "resize"
    deep: bool = False
    note: str | None = None


@given(
    st.lists(
        st.builds(
            spec.Item,
            name=WORD,
            value=st.none() | PARTS,
            options=st.dictionaries(WORD, PARTS, max_size=3).map(lambda d: tuple(d.items())),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_items_survive_text(items: list[spec.Item]) -> None:
    assert list(spec.parse(spec.render(items))) == items


def test_a_pass_prints_the_text_that_it_was_parsed_from() -> None:
    text = "example=5:ratio=0.25:keep=io+mid_block.*:mode=crop:deep=true"
    (item,) = spec.parse(text)
    bound = spec.bind(Example, item)
    assert bound == Example(5, 0.25, ("io", "mid_block.*"), "crop", deep=True)
    assert str(spec.unbind(bound, "example")) == text


def test_defaults_are_left_out_of_the_text() -> None:
    assert str(spec.unbind(Example(5), "example")) == "example=5"


def test_the_first_option_may_be_named() -> None:
    (item,) = spec.parse("example:count=3")
    assert spec.bind(Example, item) == Example(3)


@pytest.mark.parametrize(
    ("text", "message", "caret"),
    [
        ("a,,b", "an empty item", (2, 1)),
        ("a:b", "an option without a value", (0, 3)),
        ("a=b=c", "two equals signs", (0, 5)),
        ("a='x", "a quote that is not closed", (2, 2)),
        ("a=:r=1", "a value is missing", (2, 1)),
        ("a:x=1:x=2", "given twice", (0, 9)),
        ("fine,2bad", "is not a name", (5, 4)),
    ],
)
def test_what_cannot_be_read_gets_a_caret(text: str, message: str, caret: tuple[int, int]) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        spec.parse(text)
    line, pointer = (caught.value.where or "").split("\n")
    assert line == text
    assert len(pointer) - len(pointer.lstrip()) >= caret[0] or pointer.strip() == "^" * len(text)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("example", "needs a value", "example=COUNT"),
        ("example=x", "a whole number", ""),
        ("example=1:ratio=lots", "a number", ""),
        ("example=1:mode=shrink", "one of resize, crop", ""),
        ("example=1:deep=yes", "true or false", ""),
        ("example=1+2", "one value, not 2", ""),
        ("example=1:ration=0.5", "no option 'ration'", "did you mean ratio"),
    ],
)
def test_a_wrong_option_says_what_it_must_be(text: str, message: str, hint: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        spec.bind(Example, spec.parse(text)[0])
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("cls", "word"), [("FuseQkv", "fuse_qkv"), ("CastFp16", "cast_fp16"), ("Tome", "tome")]
)
def test_class_names_become_words(cls: str, word: str) -> None:
    assert spec.snake_case(cls) == word
