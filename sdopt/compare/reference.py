"""The reference: a checkpoint's modules in PyTorch, in float32, behind names and arrays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdopt.compare.looking import Layer, Seen
from sdopt.compare.stepping import Values
from sdopt.errors import MissingDependencyError, SourceError, UnknownNameError, UsageError
from sdopt.exporters.components import COMPONENTS
from sdopt.exporters.recognition import class_of, read_json
from sdopt.passes.base import Role
from sdopt.runtime.quiet import quiet
from sdopt.spec import suggest

_DOWN = "down_block_additional_residuals."
_Call = Callable[[Any, Mapping[str, Any]], dict[str, Any]]


def components(folder: Path) -> tuple[str, ...]:
    """The components that a diffusers folder holds a checkpoint of."""
    return tuple(
        name
        for name, one in COMPONENTS.items()
        if any((folder / one.folder).glob("*.safetensors"))
    )


def module(folder: Path, name: str) -> Module:
    """A component's network, its weights widened to float32.

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
            import diffusers
            import torch  # noqa: F401 - a module computes with it
            import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "the PyTorch reference needs torch, diffusers and transformers",
            why=str(error),
            hint='pip install "sdopt[export]"',
        ) from error
    component = COMPONENTS[name]
    place = folder / component.folder
    config = read_json(place / "config.json")
    class_name = class_of(config)
    if (class_name, component.role) not in _CALLS:
        raise SourceError(f"{name} is a {class_name}, which is not known", where=str(place))
    classes: Any = diffusers if "_class_name" in config else transformers
    plain = any(
        not path.name.endswith(".fp16.safetensors") for path in place.glob("*.safetensors")
    )
    try:
        with quiet():
            network = getattr(classes, str(class_name)).from_pretrained(
                place, use_safetensors=True, variant=None if plain else "fp16"
            )
    except (OSError, ValueError) as error:
        raise SourceError(
            f"the checkpoint of {name} cannot be loaded", where=str(place), why=str(error)
        ) from error
    network = network.float().eval()
    # The first of two text encoders gives what the second does.
    two = name == "text_encoder" and (folder / "text_encoder_2").is_dir()
    call = _text_encoder_of_xl if two else _CALLS[str(class_name), component.role]
    return Module(name, str(place), network, call)


class Module:
    """A network in PyTorch, in float32, behind names and arrays."""

    wired = False

    def __init__(self, name: str, where: str, network: Any, call: _Call) -> None:
        self._name, self._where, self._network, self._call = name, where, network, call
        self._modules = {path: one for path, one in network.named_modules() if path}
        # A graph's paths are those of the checkpoint: transformers 5 knows CLIP's text model
        # without the prefix that 4 wrote.
        for path, one in tuple(self._modules.items()):
            self._modules.setdefault(f"text_model.{path}", one)
            self._modules.setdefault(path.removeprefix("text_model."), one)
        self.layers = {
            path: Layer(path, path, type(one).__name__) for path, one in self._modules.items()
        }

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the outputs, float32.

        Raises:
            UsageError: PyTorch cannot take these inputs.
        """
        import torch

        tensors = {
            key: torch.from_numpy(array if array.dtype.kind in "iu" else array.astype(np.float32))
            for key, array in feeds.items()
        }
        try:
            with torch.no_grad():
                outputs = self._call(self._network, tensors)
        except (RuntimeError, ValueError, IndexError) as error:
            raise UsageError(
                f"PyTorch's {self._name} cannot take these inputs",
                where=self._where,
                why=str(error).split("\n", 1)[0],
                hint="compare with the checkpoint that the graph was exported from",
            ) from error
        return {key: value.numpy() for key, value in outputs.items()}

    def look(self, feeds: Sequence[Values], names: Collection[str]) -> Iterator[Seen]:
        """Run it and hand out what modules gave, in the order in which they ended.

        Of a tuple it is the first tensor, of a module that runs several times what it gave last.
        """
        wanted = {path: one for path, one in self._modules.items() if path in names}
        for number, feed in enumerate(feeds):
            given: dict[str, np.ndarray] = {}

            def heard(path: str, output: object, into: dict[str, np.ndarray] = given) -> None:
                if (tensor := _first_tensor(output)) is not None:
                    into.pop(path, None)
                    into[path] = tensor.detach().numpy().copy()

            hooks = [
                one.register_forward_hook(lambda _, __, output, p=path: heard(p, output))
                for path, one in wanted.items()
            ]
            try:
                self.run(feed)
            finally:
                for hook in hooks:
                    hook.remove()
            for path, array in given.items():
                yield number, path, array


def _first_tensor(output: Any) -> Any:
    if isinstance(output, (tuple, list)):
        return _first_tensor(output[0]) if output else None
    if isinstance(output, Mapping):  # transformers' and diffusers' outputs
        return _first_tensor(tuple(output.values()))
    return output if hasattr(output, "detach") else None


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


def _text_encoder_of_t5(network: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    return {"last_hidden_state": network(input_ids=feeds["input_ids"])[0]}


def _transformer(network: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    return {"out_hidden_states": network(**feeds, return_dict=False)[0]}


def _unet(network: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(feeds)
    added = {name: given.pop(name) for name in ("text_embeds", "time_ids") if name in given}
    if down := sorted(
        (n for n in given if n.startswith(_DOWN)), key=lambda n: int(n[len(_DOWN) :])
    ):
        given[_DOWN[:-1]] = [given.pop(name) for name in down]
    return {"out_sample": network(**given, added_cond_kwargs=added, return_dict=False)[0]}


def _controlnet(network: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(feeds)
    added = {name: given.pop(name) for name in ("text_embeds", "time_ids") if name in given}
    down, mid = network(**given, added_cond_kwargs=added, return_dict=False)
    found = {f"down_block_res_samples.{index}": one for index, one in enumerate(down)}
    return {**found, "mid_block_res_sample": mid}


def _vae_encoder(network: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    found = network.encode(feeds["sample"])
    if "latents" in found:
        return {"latent_sample": found.latents}
    return {"latent_parameters": found.latent_dist.parameters}


def _vae_decoder(network: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    return {"sample": network.decode(feeds["latent_sample"], return_dict=False)[0]}


_CALLS: Mapping[tuple[str, Role], _Call] = {
    ("CLIPTextModel", Role.TEXT_ENCODER): _text_encoder,
    ("CLIPTextModelWithProjection", Role.TEXT_ENCODER): _text_encoder_of_xl,
    ("T5EncoderModel", Role.TEXT_ENCODER): _text_encoder_of_t5,
    ("ControlNetModel", Role.CONTROLNET): _controlnet,
    ("UNet2DConditionModel", Role.DENOISER): _unet,
    ("SD3Transformer2DModel", Role.DENOISER): _transformer,
    **{
        (name, role): call
        for name in ("AutoencoderKL", "AutoencoderTiny")
        for role, call in ((Role.VAE_ENCODER, _vae_encoder), (Role.VAE_DECODER, _vae_decoder))
    },
}
