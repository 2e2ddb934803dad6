"""The main job on a real model: export, optimize, build and run the digits pipeline.

Leaves in ``demo/``: the bundle, ``digits.png`` (each prompt by the raw graph, the optimized one,
and with token merging) and ``summary.txt``. ``make demo`` runs it; ``--count 50`` scores 500
images of each stage instead of ten.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "examples" / "digits"
OUT = ROOT / "demo"
sys.path.insert(0, str(DIGITS))

import digits  # noqa: E402 - lies beside the model that it describes

from sdopt import api  # noqa: E402
from sdopt.bundle import Bundle  # noqa: E402
from sdopt.report import Report  # noqa: E402

ROWS = {"raw": "model", "optimized": "ort_cpu", "tome=5": "tome5"}
SETTINGS = {"steps": digits.STEPS, "guidance": digits.GUIDANCE, "seed": digits.SEED}
ROUNDS = 10


def main() -> None:
    """Run every verb, draw the sheet, print the summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=1, help="images per prompt and stage")
    count = parser.parse_args().count
    shutil.rmtree(OUT, ignore_errors=True)
    began = time.perf_counter()
    bundle = OUT / "bundle"
    lines = ["export examples/digits --dtype fp32"]
    lines += describe(api.export(DIGITS, bundle, dtype="fp32"))
    for stage, passes in (
        ("optimized", "@fast"),
        ("tome5", "@fast,tome=5"),
        ("fp16", "@fast,cast_fp16:keep=io"),
    ):
        lines += ["", f"optimize --passes {passes} --stage {stage}"]
        lines += describe(api.optimize(bundle, passes, stage=stage), only="unet")
    lines += ["", "build --target ort"]
    lines += describe(api.build(bundle, "ort"), only="unet")
    lines += ["", *numbers(Bundle.open(bundle)), "", *draw(bundle, count)]
    lines += ["", f"all of it in {time.perf_counter() - began:.0f} s; look at demo/digits.png"]
    text = "\n".join(lines) + "\n"
    (OUT / "summary.txt").write_text(text)
    print(text, end="")


def describe(report: Report, only: str | None = None) -> Iterable[str]:
    """One line per component, one per pass of the component ``only``."""
    for one in report.components:
        if only in (None, one.component):
            size = f"{one.nodes:5} nodes {one.bytes_written / 1e6:6.1f} MB new"
            yield f"  {one.component:<13}{size}, {one.seconds:.1f} s"
            for each in one.passes:
                done = ", ".join(f"{n} {what}" for what, n in each.rewrites.items()) or "nothing"
                nodes = f"{each.nodes_before:5} -> {each.nodes_after:<5}"
                yield f"    {each.spec:<20}{nodes} {done}"[:99]


def numbers(bundle: Bundle) -> Iterable[str]:
    """Milliseconds per denoising step, fp32, and what fp16 costs in bytes and error."""
    found = api.bench(
        bundle.path, stages=[*ROWS.values()], components=["unet"], rounds=ROUNDS, memory=False
    )
    (unet,) = found.components
    shape = "x".join(map(str, unet.shapes["sample"]))
    yield f"one denoising step of the UNet, sample {shape}, ONNX Runtime on this CPU"
    for name, row in zip(ROWS, unet.rows, strict=True):
        yield (
            f"  {name:<10}(stage {row.row:<8}) {row.spread.p50:7.2f} ms  "
            f"{1 / unet.ratio(row).p50:5.2f}x  relative L2 {error(bundle, row.row):.1e}"
        )
    sizes = {
        stage: sum(path.stat().st_size for path in data_of(bundle, stage))
        for stage in ("model", "fp16")
    }
    yield (
        f"  fp16      (stage fp16    ) {sizes['model'] / 1e6:.1f} MB of weights become "
        f"{sizes['fp16'] / 1e6:.1f} MB      relative L2 {error(bundle, 'fp16'):.1e}"
    )


def error(bundle: Bundle, stage: str) -> float:
    """Relative L2 of a UNet stage's output to the raw one's."""
    raw = f"{bundle.path}@model"
    found = api.compare(f"{bundle.path}@{stage}", raw, components=["unet"])
    return found.components[0].outputs[0].relative_l2


def data_of(bundle: Bundle, stage: str) -> Iterable[Path]:
    """The weight files of a UNet stage's own."""
    return bundle.folder("unet").glob(f"{stage}-*.onnx_data")


def draw(bundle: Path, count: int) -> Iterable[str]:
    """Every prompt with every stage on one sheet; says how many digits a classifier reads."""
    classifier, _ = digits.train_classifier()
    size, pitch, label = 128, 134, 90
    sheet = Image.new("RGB", (label + 10 * pitch, len(ROWS) * pitch), "white")
    pen = ImageDraw.Draw(sheet)
    labels = [digit for digit in range(10) for _ in range(count)]
    yield "ten prompts, the same seeds for each stage"
    for row, (name, stage) in enumerate(ROWS.items()):
        start = time.perf_counter()
        made = api.run(bundle, digits.PROMPTS, stage=stage, count=count, batch=10, **SETTINGS)
        images = [one.image for one in made]
        seconds = time.perf_counter() - start
        for column, image in enumerate(images[::count]):
            sheet.paste(image, (label + column * pitch, row * pitch + 3))
        pen.text((6, row * pitch + size // 2), name, fill="black", font_size=16)
        score = digits.score(images, labels, classifier)
        read = round(score.accuracy * len(images))
        yield (
            f"  {name:<10}{read} of {len(images)} read as the digit asked for, "
            f"{seconds / len(images):.2f} s per image"
        )
    sheet.save(OUT / "digits.png", optimize=True)


if __name__ == "__main__":
    main()
