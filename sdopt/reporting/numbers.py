"""The section that measures how far each stage's outputs are from the raw one's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from sdopt.bundle import RAW
from sdopt.compare import LayerComparison, compare, compare_layers
from sdopt.compare.comparison import ComponentComparison
from sdopt.compare.figures import Figures
from sdopt.drawing.charts import Chart, axis, points
from sdopt.drawing.page import Cell, Page
from sdopt.errors import SdoptError
from sdopt.report import Progress, part
from sdopt.reporting.gather import Gathered

_FIGURES = ("relative L2", "max abs", "cosine", "PSNR dB")
_TONES = {"same": "good", "different": "bad"}


@dataclass(frozen=True)
class Compared:
    """One component of one stage against the raw one, or ``why`` it cannot be computed here.

    ``layers`` are there where an output differs; ``why_no_layers`` says why they are not.
    """

    component: str
    stage: str
    result: ComponentComparison | None
    why: str = ""
    layers: LayerComparison | None = None
    why_no_layers: str = ""


def numbers(page: Page, all_: Gathered, seed: int, progress: Progress) -> list[str]:
    """Compare every chosen stage with the raw one, component by component.

    Returns:
        Notes on what could not be computed.
    """
    page.section("Numbers")
    pairs = [
        (name, stage)
        for name in all_.components
        for stage in all_.others()
        if all_.has(name, stage) and all_.has(name, RAW)
    ]
    if not pairs:
        page.text(
            "Nothing to compare: there is no other stage beside the raw one, or no raw one beside "
            "the others."
        )
        return []
    found = list(_measure(all_, pairs, seed, progress))
    page.text(
        "Measured for this page: the same seeded inputs through the stage and through the raw "
        "one, by ONNX Runtime on the CPU with its own optimisations off. Same means: within what "
        "the passes between the two may do; unjudged: they change the function, so that only "
        "images tell."
    )
    page.table(
        ["component", "stage", "verdict", "allowed", "output", *_FIGURES],
        [row for one in found if one.result is not None for row in _rows(one, one.result)],
        caption=f"Each stage against {RAW}, seed {seed}",
    )
    chart = _chart(found)
    if chart is not None:
        page.chart(chart)
    _layers(page, found)
    with page.folded("Why each is judged so"):
        for one in found:
            if one.result is not None:
                page.details(f"{one.component}@{one.stage}", _reasons(one.result))
    notes = [f"{one.component}@{one.stage}: {one.why}" for one in found if one.why]
    for note in notes:
        page.text(f"Not computed here: {note}", tone="bad")
    return notes


def _measure(
    all_: Gathered, pairs: list[tuple[str, str]], seed: int, progress: Progress
) -> Iterator[Compared]:
    path = all_.bundle.path
    for index, (name, stage) in enumerate(pairs):
        tell = part(progress, index, len(pairs))
        tell(f"compare {name}@{stage}", 0.0)
        yield _against_raw(f"{path}@{stage}", f"{path}@{RAW}", name, stage, seed)


def _against_raw(a: str, b: str, name: str, stage: str, seed: int) -> Compared:
    """Outputs, and where one differs layers; a graph for another machine is said, not raised."""
    try:
        (one,) = compare(a, b, components=[name], seed=seed).components
    except SdoptError as error:
        return Compared(name, stage, None, said(error))
    if all(each.finite and each.relative_l2 == 0 for each in one.outputs):
        return Compared(name, stage, one)
    try:
        (layers,) = compare_layers(a, b, components=[name], seed=seed)
    except SdoptError as error:
        return Compared(name, stage, one, why_no_layers=said(error))
    return Compared(name, stage, one, layers=layers)


def _layers(page: Page, found: list[Compared]) -> None:
    page.heading("Error by depth")
    page.text(
        "Layer by layer against the raw stage, where an output differs at all: where the error "
        "begins, and how it grows."
    )
    for one in found:
        if one.layers is not None:
            jump = one.layers.first_jump
            page.text(
                f"{one.component}@{one.stage}: {one.layers.verdict()}.",
                tone="bad" if jump is not None and one.layers.allowed is not None else "",
            )
            if not any(_on_a_log_axis(layer.error) for layer in one.layers.layers):
                continue  # nothing that a chart could show
            title = f"{one.component}@{one.stage}: error by depth"
            page.chart(dataclasses.replace(one.layers.chart(), title=title))
            page.details(f"{one.component}@{one.stage}: farthest layers", one.layers.lines())
        elif one.why_no_layers:
            page.text(f"{one.component}@{one.stage}: not looked into: {one.why_no_layers}", "bad")
    if not any(one.layers is not None or one.why_no_layers for one in found):
        page.text("No output that was compared differs.")


def _reasons(result: ComponentComparison) -> list[str]:
    return [
        result.reason,
        f"passes between: {', '.join(result.passes) or 'none'}",
        f"floating types: {', '.join(result.dtypes)}",
        *(f"{name}: {list(shape)}" for name, shape in result.shapes.items()),
    ]


def said(error: SdoptError) -> str:
    """An error in one line of a page."""
    return f"{error.message}: {error.why}" if error.why else error.message


def _rows(one: Compared, result: ComponentComparison) -> Iterator[list[object]]:
    verdict = Cell(result.verdict, _TONES.get(result.verdict, ""))
    allowed = "-" if result.allowed is None else f"{result.allowed:.2g}"
    for each in result.outputs:
        yield [one.component, one.stage, verdict, allowed, each.name, *_figures(each)]


def _figures(one: Figures) -> list[object]:
    if not one.finite:
        told = f"{one.nan_a + one.inf_a} of it and {one.nan_b + one.inf_b} of raw are not finite"
        return [Cell(told, "bad"), "", "", ""]
    psnr = "equal" if one.relative_l2 == 0 else f"{one.psnr_db:.1f}"
    return [f"{one.relative_l2:.2e}", f"{one.max_abs:.2e}", f"{one.cosine:.6f}", psnr]


def _chart(found: list[Compared]) -> Chart | None:
    rows = [
        {"component": one.component, "output": each.name, "stage": one.stage}
        | {"relative L2": each.relative_l2}
        for one in found
        if one.result is not None
        for each in one.result.outputs
    ]
    drawn = [row for row in rows if _on_a_log_axis(row["relative L2"])]
    if not drawn:
        return None
    left = len(rows) - len(drawn)
    return points(
        "How far each stage is from the raw one",
        drawn,
        axis("component", "", kind="nominal"),
        axis("relative L2", "relative L2", log=True),
        color=axis("stage", "", kind="nominal"),
        tooltip=["component", "output", "stage", "relative L2"],
        texts="Relative L2 of every output."
        + f" Not drawn: {left} that are equal or not finite." * bool(left),
    )


def _on_a_log_axis(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0
