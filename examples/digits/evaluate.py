"""Measure the digits model with plain diffusers; prints one line of JSON.

Without arguments it makes 500 images at the default settings.  ``--size 96x128`` makes other
sizes, and ``--strength 0.6`` starts from real held-out digits (image to image).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

# isort: split
from digits import (
    GUIDANCE,
    PROMPTS,
    SEED,
    SIZE,
    STEPS,
    draw,
    load_data,
    score,
    train_classifier,
)

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpm": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "pndm": PNDMScheduler,
}


def generate(
    pipeline: StableDiffusionPipeline, labels: list[int], args: argparse.Namespace
) -> list[Image.Image]:
    """Generate one image for each label; image i has the noise of seed ``args.seed + i``."""
    height, width = args.size
    data = load_data()
    images: list[Image.Image] = []
    for begin in range(0, len(labels), args.batch):
        chosen = labels[begin : begin + args.batch]
        seeds = range(args.seed + begin, args.seed + begin + len(chosen))
        extra: dict[str, object] = {"height": height, "width": width}
        if args.strength:
            places = [begin + i for i in range(len(chosen))]
            real = [data.held_x[data.held_y == d] for d in range(10)]
            start = [real[d][i % len(real[d])] for d, i in zip(chosen, places, strict=True)]
            extra = {"image": [draw(x[None])[0] for x in start], "strength": args.strength}
        images += pipeline(
            [PROMPTS[digit] for digit in chosen],
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **extra,
        ).images
    return images


def contact_sheet(images: list[Image.Image], columns: int, cell: int = 80) -> Image.Image:
    """Return a grey sheet with the first ``columns`` images of each of the ten digits."""
    per_class = len(images) // 10
    columns = min(columns, per_class)
    pitch = cell + 8
    sheet = Image.new("L", (columns * pitch, 10 * pitch), 96)
    for row in range(10):
        for column in range(columns):
            image = images[row * per_class + column].convert("L")
            image.thumbnail((cell, cell), Image.Resampling.BOX)
            sheet.paste(image, (column * pitch + 4, row * pitch + 4))
    return sheet


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).parent)
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--size", default=f"{SIZE}x{SIZE}", help="height x width")
    parser.add_argument("--strength", type=float, help="image to image from held-out digits")
    parser.add_argument("--scheduler", choices=sorted(SCHEDULERS), help="instead of its own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet to this PNG")
    args = parser.parse_args()
    height, width = args.size.split("x")
    args.size = (int(height), int(width))
    return args


def main() -> None:
    """Generate, judge and print."""
    args = parse()
    kind = StableDiffusionImg2ImgPipeline if args.strength else StableDiffusionPipeline
    pipeline = kind.from_pretrained(args.model)
    if args.scheduler:
        pipeline.scheduler = SCHEDULERS[args.scheduler].from_config(pipeline.scheduler.config)
    if args.dtype == "float16":
        pipeline.to(torch.float16)
    pipeline.to(args.device).set_progress_bar_config(disable=True)
    labels = [digit for digit in range(10) for _ in range(args.per_class)]
    start = time.perf_counter()
    images = generate(pipeline, labels, args)
    seconds = time.perf_counter() - start
    if args.sheet:
        contact_sheet(images, columns=8).save(args.sheet, optimize=True)
    classifier, held_out = train_classifier()
    result = score(images, labels, classifier).as_dict()
    result |= {"classifier_held_out": round(held_out, 4), "seconds": round(seconds, 1)}
    result |= {"steps": args.steps, "guidance": args.guidance, "seed": args.seed}
    result |= {"size": "x".join(map(str, args.size)), "strength": args.strength}
    result |= {"scheduler": type(pipeline.scheduler).__name__, "dtype": args.dtype}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
