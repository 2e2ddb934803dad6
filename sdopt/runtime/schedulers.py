"""diffusers' schedulers by short names, set up as Stable Diffusion 1.x wants them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import SchedulerMixin

from sdopt.errors import BundleError, MissingDependencyError, UnknownNameError, UsageError
from sdopt.spec import suggest

_OF_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "euler_karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Name to diffusers' class and the options that make it what the name says."""

FLOW: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "deis": ("DEISMultistepScheduler", _OF_FLOW),
    "dpm++": ("DPMSolverMultistepScheduler", _OF_FLOW),
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", _OF_FLOW),
}
"""The same for models of flow matching (Stable Diffusion 3), whose noise no other knows."""

# Where the bundle's scheduler does not have these options, a class's own defaults are for pixels.
_LATENT = {
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def named(name: str, config: Mapping[str, Any]) -> Any:
    """The scheduler ``name`` on the noise schedule of ``config``, another scheduler's.

    Raises:
        UnknownNameError: with the nearest names.
        UsageError: the model was trained with flow matching, and the scheduler is for noise.
        MissingDependencyError: it computes with a package that is not installed.
    """
    if name not in SCHEDULERS:
        raise UnknownNameError(f"unknown scheduler {name!r}", hint=suggest(name, SCHEDULERS))
    flow = str(config.get("_class_name")).startswith("FlowMatch")
    if flow and name not in FLOW:
        raise UsageError(
            f"the scheduler {name} knows no flow matching, which this model was trained with",
            hint=f"choose one that does: {', '.join(FLOW)}",
        )
    class_name, options = (FLOW if flow else SCHEDULERS)[name]
    cls: Any = getattr(diffusers, class_name)
    given = {**_LATENT, **config, **options, "flow_shift": config.get("shift", 1.0)}
    taken = inspect.signature(cls.__init__).parameters
    try:
        return cls(**{key: value for key, value in given.items() if key in taken})
    except ImportError as error:
        package = "scipy" if "scipy" in str(error) else str(error)
        raise MissingDependencyError(
            f"the scheduler {name} needs {package}",
            hint=f"pip install {package}, or choose another scheduler",
        ) from error


def of_class(class_name: str, config: Mapping[str, Any], where: str) -> Any:
    """The scheduler that a bundle was exported with.

    Raises:
        BundleError: diffusers knows no scheduler of that class.
    """
    cls: Any = getattr(diffusers, class_name, None)
    if not (inspect.isclass(cls) and issubclass(cls, SchedulerMixin)):
        raise BundleError(
            f"diffusers {diffusers.__version__} has no scheduler {class_name}",
            where=where,
            hint="choose one: --scheduler ddim",
        )
    known: Any = cls
    return known.from_config(dict(config))
