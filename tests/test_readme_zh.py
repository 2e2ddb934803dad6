"""README.zh-CN.md mirrors README.md: all that is not prose is the same, section by section."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
ENGLISH = "README.md"
CHINESE = "README.zh-CN.md"
MARKDOWN = MarkdownIt("commonmark").enable("table")

NUMBER = re.compile(r"\d+(?:\.\d+)*")
COMMENT = re.compile(r"(^|\s)#.*$", re.M)
HAN = re.compile(r"[\u4e00-\u9fff]")
WORD = re.compile(r"[A-Za-z][\w.+-]+", re.A)
PROPER_NOUNS = 4
"""As many words in a row may be names, and stand untranslated."""


@dataclass
class Section:
    """What follows one heading, up to the next of any depth."""

    title: str
    depth: int
    line: int
    tokens: list[Token] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.title!r} (line {self.line})"

    @property
    def inlines(self) -> list[Token]:
        return [token for token in self.tokens if token.type == "inline"]

    def spans(self, *types: str) -> Iterator[Token]:
        for inline in self.inlines:
            yield from (span for span in inline.children or () if span.type in types)


def sections(text: str) -> list[Section]:
    tokens = MARKDOWN.parse(text)
    found = [Section("what is before the first heading", 0, 1)]
    for at, token in enumerate(tokens):
        if token.type == "heading_open":
            assert token.map is not None
            title = tokens[at + 1].content
            found.append(Section(title, int(token.tag[1:]), token.map[0] + 1))
        found[-1].tokens.append(token)
    return found


def blocks(section: Section) -> list[str]:
    """Paragraphs, lists and blocks of code in order; tables as one each."""
    kinds = {"fence", "code_block", "html_block", "list_item_open", "paragraph_open", "table_open"}
    return [
        f"{token.type.removesuffix('_open')} {token.info}".strip()
        for token in section.tokens
        if token.type in kinds
    ]


def code(section: Section) -> list[str]:
    """Blocks of code; what a comment says in one of ``text`` is prose."""
    return [
        COMMENT.sub(r"\1#", token.content) if token.info == "text" else token.content
        for token in section.tokens
        if token.type in {"fence", "code_block"}
    ]


def tables(section: Section) -> list[list[list[Token]]]:
    """Tables, their rows, their cells."""
    found: list[list[list[Token]]] = []
    for at, token in enumerate(section.tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in {"th_open", "td_open"}:
            found[-1][-1].append(section.tokens[at + 1])
    return found


def prose(inline: Token) -> str:
    return " ".join(span.content for span in inline.children or () if span.type == "text")


def same_cell(ours: Token, theirs: Token) -> bool:
    """Code, numbers and emphasis in order; where there are no words, all of it."""
    if not WORD.search(prose(ours)):
        return ours.content == theirs.content
    kept = [
        [
            span.content if span.type == "code_inline" else NUMBER.findall(span.content)
            for span in cell.children or ()
            if span.type in {"code_inline", "strong_open"} or NUMBER.search(span.content)
        ]
        for cell in (ours, theirs)
    ]
    return kept[0] == kept[1]


def links(section: Section) -> Counter[str]:
    """Where links lead and images lie; those from one language to the other are one."""
    found = [
        str(span.attrs["href" if span.type == "link_open" else "src"])
        for span in section.spans("link_open", "image")
    ]
    html = [re.sub(r'alt="[^"]*"', "", span.content) for span in section.spans("html_inline")]
    return Counter(html + ["the other README" if it in {ENGLISH, CHINESE} else it for it in found])


def several(what: str, ours: Iterable[str], theirs: Iterable[str]) -> Iterator[str]:
    """What one side has more often than the other."""
    left, right = Counter(ours), Counter(theirs)
    for one in (left - right) | (right - left):
        yield f"{what} {one!r}: {left[one]} in English, {right[one]} in Chinese"


def in_tables(ours: Section, theirs: Section) -> Iterator[str]:
    for number, (left, right) in enumerate(zip(tables(ours), tables(theirs), strict=True), 1):
        if [len(row) for row in left] != [len(row) for row in right]:
            sizes = f"{len(left)}x{len(left[0])} and {len(right)}x{len(right[0])}"
            yield f"table {number}: {sizes} rows and columns"
            continue
        for at, row in enumerate(zip(left, right, strict=True)):
            for a, b in zip(*row, strict=True):
                if not same_cell(a, b):
                    yield f"table {number}, row {at}: {a.content!r} became {b.content!r}"


def in_section(ours: Section, theirs: Section) -> Iterator[str]:
    if ours.depth == 3 and ours.title != theirs.title:
        yield f"a verb's heading became {theirs.title!r}"
    if (left := blocks(ours)) != (right := blocks(theirs)):
        yield f"blocks are {', '.join(left)} in English and {', '.join(right)} in Chinese"
        return
    for number, (a, b) in enumerate(zip(code(ours), code(theirs), strict=True), 1):
        if a != b:
            yield f"block of code {number}:\n{a}became\n{b}"
    yield from in_tables(ours, theirs)
    yield from several("link or image", links(ours), links(theirs))
    spans = [{span.content for span in side.spans("code_inline")} for side in (ours, theirs)]
    yield from several("inline code", *spans)
    numbers = [NUMBER.findall(" ".join(map(prose, side.inlines))) for side in (ours, theirs)]
    yield from several("number", *numbers)
    marks = [
        [span.type for span in side.spans("strong_open", "em_open")] for side in (ours, theirs)
    ]
    yield from several("emphasis", *marks)
    for inline in theirs.inlines:
        text = prose(inline)
        if len(WORD.findall(text)) > PROPER_NOUNS and not HAN.search(text):
            yield f"not translated: {text!r}"


def differences(english: str, chinese: str) -> list[str]:
    """One line for each thing in which the two are not the same, with its English section."""
    ours, theirs = sections(english), sections(chinese)
    for left, right in zip(ours, theirs, strict=False):
        if left.depth != right.depth:
            return [f"{left} of depth {left.depth} meets {right} of depth {right.depth}"]
    if len(ours) != len(theirs):
        rest = (ours[len(theirs) :] or theirs[len(ours) :])[0]
        return [f"{len(ours) - 1} headings, {len(theirs) - 1} in Chinese: {rest} has no other"]
    pairs = zip(ours, theirs, strict=True)
    return [f"{left}: {what}" for left, right in pairs for what in in_section(left, right)]


def test_the_chinese_readme_has_all_that_the_english_one_has() -> None:
    found = differences(*((ROOT / name).read_text("utf-8") for name in (ENGLISH, CHINESE)))
    assert not found, "\n".join([f"{CHINESE} differs from {ENGLISH}", *found])


LEFT = """
# sdopt
[Chinese](README.zh-CN.md)
![Ten digits](docs/digits.png)

    source --export--> bundle

It **draws** in 10 steps, with `--steps`.

- See [the passes](docs/passes.md).

### run
```bash
sdopt run bundle --steps 10
```
```text
make demo   # draws digits
```
```python
import sdopt
```
| target | makes | ms |
| --- | --- | --- |
| `ort` | a graph of opset 23, `cpu` | **6.60** |
| `tpu` | a bmodel | 19.0, 22.4 |

[<img src="docs/report.png" width="420" alt="A report">](docs/report.png)
"""

RIGHT = """
# sdopt
[English](README.md)
![十个数字](docs/digits.png)

    source --export--> bundle

按照 `--steps` 以 10 步**画图**。

- 见[各个 pass](docs/passes.md)。

### run
```bash
sdopt run bundle --steps 10
```
```text
make demo   # 画数字
```
```python
import sdopt
```
| 目标平台 | 产物 | ms |
| --- | --- | --- |
| `ort` | opset 23 的图、`cpu` | **6.60** |
| `tpu` | 一个 bmodel | 19.0, 22.4 |

[<img src="docs/report.png" width="420" alt="一份报告">](docs/report.png)
"""


def test_prose_links_between_the_languages_and_comments_in_text_may_differ() -> None:
    assert differences(LEFT, RIGHT) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("### run", "#### run", "'run' (line 12) of depth 3 meets 'run' (line 12) of depth 4"),
        ("### run\n", "", "2 headings, 1 in Chinese: 'run' (line 12) has no other"),
        ("### run", "### 运行", "'run' (line 12): a verb's heading became '运行'"),
        ("- 见", "见", "'sdopt' (line 2): blocks are"),
        ("```bash", "```text", "'run' (line 12): blocks are fence bash, fence text"),
        ("--steps 10\n", "--steps 20\n", "'run' (line 12): block of code 1:\nsdopt run bundle"),
        ("make demo ", "make test ", "'run' (line 12): block of code 2:\nmake demo"),
        ("import sdopt", "import  sdopt", "'run' (line 12): block of code 3:\nimport sdopt"),
        ("--export-->", "--导出-->", "'sdopt' (line 2): block of code 1:"),
        ("| `tpu` | 一个 bmodel | 19.0, 22.4 |\n", "", "table 1: 3x3 and 2x3 rows and columns"),
        ("| `ort` |", "| `trt` |", "table 1, row 1: '`ort`' became '`trt`'"),
        ("opset 23 的", "opset 22 的", "table 1, row 1: 'a graph of opset 23, `cpu`' became"),
        ("、`cpu`", "、cpu", "table 1, row 1: 'a graph of opset 23, `cpu`' became"),
        ("**6.60**", "6.60", "table 1, row 1: '**6.60**' became '6.60'"),
        ("19.0, 22.4", "22.4, 19.0", "table 1, row 2: '19.0, 22.4' became '22.4, 19.0'"),
        ("docs/passes.md", "docs/pass.md", "link or image 'docs/pass.md': 0 in English, 1 in"),
        ("docs/digits.png", "digits.png", "link or image 'docs/digits.png': 1 in English, 0 in"),
        ('width="420"', 'width="42"', "link or image '<img src="),
        ("[English](README.md)\n", "", "link or image 'the other README': 1 in English, 0 in"),
        ("`--steps`", "`--step`", "inline code '--steps': 1 in English, 0 in Chinese"),
        ("10 步", "20 步", "number '10': 1 in English, 0 in Chinese"),
        ("**画图**", "画图", "emphasis 'strong_open': 1 in English, 0 in Chinese"),
        ("**画图**", "** 画图 **", "emphasis 'strong_open': 1 in English, 0 in Chinese"),
        ("一个 bmodel", "a bmodel that runs on a card", "not translated: 'a bmodel that runs"),
    ],
)
def test_what_may_not_differ_is_said(old: str, new: str, said: str) -> None:
    assert RIGHT.count(old) == 1
    assert said in "\n".join(differences(LEFT, RIGHT.replace(old, new)))
