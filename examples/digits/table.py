"""Score against milliseconds: what passes and types cost the digits model, in one table.

Exports the model, makes a stage of each row, draws every caption with each from the same seeds
(``sdopt eval``), has the classifier read the images, and times a denoising step of each, the rows
in turn. Prints a Markdown table; ``--plot`` draws it. Run again after a kill, it goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import digits  # noqa: E402 - lies beside this program

from sdopt import api, datafile  # noqa: E402
from sdopt.bundle import Bundle  # noqa: E402
from sdopt.drawing.charts import Chart, axis, points  # noqa: E402
from sdopt.evaluating import Evaluation, pages  # noqa: E402
from sdopt.evaluating.results import StageResult  # noqa: E402
from sdopt.targets.ort import Ort  # noqa: E402

RAW = "model"
ROWS = {
    RAW: "",
    "fast": "@fast",
    "fp16": "@fast,cast_fp16:keep=io",
    **{f"tome{n}": f"@fast,tome={n}" for n in range(1, 6)},
    "w8": "@fast,quantize=w8",
    "int8": "@fast,quantize=int8:data={data}",
}
"""The UNet's passes by stage; all other components run as they were exported."""

LATENT = digits.SIZE // 8


def main() -> None:
    """Make the stages, draw, score, time, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("digits-table"))
    parser.add_argument("--captions", type=int, default=len(digits.CAPTIONS), help="per digit")
    parser.add_argument("--images", type=int, default=3, help="per caption and row")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--rounds", type=int, default=20, help="of timing")
    parser.add_argument("--plot", type=Path, help="a PNG of score against milliseconds")
    parser.add_argument("--html", type=Path, help="the evaluation's page")
    args = parser.parse_args()
    rows = args.rows.split(",")
    args.output.mkdir(parents=True, exist_ok=True)
    bundle = make(args.output / "bundle", rows)
    right = draw(bundle, args.output, rows, args.captions, args.images, "right")
    made = draw(bundle, args.output, rows, args.captions, args.images, "sure")
    times = milliseconds(Bundle.open(bundle), rows, args.rounds)
    print("\n".join(table(made.stages, right.stages, times)))
    if args.plot:
        datafile.write_bytes(args.plot, plot(made.stages, times).png())
    if args.html:
        pages.page(made).write(args.html)


def make(bundle: Path, rows: list[str]) -> Path:
    """Export the model and write each row's stage, unless they are there."""
    if not bundle.is_dir():
        api.export(HERE, bundle, dtype="fp32")
    data = ""
    if "int8" in rows:
        settings = {"steps": digits.STEPS, "guidance": digits.GUIDANCE, "keep": 5}
        data = str(api.record(bundle, digits.PROMPTS, stage=RAW, **settings).folder)
    for row in rows:
        if ROWS[row]:
            passes = ROWS[row].format(data=data)
            api.optimize(bundle, passes, stage=row, components=["unet"])
    return bundle


def draw(
    bundle: Path, output: Path, rows: list[str], captions: int, images: int, scorer: str
) -> Evaluation:
    """Draw captions of every digit with every row, and have the classifier read the images."""
    prompts = output / "prompts.tsv"
    lines = [
        f"{text}\t{word}"
        for digit, word in enumerate(digits.WORDS)
        for text in digits.captions(digit)[:captions]
    ]
    datafile.write_bytes(prompts, "\n".join(["Prompt\tCategory", *lines, ""]).encode())
    return api.evaluate(
        bundle,
        prompts,
        output / "evaluation",
        stages=rows,
        scorer=f"{HERE / 'scorer.py'}:{scorer}",
        images_per_prompt=images,
        steps=digits.STEPS,
        guidance=digits.GUIDANCE,
        seed=digits.SEED,
        batch=10,
        progress=lambda what, share: print(f"{share:4.0%} {what}", file=sys.stderr),
    )


def milliseconds(bundle: Bundle, rows: list[str], rounds: int) -> dict[str, list[float]]:
    """Time a step of the UNet at batch 2, in milliseconds of one core.

    By CPU time on one thread, so that other work on the machine counts little, and the rows in
    turn, so that all meet what is left of it.
    """
    sessions = {row: Ort(threads=1).open(bundle.file("unet", row)) for row in rows}
    rng = np.random.default_rng(0)
    width = int(next(iter(sessions.values())).inputs["encoder_hidden_states"].dims[-1])
    feeds = {
        "sample": rng.standard_normal((2, 4, LATENT, LATENT), np.float32),
        "timestep": np.array(500, np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 77, width), np.float32),
    }
    times: dict[str, list[float]] = {row: [] for row in rows}
    for _ in range(rounds):
        for row, session in sessions.items():
            session.run(feeds)  # untimed: the caches hold the last one's weights
            for _ in range(3):
                start = time.process_time()
                session.run(feeds)
                times[row].append((time.process_time() - start) * 1e3)
    return times


def table(
    stages: tuple[StageResult, ...], right: tuple[StageResult, ...], times: dict[str, list[float]]
) -> list[str]:
    """Return the Markdown table, a line per row; shares are in percent, with standard errors."""
    base = stages[0].stage
    lines = [
        f"| the UNet | ms a step (quartiles) | over `{base}` | read as asked | probability, % | "
        f"less `{base}`'s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    first = statistics.median(times[base])
    for one, other in zip(stages, right, strict=True):
        low, middle, high = statistics.quantiles(times[one.stage], n=4)
        passes = ROWS[one.stage].replace("{data}", "...") or "as exported"
        spread, ratio = f"{middle:.1f} ({low:.1f} to {high:.1f})", f"{middle / first:.2f}"
        assert one.score is not None
        count = round(sum(other.scores.values()))
        score = _percent(one.score.score.mean, one.score.score.error)
        apart = one.difference
        less = _percent(apart.mean, apart.error, sign="+") if apart is not None else ""
        lines.append(
            f"| `{passes}` | {spread} | {ratio} | {count} of {other.images} | {score} | {less} |"
        )
    return lines


def plot(stages: tuple[StageResult, ...], times: dict[str, list[float]]) -> Chart:
    """Return the rows as points: score against the median milliseconds."""
    rows = [
        {
            "stage": one.stage,
            "ms": statistics.median(times[one.stage]),
            "score": 100 * one.score.score.mean,
        }
        for one in stages
        if one.score is not None
    ]
    return points(
        "examples/digits: score against the time of a step",
        rows,
        axis("ms", "CPU milliseconds per step of the UNet, batch 2"),
        axis("score", "% that the classifier gives to the digit asked for"),
        color=axis("stage", "stage", kind="nominal"),
        label="stage",
    )


def _percent(share: float, error: float | None, sign: str = "") -> str:
    text = f"{100 * share:{sign}.2f}"
    return text if error is None else f"{text} ± {100 * error:.2f}"


if __name__ == "__main__":
    main()
