"""Sessions for the components of a bundle: which stage to run, and opening it with a target."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from sdopt import registry, spec
from sdopt.bundle import OPTIMIZED, RAW, Bundle, Stage
from sdopt.errors import BundleError, UnknownNameError
from sdopt.runtime.runners import index_of, runner_of
from sdopt.session import Session

PURPOSE = {
    "text_encoder": "it turns the prompts into numbers",
    "text_encoder_2": "it turns the prompts into numbers, too",
    "text_encoder_3": "it turns the prompts into numbers, too",
    "controlnet": "it turns the control image into what the UNet adds",
    "unet": "it denoises",
    "transformer": "it denoises",
    "vae_encoder": "image-to-image encodes the start image with it",
    "vae_decoder": "it turns the result into pixels",
}
"""The components that running needs, and what for."""

REFINER = "sdxl_refiner"


class Opener(Protocol):
    """The part of a target that running needs."""

    def check_available(self) -> None:
        """Raise MissingDependencyError where the target's packages are not installed."""

    def stage_name(self) -> str:
        """The stage that a build for this target writes."""

    def open(self, path: Path, *, optimize: bool = True) -> Session:
        """Open an ONNX file."""


def opener(target: str) -> Opener:
    """The target that a text such as ``ort:threads=2`` names, known to be installed.

    Raises:
        SpecError, UnknownNameError: text that names no target or a wrong option.
        MissingDependencyError: its packages are not installed.
    """
    chosen: Opener = registry.make("targets", target)
    chosen.check_available()
    return chosen


def choose_stages(
    bundle: Bundle,
    target: Opener,
    stage: str | None,
    *,
    image_to_image: bool,
    control: bool = False,
) -> dict[str, Stage]:
    """The stage to run of each component that is needed.

    Without ``stage`` it is the target's own build if that was made from what is there now, else
    the optimized stage, else the raw one. With it, a component that has no such stage runs raw,
    so that a recipe may optimize one component only.

    Raises:
        BundleError: there is no index, or a component is missing; says what for, and what to do.
        UnknownNameError: no component has the stage.
    """
    runner, index = runner_of(bundle), index_of(bundle)
    # What a pipeline was saved without, its index holds as null: XL's refiner, SD3 without T5.
    encoders = [name for name in runner.encoders if any(index.get(name, [name]) or ())]
    hint = ("controlnet",) if control else ()
    vae = ("vae_encoder", "vae_decoder") if image_to_image else ("vae_decoder",)
    needed = [*encoders, *hint, runner.denoiser, *vae]
    for name in needed:
        if name not in bundle.components or not bundle.stages(name):
            origin = bundle.manifest.origin or "SOURCE"
            # A single file may have none.
            part = "vae" if name.startswith("vae") else name.replace("_", "-")
            supply = f" --{part} DIR" if origin.endswith(".safetensors") else ""
            raise BundleError(
                f"this bundle has no {name}",
                where=str(bundle.path),
                why=PURPOSE[name],
                hint=f"export it: sdopt export {origin} -o {bundle.path} "
                f"--component {name}{supply}",
            )
    if stage is not None:
        known = {one for name in needed for one in bundle.stages(name)}
        if stage not in known:
            raise UnknownNameError(
                f"no component has a stage {stage!r}",
                where=str(bundle.path),
                hint=spec.suggest(stage, known),
            )
        return {name: bundle.current(name, stage) for name in needed}
    return {name: _latest(bundle, name, target.stage_name()) for name in needed}


def _latest(bundle: Bundle, component: str, built: str) -> Stage:
    known = bundle.stages(component)
    if built not in known:
        return bundle.current(component, OPTIMIZED)
    stage = bundle.stage(component, built)
    origin = stage.record.source_stage
    fresh = origin in known and bundle.stage(component, origin).digest == stage.record.source
    # A build of the raw stage gives way to an optimized one: that came after it, or `build`
    # would have taken it.
    passed_over = origin == RAW and OPTIMIZED in known
    return stage if fresh and not passed_over else bundle.current(component, OPTIMIZED)


def digest_of(stages: Mapping[str, Stage]) -> str:
    """One digest for all the graphs that an image came from, weights included."""
    lines = [f"{name} {stages[name].digest}" for name in sorted(stages)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
