"""A bundle behind diffusers' own Stable Diffusion pipelines."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdopt import spec
from sdopt.adapters.requests import Asked
from sdopt.bundle import Bundle, Stage
from sdopt.errors import BundleError, MissingDependencyError, UsageError
from sdopt.runtime.adapting import Adapted, adapt
from sdopt.runtime.finite import Finite
from sdopt.runtime.parallel import on_halves, targets_for
from sdopt.runtime.quiet import quiet
from sdopt.runtime.runners import INDEX, Runner, Task, index_of, read, runner_of
from sdopt.runtime.scheduled import open_stage
from sdopt.runtime.session import REFINER, Opener, choose_stages, opener
from sdopt.session import Session


def load_pipeline(
    bundle: str | Path | Bundle,
    *,
    stage: str | None = None,
    target: str = "ort",
    image_to_image: bool = False,
    mask: bool = False,
    control: bool | None = None,
    scheduler: str | None = None,
    device: str | None = None,
    loras: Sequence[Asked] = (),
) -> Any:
    """A diffusers pipeline whose models are sessions on a bundle's graphs.

    A bundle for inpainting is behind the family's inpainting pipeline, which wants an image and a
    mask; XL's refiner is always behind the one from images to images, and a bundle with a
    ControlNet behind the one that wants its hint image (``image``, or ``control_image`` beside a
    start image).

    Args:
        bundle: the bundle or its directory.
        stage: the stage to run; by default the target's build, else the optimized, else the raw.
        target: what runs the graphs, such as ``ort:threads=2``.
        image_to_image: the family's image-to-image pipeline in place of the text-to-image one.
        mask: the family's inpainting pipeline; a UNet of 4 channels will do.
        control: whether the ControlNet's; where the bundle holds one by default. Without it the
            UNet of such a bundle is that of the plain pipeline.
        scheduler: a short name (``ddim``, ``euler``, ``dpm++``, ...); the bundle's by default.
        device: ``1``, or ``0,1`` to compute both halves of guidance at once.
        loras: adapters to apply to the stages while they are loaded: ``FILE``, ``FILE:0.8`` or
            ``(FILE, 0.8)``. The bundle stays as it is.

    Raises:
        WeightsError: an adapter that fits no component, or a stage that it cannot be applied to.
        BundleError: a component, the tokenizer or the scheduler is missing or not of this family.
        UnknownNameError: an unknown stage, target or scheduler.
        MissingDependencyError: diffusers or the target's runtime is not installed.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    chosen = opener(target)
    mask |= runner_of(opened).mask
    image_to_image |= mask or opened.manifest.family == REFINER
    controlled = "controlnet" in opened.components if control is None else control
    task = Task(image_to_image, mask, controlled)
    stages = choose_stages(
        opened, chosen, stage, image_to_image=image_to_image, control=controlled
    )
    adapted = adapt(opened, stages, loras)
    return assemble(opened, adapted, chosen, task=task, scheduler=scheduler, device=device)


def assemble(
    bundle: Bundle,
    adapted: Adapted,
    target: Opener,
    *,
    task: Task,
    scheduler: str | None,
    device: str | None = None,
) -> Any:
    """The pipeline over those stages; see ``load_pipeline``.

    Raises:
        UsageError: diffusers has no pipeline of this family for the task.
    """
    runner, stages = runner_of(bundle), adapted.stages
    name = runner.class_name(task)
    if not name:
        given = [word for word, on in vars(task).items() if on]
        raise UsageError(
            f"diffusers has no pipeline that runs this bundle with {' and '.join(given)}",
            where=str(bundle.path / INDEX),
            hint=f"it runs {runner.text_to_image or runner.inpaint}",
        )
    cls = pipeline_class(name)
    from sdopt.runtime import schedulers
    from sdopt.runtime.components import TextEncoder, Vae
    from sdopt.runtime.control import ControlNet
    from sdopt.runtime.denoisers import DENOISERS

    index = index_of(bundle)
    config = _scheduler_config(bundle)
    steps = (
        schedulers.named(scheduler, config)
        if scheduler
        else schedulers.of_class(index["scheduler"][1], config, str(bundle.path))
    )
    tokenizers = _tokenizers(bundle, index, runner, stages)
    devices = targets_for(target, device) if device is not None else [target]

    def session(target: Opener, name: str) -> Session:
        one = open_stage(target, stages[name].path, replaced=adapted.replaced.get(name))
        return Finite(one, bundle, stages[name])

    sessions = {name: session(devices[0], name) for name in stages}
    main = stages[runner.denoiser]
    halves = [sessions[runner.denoiser], *(session(one, runner.denoiser) for one in devices[1:])]
    denoiser = on_halves(halves, halved=is_halved(main), where=str(main.path))
    return cls(
        vae=Vae(
            sessions["vae_decoder"], sessions.get("vae_encoder"), bundle.config("vae_decoder")
        ),
        scheduler=steps,
        **{runner.denoiser: DENOISERS[runner.denoiser](denoiser, bundle.config(runner.denoiser))},
        **{
            name: TextEncoder(sessions[name], bundle.config(name)) if name in sessions else None
            for name in runner.encoders
        },
        **(
            {"controlnet": ControlNet(sessions["controlnet"], bundle.config("controlnet"))}
            if task.control
            else {}
        ),
        **tokenizers,
        **runner.given,
        **{
            name: index[name]
            for name in runner.kept
            if name in index and name in inspect.signature(cls.__init__).parameters
        },
    )


def is_halved(stage: Stage) -> bool:
    """Whether the stage went through ``cfg_parallel``."""
    return any(spec.parse(step.spec)[0].name == "cfg_parallel" for step in stage.record.history)


def pipeline_class(name: str) -> Any:
    """One of diffusers' classes.

    Raises:
        MissingDependencyError: diffusers or transformers is not installed.
    """
    try:
        with quiet():
            return getattr(importlib.import_module("diffusers"), name)
    except ImportError as error:
        raise MissingDependencyError(
            "running a bundle needs diffusers and transformers",
            why=str(error),
            hint='pip install "sdopt[ort]"',
        ) from error


def _scheduler_config(bundle: Bundle) -> dict[str, Any]:
    return read(bundle, "scheduler/scheduler_config.json", "the noise schedule")


def _tokenizers(
    bundle: Bundle, index: dict[str, Any], runner: Runner, stages: Mapping[str, Stage]
) -> dict[str, Any]:
    """A tokenizer for each text encoder, by the pipeline's names; None where there is none."""
    names = {name: name.replace("text_encoder", "tokenizer") for name in runner.encoders}
    return {
        tokenizer: _tokenizer(bundle, index, tokenizer) if encoder in stages else None
        for encoder, tokenizer in names.items()
    }


def _tokenizer(bundle: Bundle, index: dict[str, Any], part: str) -> Any:
    transformers = importlib.import_module("transformers")
    folder = bundle.path / part
    _, name = index.get(part) or (None, None)
    cls = getattr(transformers, str(name), None)
    if cls is None or not folder.is_dir():
        raise BundleError(
            f"this bundle has no {part} that can be loaded",
            where=str(folder),
            why=f"model_index.json names {name}",
            hint="export again from a whole diffusers folder: sdopt export SOURCE -o BUNDLE",
        )
    return cls.from_pretrained(folder)
