"""Images from prompts: batches, seeds, sizes, and what a PNG says about itself."""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt import datafile
from sdopt.adapters.requests import Asked
from sdopt.bundle import Bundle
from sdopt.errors import UsageError
from sdopt.report import Progress, part
from sdopt.runtime.adapting import Adapted, adapt
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
from sdopt.runtime.session import REFINER, Opener, choose_stages, digest_of, opener

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_STEPS = 25
DEFAULT_GUIDANCE = 7.5
DEFAULT_STRENGTH = 0.8
DEFAULT_STRENGTH_OF_A_MASK = 1.0
"""What a mask covers is drawn anew; the rest stays whatever the strength."""


@dataclass(frozen=True)
class Generated:
    """One image and everything that it takes to make it again.

    ``strength`` is None for text-to-image, ``control_scale`` where no ControlNet ran; ``stages``
    maps each component to the stage that ran; ``bundle`` is the digest of those stages, weights
    included and adapters not: ``loras`` holds for each of these its file's name, the digest of
    that and the scale.
    """

    image: Image
    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    scheduler: str
    width: int
    height: int
    strength: float | None
    stages: dict[str, str]
    bundle: str
    control_scale: float | None = None
    loras: tuple[str, ...] = ()

    def text(self) -> dict[str, str]:
        """What ``save_png`` writes into the file, key by key."""
        facts = {
            "prompt": self.prompt,
            "negative": self.negative,
            "seed": self.seed,
            "steps": self.steps,
            "guidance": self.guidance,
            "scheduler": self.scheduler,
            "size": f"{self.height}x{self.width}",
            "stages": ", ".join(f"{name}@{stage}" for name, stage in self.stages.items()),
            "bundle": self.bundle,
        }
        if self.loras:
            facts["loras"] = ", ".join(self.loras)
        if self.strength is not None:
            facts["strength"] = self.strength
        if self.control_scale is not None:
            facts["control_scale"] = self.control_scale
        return {key: str(value) for key, value in facts.items()}


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
    jobs = [prompt for prompt in prompts for _ in range(count)]
    return _generate(pipeline, jobs, seed, batch, request, adapted, progress)


def _generate(
    pipeline: Any,
    jobs: Sequence[str],
    seed: int,
    batch: int,
    request: Request,
    adapted: Adapted,
    progress: Progress | None,
) -> Iterator[Generated]:
    digest = digest_of(adapted.stages)
    names = {name: one.name for name, one in adapted.stages.items()}
    for first in range(0, len(jobs), batch):
        prompts = jobs[first : first + batch]
        label = _label(first, len(prompts), len(jobs))
        seeds = range(seed + first, seed + first + len(prompts))
        tell = part(progress, first // batch, -(-len(jobs) // batch))
        images = _run(pipeline, prompts, seeds, request, label, tell)
        for prompt, one, image in zip(prompts, seeds, images, strict=True):
            yield Generated(
                image=image,
                prompt=prompt,
                negative=request.negative,
                seed=one,
                steps=request.steps,
                guidance=request.guidance,
                scheduler=type(pipeline.scheduler).__name__,
                width=image.width,
                height=image.height,
                strength=request.strength,
                stages=names,
                bundle=digest,
                control_scale=request.control_scale,
                loras=tuple(map(str, adapted.loras)),
            )


def _run(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    request: Request,
    label: str,
    tell: Progress,
) -> Sequence[Image]:
    """One batch through the pipeline."""
    import torch

    def step_done(_: Any, index: int, __: Any, state: dict[str, Any]) -> dict[str, Any]:
        done = (index + 1) / pipeline.num_timesteps
        tell(f"{label}, step {index + 1} of {pipeline.num_timesteps}", done)
        return state

    takes = inspect.signature(pipeline.__call__).parameters
    given = request.for_pipeline(len(prompts))
    more = {name: value for name, value in given.items() if name in takes}
    # Not an empty one: XL takes zeros for none at all, as it was trained.
    if request.negative:
        more["negative_prompt"] = [request.negative] * len(prompts)
    result = pipeline(
        list(prompts),
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        generator=[torch.Generator("cpu").manual_seed(one) for one in seeds],
        callback_on_step_end=step_done,
        **more,
    )
    images: Sequence[Image] = result.images
    return images


def save_png(generated: Generated, path: str | Path) -> None:
    """Write an image as PNG, with what made it as text in the file; whole or not at all.

    Raises:
        StorageError: the file cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in generated.text().items():
        info.add_itxt(key, value)  # international text: prompts are in any language
    buffer = io.BytesIO()
    generated.image.save(buffer, "PNG", pnginfo=info)
    datafile.write_bytes(Path(path), buffer.getvalue())


def _label(first: int, count: int, total: int) -> str:
    if count == 1:
        return f"image {first + 1} of {total}"
    return f"images {first + 1} to {first + count} of {total}"
