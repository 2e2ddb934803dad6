"""A single file's tensors under diffusers' names, each still a range of that file.

diffusers' own converters rename; they run over tensors without values here, made from the header,
and every result is traced back to the tensor of which it is a view.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch
from diffusers.loaders import single_file_utils
from torch.overrides import TorchFunctionMode

from sdopt import weights
from sdopt.errors import SourceError
from sdopt.exporters import ldm
from sdopt.exporters.checkpoint import Checkpoint
from sdopt.safetensors_header import Entry

Tensors = dict[str, torch.Tensor]

_ADDED = re.compile(r"(?:control_model\.)?label_emb\.0\.([02])\.(weight|bias)")

converters: Any = single_file_utils
"""diffusers types none of them."""


@dataclass(frozen=True)
class Converted(Checkpoint):
    """One component's tensors in a file that holds others too.

    Attributes:
        turned: of the entries whose rows are columns in the file, how they lie there.
    """

    turned: Mapping[str, Entry] | None = None

    def external(self, name: str) -> ir.TensorProtocol:  # type: ignore[override]
        """The tensor as a range of the file, or computed from one where it lies transposed."""
        if self.turned and name in self.turned:
            return weights.transpose(self.turned[name].external(name), name)
        return super().external(name)


class _Views(TorchFunctionMode):
    """What copies a tensor gives the tensor itself, so that its origin can be told."""

    _COPIES = (torch.Tensor.clone, torch.Tensor.contiguous, torch.Tensor.detach)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return args[0] if func in self._COPIES else func(*args, **(kwargs or {}))


def convert(checkpoint: Checkpoint, component: str, config: Mapping[str, Any]) -> Converted:
    """The part of a single file that is ``component``, under diffusers' names.

    Raises:
        SourceError: the file's names are not those of such a component.
    """
    rules: Mapping[str, Callable[[Tensors, Mapping[str, Any]], Tensors]] = {
        "unet": _unet,
        "controlnet": _controlnet,
        "vae_encoder": _vae,
        "vae_decoder": _vae,
        "text_encoder": _text,
        "text_encoder_2": _text,
    }
    entries = {
        name: entry
        for name, entry in checkpoint.entries.items()
        if name.startswith(prefixes(component))
    }
    tensors = {name: _empty(entry) for name, entry in entries.items()}
    owners = {tensor.untyped_storage()._cdata: name for name, tensor in tensors.items()}
    where = ", ".join(map(str, checkpoint.headers))
    try:
        with _Views():
            made = rules[component](dict(tensors), config)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise SourceError(
            f"the {component} in this file has other names than the family's",
            where=where,
            why=repr(error),
            hint="give the model's diffusers folder",
        ) from error
    found: dict[str, Entry] = {}
    turned: dict[str, Entry] = {}
    for name, tensor in made.items():
        entry = entries[owners[tensor.untyped_storage()._cdata]]
        shape = tuple(tensor.shape)
        if tensor.is_contiguous():
            size = tensor.element_size()
            start = entry.offset + int(tensor.storage_offset()) * size
            found[name] = replace(entry, shape=shape, offset=start, length=tensor.nbytes)
        elif tensor.dim() == 2 and tensor.T.is_contiguous() and tensor.nbytes == entry.length:
            turned[name] = replace(entry, shape=shape[::-1])
            found[name] = replace(entry, shape=shape)
        else:
            raise SourceError(
                f"{name} is cut out of a tensor in a way that is not supported",
                where=where,
                why=f"shape {list(shape)}, strides {list(tensor.stride())}",
                hint="give the model's diffusers folder",
            )
    return Converted(found, checkpoint.headers, None, turned)


def prefixes(component: str) -> tuple[str, ...]:
    """What the names of a component's tensors begin with."""
    if component == "unet":
        return (ldm.UNET,)
    if component == "controlnet":  # which comes in files of its own
        return ("",)
    if component.startswith("vae"):
        return ldm.VAES
    return tuple(prefix for prefix, (_, name) in ldm.TEXTS.items() if name == component)


def _empty(entry: Entry) -> torch.Tensor:
    """A tensor of the entry's shape and element size, without values."""
    kinds = {8: torch.uint8, 16: torch.float16, 32: torch.float32, 64: torch.float64}
    return torch.empty(entry.shape, dtype=kinds[entry.dtype.bitwidth], device="meta")


def _unet(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    made: Tensors = converters.convert_ldm_unet_checkpoint(tensors, config)
    if (scale := tensors.get(ldm.UNET + ldm.TIME_COND)) is not None:  # diffusers does not know it
        made["time_embedding.cond_proj.weight"] = scale
    return made


def _controlnet(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    made: dict[str, Any] = converters.convert_controlnet_checkpoint(tensors, config)
    for name, tensor in tensors.items():  # XL's sizes, which diffusers' converter forgets
        if match := _ADDED.fullmatch(name):
            made[f"add_embedding.linear_{1 + int(match[1]) // 2}.{match[2]}"] = tensor
    if lacking := [name for name, tensor in made.items() if tensor is None]:
        raise KeyError(lacking[0])
    return made


def _vae(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    made: Tensors = converters.convert_ldm_vae_checkpoint(tensors, config)
    return made


def _text(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    prefix = next(one for one in ldm.TEXTS if any(name.startswith(one) for name in tensors))
    made: Tensors
    if prefix.endswith("transformer."):
        made = converters.convert_ldm_clip_checkpoint(tensors)
    else:
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
        made = converters.convert_open_clip_checkpoint(model, tensors, prefix=prefix)
    return made
