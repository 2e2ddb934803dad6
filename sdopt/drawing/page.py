"""A page of text, tables, charts and images in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt import datafile
from sdopt.drawing.charts import Chart, renderer
from sdopt.errors import MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

_SNIPPET = """
for (const one of document.querySelectorAll("div.chart")) {
  const spec = JSON.parse(document.getElementById(one.id.replace("chart", "spec")).textContent);
  vegaEmbed(one, spec, {renderer: "svg", actions: {export: true, source: false, editor: false}})
    .then(() => { one.dataset.drawn = "yes"; })
    .catch(error => { one.textContent = String(error); });
}
"""


@dataclass(frozen=True)
class Cell:
    """A cell of a table that stands out.

    Attributes:
        text: what it says.
        tone: ``good``, ``bad`` or nothing.
        command: whether it is a command, which a button beside it copies.
    """

    text: str
    tone: str = ""
    command: bool = False

    def __str__(self) -> str:
        return self.text


class Page:
    """A page that is filled from top to bottom; whatever is put in is escaped.

    It holds the code that draws its charts, and its Content-Security-Policy keeps a browser from
    asking any server for anything.
    """

    def __init__(self, title: str, *lead: str) -> None:
        self._title, self._lead = title, lead
        self._sections: list[dict[str, Any]] = []
        self._items: list[dict[str, Any]] = []
        self._charts = 0
        self._copies = False

    def section(self, title: str = "") -> None:
        """What follows stands under this title, which the list on top leads to."""
        number = 1 + sum(1 for one in self._sections if one["title"])
        self._items = []
        self._sections.append({"title": title, "number": number, "content": self._items})

    def heading(self, text: str) -> None:
        """A title inside a section."""
        self._add("heading", text=text)

    def text(self, text: str, tone: str = "") -> None:
        """A paragraph; ``tone`` is ``good``, ``bad`` or nothing."""
        self._add("text", text=text, tone=tone)

    def code(self, text: str) -> None:
        """Lines as they are: a command, a recipe."""
        self._add("code", text=text)

    def command(self, text: str) -> None:
        """A command in one line, with a button that copies it."""
        self._copies = True
        self._add("command", text=text)

    def details(self, summary: str, lines: Sequence[str]) -> None:
        """Lines that are folded away below a summary."""
        self._add("details", summary=summary, lines=list(lines))

    @contextmanager
    def folded(self, summary: str) -> Iterator[None]:
        """What is put in inside is folded away below a summary."""
        items: list[dict[str, Any]] = []
        self._add("folded", summary=summary, content=items)
        outer, self._items = self._items, items
        try:
            yield
        finally:
            self._items = outer

    def table(
        self, heads: Sequence[str], rows: Sequence[Sequence[object]], caption: str = ""
    ) -> None:
        """A table; a column that holds numbers only (or texts that read as one) stands right.

        A cell is a ``Cell`` where it stands out.
        """
        numeric = [
            bool(rows) and all(_is_number(row[index]) for row in rows)
            for index in range(len(heads))
        ]
        self._copies |= any(isinstance(one, Cell) and one.command for row in rows for one in row)
        self._add("table", heads=list(heads), rows=rows, numeric=numeric, caption=caption)

    def chart(self, chart: Chart) -> None:
        """A chart that shows its tooltips on hover."""
        self._charts += 1
        self._add(
            "chart",
            title=chart.title,
            texts=chart.texts,
            spec=chart.full_spec(),
            number=self._charts,
        )

    def images(self, images: Sequence[tuple[str, Image]]) -> None:
        """Images side by side, each with its caption."""
        shown = [{"text": text, "url": data_url(image)} for text, image in images]
        self._add("images", images=shown)

    def html(self) -> str:
        """The whole page.

        Raises:
            MissingDependencyError: jinja2 or vl-convert-python is not installed.
        """
        script = _script() if self._charts else ""
        version = renderer().__version__ if self._charts else ""
        text: str = _template().render(
            title=self._title,
            lead=self._lead,
            sections=self._sections,
            script=script,
            version=version,
            copies=self._copies,
        )
        return text

    def write(self, path: str | Path) -> None:
        """Write the page to a file, whole or not at all.

        Raises:
            StorageError: the file cannot be written.
            MissingDependencyError: see ``html``.
        """
        datafile.write_bytes(Path(path), self.html().encode())

    def _add(self, kind: str, **fields: Any) -> None:
        if not self._sections:
            self.section()
        self._items.append({"kind": kind, **fields})


def require() -> None:
    """See that all that a page with charts needs is there, before anything is measured for it.

    Raises:
        MissingDependencyError: jinja2 or vl-convert-python is not installed.
    """
    renderer()
    _template()


def data_url(image: Image) -> str:
    """A Pillow image as the PNG in a ``data:`` URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@functools.cache
def _script() -> str:
    script: str = renderer().javascript_bundle(_SNIPPET)
    return script.replace("</script", "<\\/script")


def _template() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError(
            "pages need jinja2", why=str(error), hint='pip install "sdopt[report]"'
        ) from error
    places = jinja2.PackageLoader("sdopt.drawing", "")
    return jinja2.Environment(
        loader=places, autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("page.html.jinja")


def _is_number(value: object) -> bool:
    try:
        float(str(value).replace("%", "").replace("x", ""))
    except ValueError:
        return False
    return True
