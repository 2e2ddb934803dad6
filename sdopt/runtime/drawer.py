"""Drawing with a pipeline that is open: a batch of prompts and seeds to images."""

from __future__ import annotations

import inspect
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt import datafile
from sdopt.report import Progress
from sdopt.runtime.adapting import Adapted
from sdopt.runtime.request import Request
from sdopt.runtime.session import digest_of

if TYPE_CHECKING:
    from PIL.Image import Image


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


@dataclass(frozen=True)
class Drawer:
    """A pipeline whose sessions are open, and what it was asked for.

    Attributes:
        pipeline: of diffusers.
        request: size, steps, guidance and images to start from.
        adapted: the stages, and the adapters on them.
    """

    pipeline: Any
    request: Request
    adapted: Adapted

    def digest(self) -> str:
        """Of the stages that run, weights included."""
        return digest_of(self.adapted.stages)

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], tell: Progress, label: str = ""
    ) -> list[Generated]:
        """One batch: an image per prompt, from its seed by a generator of its own.

        Args:
            prompts: what to draw.
            seeds: as many.
            tell: is told each step.
            label: which images these are, in words.
        """
        request = self.request
        images = self._run(prompts, seeds, tell, label)
        return [
            Generated(
                image=image,
                prompt=prompt,
                negative=request.negative,
                seed=seed,
                steps=request.steps,
                guidance=request.guidance,
                scheduler=type(self.pipeline.scheduler).__name__,
                width=image.width,
                height=image.height,
                strength=request.strength,
                stages={name: one.name for name, one in self.adapted.stages.items()},
                bundle=self.digest(),
                control_scale=request.control_scale,
                loras=tuple(map(str, self.adapted.loras)),
            )
            for prompt, seed, image in zip(prompts, seeds, images, strict=True)
        ]

    def _run(
        self, prompts: Sequence[str], seeds: Sequence[int], tell: Progress, label: str
    ) -> Sequence[Image]:
        import torch

        pipeline, request = self.pipeline, self.request

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


def save_png(
    generated: Generated, path: str | Path, more: Mapping[str, str] | None = None
) -> bytes:
    """Write an image as PNG, with what made it as text in the file; whole or not at all.

    Args:
        generated: the image.
        path: the file.
        more: further texts by their keys.

    Returns:
        The file's bytes.

    Raises:
        StorageError: the file cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in {**generated.text(), **(more or {})}.items():
        info.add_itxt(key, value)  # international text: prompts are in any language
    buffer = io.BytesIO()
    generated.image.save(buffer, "PNG", pnginfo=info)
    data = buffer.getvalue()
    datafile.write_bytes(Path(path), data)
    return data
