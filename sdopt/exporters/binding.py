"""A traced graph and a checkpoint become one: initializers turn into ranges of its files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from sdopt import weights
from sdopt.errors import SourceError
from sdopt.exporters.checkpoint import Checkpoint
from sdopt.exporters.network import BUFFERS
from sdopt.graph import MODULE_KEY

_TEXT = "text_model."
_OLD_ATTENTION = {
    ".to_q.": ".query.",
    ".to_k.": ".key.",
    ".to_v.": ".value.",
    ".to_out.0.": ".proj_attn.",
}
_AGAIN = "download the folder again, with config.json and weights of one revision"
_SHOWN = 5


def match(
    shapes: Mapping[str, tuple[int, ...]],
    tied: Iterable[tuple[str, ...]],
    checkpoint: Checkpoint,
    where: str,
) -> dict[str, str]:
    """Find every parameter of a network in a checkpoint: name to the name there.

    Raises:
        SourceError: the checkpoint lacks a weight, or one has another shape than the
            configuration says; ``where`` is named in it.
    """
    groups = list(tied)
    found = {name: _key(name, checkpoint, groups) for name in shapes}
    if missing := [name for name, key in found.items() if key is None]:
        raise SourceError(
            f"the checkpoint lacks {_some(missing)}",
            where=where,
            why="the configuration describes a network that has these weights",
            hint=_AGAIN,
        )
    keys = {name: key for name, key in found.items() if key is not None}
    wrong = [
        f"{key} is {list(checkpoint.entries[key].shape)}, not {list(shapes[name])}"
        for name, key in keys.items()
        if checkpoint.entries[key].shape != shapes[name]
    ]
    if wrong:
        raise SourceError(
            f"the checkpoint's shapes are not those of the configuration: {_some(wrong)}",
            where=where,
            hint=_AGAIN,
        )
    return keys


def bind(
    model: ir.Model,
    keys: Mapping[str, str],
    checkpoint: Checkpoint,
    dtype: ir.DataType,
) -> None:
    """Give every initializer its value: a range of the checkpoint, cast lazily if need be.

    Initializers take the checkpoint's names. Module paths follow where these differ by the prefix
    ``text_model.``, so that a path and its weights agree whatever wrote the checkpoint.

    Raises:
        SourceError: a buffer's value is unknown.
    """
    first: dict[str, ir.Value] = {}
    # All are taken out first: one's new name may be another's old one.
    unbound = dict(model.graph.initializers)
    model.graph.initializers.clear()
    for name, value in unbound.items():
        key = keys.get(name)
        if key is not None and key in first:  # a tied weight
            value.replace_all_uses_with(first[key])
            continue
        tensor = checkpoint.external(key) if key is not None else None
        if tensor is None:
            value.const_value = _constant(value)
        elif tensor.dtype.is_floating_point():
            value.const_value = weights.cast(tensor, dtype)
        else:
            value.const_value = tensor
        if key is not None:
            first[key] = value
            value.name = key
        value.dtype = value.const_value.dtype
        model.graph.initializers[str(value.name)] = value
    added = any(key == _TEXT + name for name, key in keys.items())
    dropped = any(_TEXT + key == name for name, key in keys.items())
    for node in model.graph.all_nodes():
        if path := node.metadata_props.get(MODULE_KEY):
            path = _TEXT + path if added else path.removeprefix(_TEXT) if dropped else path
            node.metadata_props[MODULE_KEY] = path


def _key(name: str, checkpoint: Checkpoint, tied: Iterable[tuple[str, ...]]) -> str | None:
    """The checkpoint's name for a parameter, or None if it has none."""
    names = [name, *(other for group in tied if name in group for other in group)]
    return next(
        (key for one in names for key in _spellings(one) if key in checkpoint.entries), None
    )


def _spellings(name: str) -> Iterator[str]:
    """What diffusers and transformers have called a parameter over time."""
    yield name
    # transformers 4 writes and expects text_model., which transformers 5 dropped.
    yield _TEXT + name
    yield name.removeprefix(_TEXT)
    # diffusers before 0.18 had an attention block of its own; SD 1.5's VAE is saved with it.
    for new, old in _OLD_ATTENTION.items():
        if new in name:
            yield name.replace(new, old)


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def _constant(value: ir.Value) -> ir.TensorProtocol:
    """The real value of a buffer that checkpoints do not hold."""
    make = BUFFERS.get(str(value.name).rpartition(".")[2])
    if make is None or value.shape is None:
        raise SourceError(
            f"the value of {value.name} is neither in the checkpoint nor known",
            hint="this network is not supported yet: please report it with its config.json",
        )
    array: np.ndarray = make(tuple(value.shape.numpy()))
    return ir.Tensor(array, name=value.name)
