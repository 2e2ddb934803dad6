"""Whether parts that lie apart are of one model, and what a part is called in an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdopt.errors import SourceError
from sdopt.exporters.components import supported
from sdopt.exporters.ports import Component
from sdopt.exporters.recognition import class_of
from sdopt.passes.base import Role

_ENCODERS = ("text_encoder", "text_encoder_2")


def check_widths(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse parts of different models: what one gives must be as wide as the next one takes.

    Raises:
        SourceError: naming the two parts and their widths.
    """
    unet = configs.get("unet")
    if unet is None:
        return
    texts = {n: _width(n, configs[n]) for n in _ENCODERS if n in configs}
    both = len(texts) == len(_ENCODERS) or unet.get("addition_embed_type") != "text_time"
    takes, gives = unet.get("cross_attention_dim"), sum(w for w in texts.values() if w)
    if texts and both and gives != takes:
        widths = " and ".join(f"{name} gives {width}" for name, width in texts.items())
        raise SourceError(
            "the text encoder and the UNet are of different models",
            why=f"{widths}, the UNet takes {takes}",
            hint="supply the text encoder that this UNet was trained with",
        )
    latent = configs.get("vae_decoder", {}).get("latent_channels", unet.get("out_channels"))
    if latent != unet.get("out_channels"):
        raise SourceError(
            "the VAE and the UNet are of different models",
            why=f"latents of {latent} channels against {unet.get('out_channels')}",
            hint="supply the VAE that this UNet was trained with",
        )


def _width(name: str, config: Mapping[str, Any]) -> int | None:
    """The width of an encoder's states, if its configuration says it.

    Raises:
        SourceError: it says something else there.
    """
    found = config.get("hidden_size")
    if found is None or (isinstance(found, int) and not isinstance(found, bool)):
        return found
    raise SourceError(
        f"the configuration of {name} has a hidden_size that is no number",
        why=str(found)[:200],
        hint="restore its config.json as save_pretrained wrote it",
    )


def check_class(component: Component, path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration of another class than the component's.

    Raises:
        SourceError: naming both.
    """
    found = class_of(config)
    if found not in component.classes:
        raise SourceError(
            f"{component.folder} is a {found}, not a {component.class_name}",
            where=str(path),
            hint=supported(),
        )


def component_class(component: Component, config: Mapping[str, Any]) -> tuple[str, str]:
    """Library and class of a component, as a pipeline's index writes them."""
    library = "transformers" if component.role is Role.TEXT_ENCODER else "diffusers"
    return library, class_of(config) or component.class_name
