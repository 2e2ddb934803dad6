"""Images from prompts: batches, seeds, sizes, and what a PNG says about itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdopt.adapters.requests import Asked
from sdopt.bundle import Bundle
from sdopt.errors import UsageError
from sdopt.report import Progress, part
from sdopt.runtime.adapting import adapt
from sdopt.runtime.drawer import Drawer, Generated, save_png
from sdopt.runtime.pipeline import assemble
from sdopt.runtime.request import (
    Request,
    check_control,
    check_mask,
    check_numbers,
    check_runner,
    image_size,
    mask_image,
    read_image,
    start_image,
)
from sdopt.runtime.runners import Task, runner_of
from sdopt.runtime.session import REFINER, Opener, choose_stages, opener

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Generated", "generate", "prepare", "save_png"]

DEFAULT_STEPS = 25
DEFAULT_GUIDANCE = 7.5
DEFAULT_STRENGTH = 0.8
DEFAULT_STRENGTH_OF_A_MASK = 1.0
"""What a mask covers is drawn anew; the rest stays whatever the strength."""


def generate(
    bundle: str | Path | Bundle,
    prompts: Sequence[str],
    *,
    negative: str = "",
    steps: int = DEFAULT_STEPS,
    guidance: float = DEFAULT_GUIDANCE,
    seed: int = 0,
    scheduler: str | None = None,
    width: int | None = None,
    height: int | None = None,
    count: int = 1,
    batch: int = 1,
    image: str | Path | Image | None = None,
    strength: float | None = None,
    mask: str | Path | Image | None = None,
    control: str | Path | Image | None = None,
    control_scale: float = 1.0,
    stage: str | None = None,
    target: str | Opener = "ort",
    device: str | None = None,
    loras: Sequence[Asked] = (),
    progress: Progress | None = None,
) -> Iterator[Generated]:
    """Make ``count`` images of every prompt, ``batch`` at a time; yields each when it is done.

    Image number ``n`` of the whole run is drawn from ``seed + n`` by a generator of its own, so
    it is the same image in whatever batch it is made.

    Args:
        bundle: the bundle or its directory.
        prompts: what to draw.
        negative: what not to draw.
        steps: of denoising; image-to-image does ``strength`` of them.
        guidance: scale; 1 or less turns classifier-free guidance off.
        seed: of the first image.
        scheduler: a short name; the bundle's by default.
        width: pixels, a multiple of 8; by default that of ``image``, of ``control``, or the
            model's own.
        height: likewise.
        count: images per prompt.
        batch: images computed together.
        image: a start image (path or image) makes it image-to-image.
        strength: how far to leave the start image, above 0 and up to 1; 0.8 by default, with a
            mask 1.
        mask: as large as ``image``: white is drawn anew, black stays (inpainting).
        control: the hint image of the bundle's ControlNet, prepared as that was trained (edges,
            depth, a pose); resized to the size. Without one the ControlNet does not run.
        control_scale: how much the ControlNet adds, 0 for nothing.
        stage: the stage to run; the newest that fits by default.
        target: what runs it, as text (``ort:threads=2``) or as an object that opens graphs.
        device: ``1``, or ``0,1`` to compute both halves of guidance at once.
        loras: adapters, ``FILE``, ``FILE:0.8`` or ``(FILE, 0.8)``; see ``load_pipeline``.
        progress: is told the image and the step.

    Raises:
        UsageError: a size, count or strength that cannot be.
        WeightsError, BundleError, UnknownNameError, MissingDependencyError, BuildError: see
            ``load_pipeline``.
    """
    check_numbers(prompts, steps, seed, count, batch)
    drawer = prepare(
        bundle,
        negative=negative,
        steps=steps,
        guidance=guidance,
        scheduler=scheduler,
        width=width,
        height=height,
        image=image,
        strength=strength,
        mask=mask,
        control=control,
        control_scale=control_scale,
        stage=stage,
        target=target,
        device=device,
        loras=loras,
    )
    jobs = [prompt for prompt in prompts for _ in range(count)]
    return _generate(drawer, jobs, seed, batch, progress)


def prepare(
    bundle: str | Path | Bundle,
    *,
    negative: str = "",
    steps: int = DEFAULT_STEPS,
    guidance: float = DEFAULT_GUIDANCE,
    scheduler: str | None = None,
    width: int | None = None,
    height: int | None = None,
    image: str | Path | Image | None = None,
    strength: float | None = None,
    mask: str | Path | Image | None = None,
    control: str | Path | Image | None = None,
    control_scale: float = 1.0,
    stage: str | None = None,
    target: str | Opener = "ort",
    device: str | None = None,
    loras: Sequence[Asked] = (),
) -> Drawer:
    """Open what draws, once for any number of batches; the options are those of ``generate``.

    Raises:
        UsageError, WeightsError, BundleError, UnknownNameError, MissingDependencyError,
        BuildError: see ``generate``.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    runner, where = runner_of(opened), str(opened.path)
    check_runner(runner, negative, where)
    if image is None and opened.manifest.family == REFINER:
        raise UsageError(
            "this model refines an image, and was given none", where=where, hint="--image FILE"
        )
    check_mask(runner, image, mask, where)
    check_control("controlnet" in opened.components, control, control_scale, where)
    if strength is None:
        strength = DEFAULT_STRENGTH if mask is None else DEFAULT_STRENGTH_OF_A_MASK
    start = start_image(image, strength, steps) if image is not None else None
    area = mask_image(mask, start) if mask is not None and start is not None else None
    hint = read_image(control, "the control image") if control is not None else None
    chosen = opener(target) if isinstance(target, str) else target
    task = Task(start is not None, area is not None, hint is not None)
    stages = choose_stages(opened, chosen, stage, image_to_image=task.image, control=task.control)
    denoiser = opened.config(runner.denoiser)
    size = image_size(width, height, start or hint, opened.config("vae_decoder"), denoiser)
    adapted = adapt(opened, stages, loras)
    pipeline = assemble(opened, adapted, chosen, task=task, scheduler=scheduler, device=device)
    pipeline.set_progress_bar_config(disable=True)
    request = Request(negative, steps, guidance, *size)
    if start is not None:
        request = request.starting_from(start, strength, area)
    if hint is not None:
        request = request.controlled_by(hint, control_scale)
    return Drawer(pipeline, request, adapted)


def _generate(
    drawer: Drawer, jobs: Sequence[str], seed: int, batch: int, progress: Progress | None
) -> Iterator[Generated]:
    for first in range(0, len(jobs), batch):
        prompts = jobs[first : first + batch]
        label = _label(first, len(prompts), len(jobs))
        seeds = range(seed + first, seed + first + len(prompts))
        tell = part(progress, first // batch, -(-len(jobs) // batch))
        yield from drawer.draw(prompts, seeds, tell, label)


def _label(first: int, count: int, total: int) -> str:
    if count == 1:
        return f"image {first + 1} of {total}"
    return f"images {first + 1} to {first + count} of {total}"
