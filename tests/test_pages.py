"""The pages of the passes: docs/passes.md against the registry, and how a page is made."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import onnx_ir as ir
import pytest

from sdopt import pages, registry, spec
from sdopt.errors import UsageError
from sdopt.passes.base import ANY, Intent, Interface, Numerics, Pass, PassContext, Role
from sdopt.passes.presets import PRESETS
from sdopt.pipeline import Pipeline

DOCS = Path(__file__).parent.parent / "docs" / "passes.md"
SECTIONS = {part.split("\n", 1)[0]: part for part in DOCS.read_text("utf-8").split("\n## ")[1:]}
NAMES = list(registry.PASSES)


def facts(section: str) -> dict[str, str]:
    return dict(re.findall(r"^- ([^:]+): (.*)$", section, re.M))


def test_the_file_is_what_the_passes_say_today() -> None:
    assert DOCS.read_text("utf-8") == pages.document(), "run: make docs"


def test_every_pass_has_a_section_and_nothing_else_has() -> None:
    assert list(SECTIONS) == NAMES
    head = DOCS.read_text("utf-8").split("\n## ")[0]
    assert re.findall(r"^\| \[`(\w+)`\]\(#\1\)", head, re.M) == NAMES
    for name, passes in PRESETS.items():
        assert f"- `@{name}` is `{passes}`\n" in head


# What follows reads the classes by itself, so that a mistake in sdopt.pages shows.


@pytest.mark.parametrize("name", NAMES)
def test_a_section_has_what_the_author_wrote(name: str) -> None:
    section, cls = SECTIONS[name], registry.resolve("passes", name)
    for heading in ("Before / After", "Applies when", "Numerics"):
        assert f"\n**{heading}**:" in section
    assert f"\n**Numerics**: {cls.numerics.value}" in section
    # Every word of the docstring that is no heading or option's name is on the page.
    page = set(section.replace("**", "").replace(r"\|", "|").split())
    for word in (inspect.getdoc(cls) or "").replace("``", "`").split():
        assert word in page or word == "**" or word.endswith(":"), f"{word} is lost"


@pytest.mark.parametrize("name", NAMES)
def test_a_section_has_every_option_with_its_default(name: str) -> None:
    section, cls = SECTIONS[name], registry.resolve("passes", name)
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+) \|$", section, re.M)
    assert [row[0] for row in rows] == [field.name for field in dataclasses.fields(cls)]
    for (_, takes, default, meaning), field in zip(rows, dataclasses.fields(cls), strict=True):
        if field.default is dataclasses.MISSING:
            assert default == "required"
        elif field.default in (None, ()):
            assert default == "none"
        elif isinstance(field.default, bool):
            assert default == str(field.default).lower()
        elif field.default != "":
            assert default == str(field.default)
        assert takes
        assert len(meaning) > 10
    assert rows or "**Options**: none." in section


@pytest.mark.parametrize("name", NAMES)
def test_a_section_has_the_facts_of_the_class(name: str) -> None:
    found, cls = facts(SECTIONS[name]), registry.resolve("passes", name)
    if cls.roles == ANY:
        assert found["For"] == "every component"
    else:
        words = {role.value for role in cls.roles} - {Role.MODEL.value}
        words |= {"a single ONNX file"} if Role.MODEL in cls.roles else set()
        assert set(found["For"].split(", ")) == words
    after = found["Comes after"].split(", ")
    assert after == (list(cls.after) or ["nothing in particular"])
    assert ("may change" in found["Interface"]) == (cls.interface is Interface.CHANGES)
    assert (found["Applied twice"] == "refused") == cls.once
    assert ("Changes" in found) == (cls.intent is Intent.OTHER)
    presets = [f"@{word}" for word, text in PRESETS.items() if name in names_in(text)]
    assert found["In presets"] == (", ".join(presets) or "none")


def names_in(text: str) -> set[str]:
    return {item.name for item in spec.parse(text)}


@pytest.mark.parametrize("word", list(registry.TARGETS))
def test_what_a_target_wants_says_so(word: str) -> None:
    wants = names_in(registry.resolve("targets", word)().wants)
    for name in NAMES:
        wanting = {one.split(":")[0] for one in facts(SECTIONS[name])["Wanted by"].split(", ")}
        if name in wants:
            assert word in wanting


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_a_command_that_could_run(name: str) -> None:
    (block,) = re.findall(r"\n```text\n((?:[A-Z]+=\S+ )?sdopt (?:.|\n)*?)```", SECTIONS[name])
    block = block.replace("deep_cache=EVERY", "deep_cache=3")
    for line in block.splitlines():
        words = [word for word in shlex.split(line) if not re.match(r"[A-Z]+=", word)]
        assert words[0] == "sdopt"
        if words[1] == "build":
            target = registry.resolve("targets", words[words.index("--target") + 1])()
            assert name in names_in(target.wants)
        else:
            passes = Pipeline.parse(words[words.index("--passes") + 1]).passes
            assert name in [one.name() for one in passes]


# How a page is made


@dataclass(frozen=True)
class Sample(Pass):
    """Do something to ``x``.

    There is more of it, and no line inside a paragraph
    Begins a section: as here.

    Before / After:
        A  ->  B

        C  ->  D

    Applies when: always. See
    below.

    Numerics: exact.

    Options:
        most: how many,
            at most.
        names: which, ``a|b``.

    Why this form: because

        1  2

    of that.

    Example:
        sdopt one
        sdopt two
    """

    most: int
    names: tuple[str, ...] = ("a", "b")
    mode: Literal["up", "down"] = "up"
    fast: bool = True
    part: float | None = None

    numerics: ClassVar[Numerics] = Numerics.EXACT
    roles: ClassVar[frozenset[Role]] = frozenset({Role.MODEL, Role.VAE_DECODER})
    after: ClassVar[tuple[str, ...]] = ("clean",)
    interface: ClassVar[Interface] = Interface.CHANGES
    once: ClassVar[bool] = True
    intent: ClassVar[Intent] = Intent.OTHER

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Nothing."""


TEXT = """\
sample

Do something to `x`.

There is more of it, and no line inside a paragraph
Begins a section: as here.

Before / After:
    A  ->  B

    C  ->  D

Applies when: always. See
below.

Numerics: exact.

Why this form: because

    1  2

of that.

Options:
    most (a whole number; required): how many, at most.
    names (words joined by +; default a+b): which, `a|b`.
    mode (up or down; default up):
    fast (true or false; default true):
    part (a number; default none):

Changes:       what the model computes, on purpose
For:           vae decoder, a single ONNX file
Comes after:   clean
Interface:     inputs and outputs may change
Applied twice: refused
Wanted by:     no target by itself
In presets:    none

Example:
    sdopt one
    sdopt two"""

MARKDOWN = r"""## sample

Do something to `x`.

There is more of it, and no line inside a paragraph
Begins a section: as here.

**Before / After**:

```text
A  ->  B

C  ->  D
```

**Applies when**: always. See
below.

**Numerics**: exact.

**Why this form**: because

```text
1  2
```

of that.

| option | takes | default | what it does |
| --- | --- | --- | --- |
| `most` | a whole number | required | how many, at most. |
| `names` | words joined by + | a+b | which, `a\|b`. |
| `mode` | up or down | up |  |
| `fast` | true or false | true |  |
| `part` | a number | none |  |

- Changes: what the model computes, on purpose
- For: vae decoder, a single ONNX file
- Comes after: clean
- Interface: inputs and outputs may change
- Applied twice: refused
- Wanted by: no target by itself
- In presets: none

```text
sdopt one
sdopt two
```"""


def test_a_page_as_text_and_as_markdown() -> None:
    one = pages.page(Sample)
    assert one.text() == TEXT
    assert one.markdown() == MARKDOWN


@dataclass(frozen=True)
class Bare(Pass):
    count: int

    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Nothing."""


def test_a_page_of_a_pass_without_a_docstring_has_its_facts() -> None:
    one = pages.page(Bare)
    assert one.numerics == "lossy"
    assert one.examples == ("sdopt optimize BUNDLE --passes bare=COUNT",)
    assert "count (a whole number; required)" in one.text()
    assert "| `count` | a whole number | required |" in one.markdown()


@dataclass(frozen=True)
class Runtime:
    """A target that wants another pass on each of its devices, and has one that is not there."""

    device: Literal["cpu", "gpu", "later"] = "cpu"
    threads: int = 0

    def __post_init__(self) -> None:
        if self.device == "later":
            raise UsageError("not there yet")

    @property
    def wants(self) -> str:
        return {"cpu": "@clean,tome=1", "gpu": "clean,fuse_qkv"}[self.device]

    def __str__(self) -> str:
        return str(spec.unbind(self, "runtime"))


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(registry.TARGETS, "runtime", f"{__name__}:Runtime")
    registry.table.cache_clear()
    yield
    registry.table.cache_clear()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("clean", "ort, trt, trt_rtx, tpu, runtime"),
        ("fuse_qkv", "runtime:device=gpu"),
        ("tome", "runtime"),
        ("lora", "no target by itself"),
    ],
)
def test_a_target_is_asked_with_each_word_of_its_options(
    runtime: None, name: str, wanted: str
) -> None:
    one = pages.page(registry.resolve("passes", name))
    assert dict(one.facts)["Wanted by"] == wanted
