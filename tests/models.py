"""What each model family is exported as, what passes find in it, and which targets take it.

``python -m tests.models`` writes docs/models.md; tests/test_models.py makes the same again on
tiny versions of the families and compares.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdopt import api
from sdopt.bundle import Bundle
from sdopt.errors import SdoptError
from sdopt.report import Report, is_kind
from tests.exporters.made import MODELS, export

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
RECORD = Path(__file__).with_name("models.json")

PASSES = ("@fast", "tome=2", "hoist", "deep_cache=3", "cfg_parallel", "cast_fp16", "quantize=w8")
"""What is tried; all but the first behind it."""

TARGETS = {
    "ort": "ort",
    "ort:provider=cuda": "ort:provider=cuda:dtype=fp16",
    "trt": "trt:dtype=fp16",
    "trt_rtx": "trt_rtx:dtype=fp16",
    "atc": "atc:soc=Ascend310P3:dtype=fp16",
    "tpu": "tpu",
    "onnx:opset=17": "onnx:opset=17",
}
EMITTED = ("ort:provider=cuda", "atc", "tpu")
"""Those whose compiler or runtime is not here: lowered, checked and written."""
CHECKED = ("trt", "trt_rtx")
"""Those whose lowered graphs TensorRT-RTX's parser takes; ort and onnx are built."""


INTRODUCTION = """# Models

Each family as a tiny random pipeline of its own structure, made, exported, optimized and lowered
by `python -m tests.models`, which wrote this page; `tests/test_models.py` does it again in CI.
That their outputs equal PyTorch's, by component and by whole images of the family's own diffusers
pipelines, is in `tests/exporters`.

## Export

Nodes as exported, and after `@fast`.
"""

OF_PASSES = """
## Passes

Places that have the pass's form afterwards, of those that were found, over all components; the
passes after `@fast` run behind it. Full-size models have the same structure and more of each: SD
1.5's UNet has 32 attentions, XL's 140, SD3.5-large's transformer 38.
"""

OF_TARGETS = """
## Targets

At 64x64 pixels. `ort` and `onnx` are built; `trt` and `trt_rtx` are parsed by TensorRT-RTX's
parser; the others are lowered, checked against the target's own table of operators, and written
for its compiler.
"""


@dataclass(frozen=True)
class Found:
    """What a model gave.

    Attributes:
        components: each component and its nodes, as exported and after ``@fast``.
        passes: each pass and, over all components, what it did: ``done/found`` of each kind, or
            why not.
        targets: each target, and ``yes`` or why not.
    """

    components: dict[str, tuple[int, int]]
    passes: dict[str, str]
    targets: dict[str, str]


def describe(bundle: Path) -> Found:
    """Run the passes over an exported model, and lower it for every target."""
    fast = api.optimize(bundle, "@fast")
    opened = Bundle.open(bundle)
    raw = {
        name: sum(1 for _ in opened.stage(name, "model").load().graph.all_nodes())
        for name in opened.components
    }
    return Found(
        {one.component: (raw[one.component], one.nodes) for one in fast.components},
        {"@fast": _counts(fast), **{name: _tried(bundle, name) for name in PASSES[1:]}},
        {name: _built(bundle, name, spec) for name, spec in TARGETS.items()},
    )


def check(name: str, bundle: Path) -> None:
    """Hold what an exported model gives against the record."""
    assert describe(bundle) == recorded()[name], f"run python -m tests.models {name}"


def _tried(bundle: Path, name: str) -> str:
    try:
        report = api.optimize(bundle, name, source="optimized", stage="tried", dry_run=True)
    except SdoptError as error:
        return f"no: {error.what}"
    return _counts(report, name)


def _counts(report: Report, name: str = "") -> str:
    """``attention 32/32``, over all components, of all passes or of the one called ``name``."""
    done: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for one in report.components:
        steps = [step for step in one.passes if name in ("", step.spec)]
        kinds = {each.kind: each for s in steps for each in s.coverage() if is_kind(each.kind)}
        for kind, each in kinds.items():
            done[kind] += each.done
            found[kind] += each.found
    return ", ".join(f"{kind} {done[kind]}/{found[kind]}" for kind in sorted(found)) or "nothing"


def _built(bundle: Path, name: str, spec: str) -> str:
    options: dict[str, Any] = {"shapes": "64x64"}
    if name in EMITTED:
        options["emit_only"] = True
    if name in CHECKED:
        options["check"] = True
    try:
        api.build(bundle, spec, **options)
    except SdoptError as error:
        return f"no: {error.what}"
    return "yes"


def page(found: Mapping[str, Found]) -> str:
    """docs/models.md."""
    lines = [*INTRODUCTION.split("\n"), "| model | components |", "| --- | --- |"]
    for name, one in found.items():
        parts = [f"`{part}` {a} → {b}" for part, (a, b) in one.components.items()]
        lines.append(f"| {MODELS[name][0]} | {', '.join(parts)} |")
    lines += [*OF_PASSES.split("\n"), *_head(PASSES)]
    for name, one in found.items():
        cells = [one.passes[each] for each in PASSES]
        lines.append(f"| {MODELS[name][0]} | " + " | ".join(cells) + " |")
    lines += [*OF_TARGETS.split("\n"), *_head(TARGETS)]
    for name, one in found.items():
        lines.append(f"| {MODELS[name][0]} | " + " | ".join(one.targets.values()) + " |")
    return "\n".join(lines) + "\n"


def _head(names: Iterable[str]) -> list[str]:
    columns = [f"`{name}`" for name in names]
    return [f"| model | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]


def recorded() -> dict[str, Found]:
    """What the last run of this module found."""
    table = json.loads(RECORD.read_text("utf-8"))
    return {
        name: Found(
            {part: tuple(sizes) for part, sizes in one["components"].items()},
            one["passes"],
            one["targets"],
        )
        for name, one in table.items()
    }


def everything(names: list[str]) -> Iterator[tuple[str, Found]]:
    """Each model in a folder of its own."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            export(name, place / "source", place / "bundle", place / "tokenizers")
            yield name, describe(place / "bundle")


def main() -> None:
    """Make the models that are named, or all, and write the record and the page."""
    logging.disable(logging.WARNING)
    known = recorded() if RECORD.is_file() else {}
    known |= dict(everything(sys.argv[1:] or list(MODELS)))
    found = {name: known[name] for name in MODELS if name in known}
    table = {name: dataclasses.asdict(one) for name, one in found.items()}
    RECORD.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
