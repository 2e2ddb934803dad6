"""A run of denoising steps, exact and with ``deep_cache``, and a whole image, by one command.

Exports a checkpoint (by default Stable Diffusion 1.5 with random weights, made here), optimizes
and builds it twice for a target, and has ``sdopt bench`` time both builds of the UNet in turns
over a whole run of steps, and then whole images of the exact one.

    python benchmarks/images.py --work /tmp/images
    python benchmarks/images.py --work /tmp/images --checkpoint examples/digits --target ort \
        --shapes 128x128 --steps 4 --rounds 2

Needs what ``sdopt export`` and the target need.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs as a script, from anywhere

from benchmarks.make_checkpoint import write_checkpoint  # noqa: E402
from sdopt import api  # noqa: E402
from sdopt.bench import BenchReport, text  # noqa: E402

EXACT, DEEP = "@fast", "@fast,deep_cache=3"


def build(bundle: Path, checkpoint: Path, target: str) -> None:
    """The bundle with two builds: ``exact`` of all components, ``deep`` of the UNet."""
    api.export(checkpoint, bundle)
    api.optimize(bundle, EXACT, stage="fast")
    api.optimize(bundle, DEEP, stage="cached", components=["unet"])
    api.build(bundle, f"{target}:stage=exact", source="fast")
    api.build(bundle, f"{target}:stage=deep", source="cached", components=["unet"])


def main() -> None:
    """Measure and print both tables; their JSON stays in the work folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("build/images"))
    parser.add_argument("--checkpoint", type=Path, help="SD1.5 with random weights by default")
    parser.add_argument("--target", default="ort:provider=cuda:dtype=fp16")
    parser.add_argument("--shapes", default="512x512")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=20, help="of the steps; of images 12")
    options = parser.parse_args()
    checkpoint = options.checkpoint
    if checkpoint is None:
        checkpoint = options.work / "sd15-random"
        if not (checkpoint / "model_index.json").is_file():
            write_checkpoint(checkpoint, "sd15", "fp16")
    bundle = options.work / "bundle"
    build(bundle, checkpoint, options.target)
    common: dict[str, Any] = {
        "targets": options.target,
        "shapes": options.shapes,
        "steps": options.steps,
        "scheduler": "ddim",
        "rounds": options.rounds,
        "memory": False,
    }
    steps = api.bench(bundle, stages=["exact", "deep"], components=["unet"], **common)
    images = api.bench(
        bundle, stages=["exact"], images=True, image_rounds=min(options.rounds, 12), **common
    )
    for name, report in (("steps", steps), ("images", images)):
        show(report, options.work / f"{name}.json")


def show(report: BenchReport, path: Path) -> None:
    """Print a report's tables and keep its JSON."""
    path.write_text(json.dumps(report.to_json(), indent=2) + "\n")
    print("\n".join(text.lines(report)))


if __name__ == "__main__":
    main()
