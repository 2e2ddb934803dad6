"""The section of images: the same prompts and seeds by every stage, beside one another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sdopt.bundle import RAW
from sdopt.drawing.page import Page
from sdopt.errors import SdoptError
from sdopt.report import Progress, part
from sdopt.reporting.gather import Gathered
from sdopt.reporting.numbers import said
from sdopt.runtime.generate import Generated, generate

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPTS = ("a handwritten seven", "a handwritten two")
"""Drawn where nobody says what."""

TARGET = "ort"


@dataclass(frozen=True)
class Drawing:
    """What is drawn by each stage: prompts, steps, guidance and the seed of the first image."""

    prompts: tuple[str, ...] = PROMPTS
    steps: int = 8
    guidance: float = 2.0
    seed: int = 0


def samples(page: Page, all_: Gathered, how: Drawing, progress: Progress) -> list[str]:
    """Draw the prompts with every chosen stage and show them with their distance from raw.

    Returns:
        Notes on what could not be drawn.
    """
    page.section("Sample images")
    stages = list(dict.fromkeys([RAW, *all_.chosen]))
    drawn: dict[str, list[Generated]] = {}
    reasons: dict[str, list[str]] = {}
    for index, stage in enumerate(stages):
        tell = part(progress, index, len(stages), f"draw with {stage}")
        try:
            drawn[stage] = _draw(all_, stage, how, tell)
        except (
            SdoptError
        ) as error:  # no pipeline, or a graph for another machine: the page says so
            reasons.setdefault(said(error), []).append(stage)
    if drawn:
        one = next(iter(drawn.values()))[0]
        page.text(
            f"Drawn for this page with {one.scheduler}, {one.steps} steps, guidance "
            f"{one.guidance:g}, {one.height}x{one.width} pixels, by ONNX Runtime on the CPU. PSNR "
            f"is to the same image by {RAW}; a lossy stage may draw another good image."
        )
        _show(page, drawn, how.prompts)
    if set(all_.components) != set(all_.bundle.components):
        page.text("Images need all components; those left out of this page ran too.")
    notes = [f"{', '.join(names)}: {why}" for why, names in reasons.items()]
    for note in notes:
        page.text(f"Not drawn here: {note}", tone="bad")
    return notes


def _draw(all_: Gathered, stage: str, how: Drawing, tell: Progress) -> list[Generated]:
    made = generate(
        all_.bundle,
        how.prompts,
        steps=how.steps,
        guidance=how.guidance,
        seed=how.seed,
        stage=stage,
        target=TARGET,
        progress=tell,
    )
    return list(made)


def _show(page: Page, drawn: dict[str, list[Generated]], prompts: Sequence[str]) -> None:
    for index, prompt in enumerate(prompts):
        first = next(iter(drawn.values()))[index]
        page.heading(f"{prompt}, seed {first.seed}")
        reference = drawn[RAW][index].image if RAW in drawn else None
        shown = []
        for stage, images in drawn.items():
            one = images[index]
            text = stage if stage == RAW else f"{stage}: {_distance(one.image, reference)}"
            others = {f"{n} by {s}" for n, s in one.stages.items() if s != stage}
            if others:
                text += f" ({', '.join(sorted(others))})"
            shown.append((text, one.image))
        page.images(shown)


def _distance(image: Image, reference: Image | None) -> str:
    if reference is None:
        return f"no image by {RAW} to measure from"
    value = psnr(np.asarray(image), np.asarray(reference))
    return f"equal to {RAW}" if math.isinf(value) else f"PSNR {value:.1f} dB"


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images ``[H, W, C]`` in dB, of the peak 255."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
