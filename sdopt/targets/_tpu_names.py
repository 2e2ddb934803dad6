"""What Sophgo's own Stable Diffusion pipelines call things, and the types that they use."""

from __future__ import annotations

from sdopt.passes.base import Role

FOLDER = "bmodel"
"""Of a bundle: bmodels lie in it as Sophgo's runtimes read them, all of a chip in one folder."""

_DENOISER = {
    "": "F16",
    "fp32": "F32",
    "fp16": "F16",
    "bf16": "BF16",
    "int8": "INT8",
    "w8": "W8F16",
    "w4": "W4F16",
}
"""Sophgo's word for the denoiser's type."""

_FAMILIES = {"sd1": "sdv15"}
"""What Sophgo's runtimes call a family in the names of its files."""

_FILES = {
    Role.TEXT_ENCODER: ("te", "text"),
    Role.DENOISER: ("unet", "unet_multisize"),
    Role.CONTROLNET: ("cn", "cn_multisize"),
    Role.VAE_DECODER: ("vd", "vd_multisize"),
    Role.VAE_ENCODER: ("ve", "ve_multisize"),
}
"""Network and file of a component, as those runtimes look for them, one size or several."""


def file_of(family: str, role: Role, component: str) -> str:
    """The file of a component: ``sdv15_unet_multisize.bmodel``."""
    _, word = _FILES.get(role, ("", component))
    return f"{_FAMILIES.get(family, family)}_{word}{_second(component)}.bmodel".lstrip("_")


def network_of(family: str, role: Role, component: str) -> str:
    """The name of a component's network in its file: ``sdv15_unet``."""
    word, _ = _FILES.get(role, (component, ""))
    return f"{_FAMILIES.get(family, family)}_{word}{_second(component)}".lstrip("_")


def _second(component: str) -> str:
    return "_2" if component == "text_encoder_2" else ""


def quantize_of(role: Role, dtype: str) -> str:
    """Sophgo's word for the type of a component; only the denoiser's is chosen by ``dtype``.

    The text encoder is F32 and the VAE BF16, as in Sophgo's pipelines (the VAE's activations leave
    the range of F16 at full size), and the ControlNet F16 beside a quantized denoiser; ``fp32``
    holds for all.
    """
    if role is Role.TEXT_ENCODER or dtype == "fp32":
        return "F32"
    if role in (Role.VAE_ENCODER, Role.VAE_DECODER):
        return "BF16"
    if role is Role.CONTROLNET and dtype not in ("fp16", "bf16"):
        return "F16"
    return _DENOISER[dtype]
