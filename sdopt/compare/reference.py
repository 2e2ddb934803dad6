"""The reference: a checkpoint's modules in PyTorch, in float32, behind names and arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdopt.errors import MissingDependencyError, SourceError, UnknownNameError, UsageError
from sdopt.exporters.components import COMPONENTS
from sdopt.runtime.quiet import quiet
from sdopt.spec import suggest

Compute = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def components(folder: Path) -> tuple[str, ...]:
    """The components that a diffusers folder holds a checkpoint of."""
    return tuple(
        name
        for name, one in COMPONENTS.items()
        if any((folder / one.folder).glob("*.safetensors"))
    )


def module(folder: Path, name: str) -> Compute:
    """A component's computation, its weights widened to float32.

    In float32 whatever the checkpoint is in: half precision on a CPU is slow, and no reference.

    Raises:
        UnknownNameError: the folder holds no such component.
        MissingDependencyError: torch, diffusers or transformers is not installed.
        SourceError: the checkpoint cannot be loaded.
    """
    if name not in components(folder):
        raise UnknownNameError(
            f"this folder holds no weights of {name!r}",
            where=str(folder),
            hint=suggest(name, components(folder)),
        )
    try:
        with quiet():
            import torch
            from diffusers import AutoencoderKL, UNet2DConditionModel
            from transformers import CLIPTextModel, CLIPTextModelWithProjection
    except ImportError as error:
        raise MissingDependencyError(
            "the PyTorch reference needs torch, diffusers and transformers",
            why=str(error),
            hint='pip install "sdopt[export]"',
        ) from error
    component = COMPONENTS[name]
    classes: dict[str, Any] = {
        "AutoencoderKL": AutoencoderKL,
        "UNet2DConditionModel": UNet2DConditionModel,
        "CLIPTextModel": CLIPTextModel,
        "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
    }
    place = folder / component.folder
    plain = any(
        not path.name.endswith(".fp16.safetensors") for path in place.glob("*.safetensors")
    )
    try:
        with quiet():
            network = classes[component.class_name].from_pretrained(
                place, use_safetensors=True, variant=None if plain else "fp16"
            )
    except (OSError, ValueError) as error:
        raise SourceError(
            f"the checkpoint of {name} cannot be loaded", where=str(place), why=str(error)
        ) from error
    network = network.float().eval()
    # The first of two text encoders gives what the second does.
    two = name == "text_encoder" and (folder / "text_encoder_2").is_dir()
    call = _CALLS["text_encoder_2" if two else name]

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = {
            key: torch.from_numpy(array if array.dtype.kind in "iu" else array.astype(np.float32))
            for key, array in feeds.items()
        }
        try:
            with torch.no_grad():
                outputs = call(network, tensors)
        except (RuntimeError, ValueError, IndexError) as error:
            raise UsageError(
                f"PyTorch's {name} cannot take these inputs",
                where=str(place),
                why=str(error).split("\n", 1)[0],
                hint="compare with the checkpoint that the graph was exported from",
            ) from error
        return {key: value.numpy() for key, value in outputs.items()}

    return run


def _text_encoder(network: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    found = network(input_ids=feeds["input_ids"])
    return {
        "last_hidden_state": found.last_hidden_state,
        "pooler_output": found.pooler_output,
    }


def _text_encoder_of_xl(network: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    found = network(input_ids=feeds["input_ids"], output_hidden_states=True)
    states = {f"hidden_states.{i}": state for i, state in enumerate(found.hidden_states)}
    pooled = "text_embeds" if "text_embeds" in found else "pooler_output"
    return {pooled: found[pooled], "last_hidden_state": found.last_hidden_state, **states}


def _unet(network: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(feeds)
    added = {name: given.pop(name) for name in ("text_embeds", "time_ids") if name in given}
    return {"out_sample": network(**given, added_cond_kwargs=added, return_dict=False)[0]}


def _vae_encoder(network: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    return {"latent_parameters": network.encode(feeds["sample"]).latent_dist.parameters}


def _vae_decoder(network: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    return {"sample": network.decode(feeds["latent_sample"], return_dict=False)[0]}


_CALLS: Mapping[str, Callable[[Any, Mapping[str, Any]], dict[str, Any]]] = {
    "text_encoder": _text_encoder,
    "text_encoder_2": _text_encoder_of_xl,
    "unet": _unet,
    "vae_encoder": _vae_encoder,
    "vae_decoder": _vae_decoder,
}
