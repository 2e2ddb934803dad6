"""A network to a canonical ONNX graph: traced without weights, names taken from the table."""

from __future__ import annotations

import ast
import contextlib
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, cast

import onnx_ir as ir
import torch
import torch.onnx
from torch._subclasses.fake_tensor import FakeTensor

from sdopt.errors import SourceError
from sdopt.exporters.lowering import lower
from sdopt.exporters.modules import TORCH_DTYPES
from sdopt.exporters.network import Network
from sdopt.exporters.ports import Component, Port
from sdopt.graph import MODULE_KEY

OPSET = 23
"""The first opset in which attention, group, layer and RMS normalization are single nodes."""

_CHATTY = ("torch.onnx._internal.exporter._registration", "torch.utils._sympy.interp")
_MODULES = re.compile(r"\.?__dict__\['_modules'\]\['([^']*)'\]")
_SYMBOL = re.compile(r"\b[A-Za-z_]\w*\b")


def trace(component: Component, network: Network, dtype: ir.DataType) -> ir.Model:
    """Trace ``network`` at opset 23 with every dynamic axis symbolic.

    The graph's initializers have the names of the network's parameters and no values yet; its
    nodes carry their module path as the only metadata.

    Raises:
        SourceError: the network cannot be run, or has an axis or a constant that cannot be
            traced.
    """
    component = component.of(network.config)
    # By name: which of its last arguments a network takes is a matter of its configuration.
    samples = _arguments((port, _sample(port, network, dtype)) for port in component.inputs)
    dynamic = _arguments(
        (port, dict.fromkeys(port.dynamic_axes(), torch.export.Dim.DYNAMIC))
        for port in component.inputs
    )
    try:
        with _quiet(), network.mode:
            program = torch.export.export(
                network, (), kwargs=samples, dynamic_shapes=dynamic, strict=False
            )
            lower(program)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                input_names=[port.name for port in component.inputs],
                output_names=[port.name for port in component.outputs],
            )
    except (RuntimeError, ValueError, TypeError) as error:  # torch's own errors are RuntimeErrors
        raise SourceError(
            f"{component.name} cannot be traced",
            where=f"{component.folder}/config.json",
            why=next(iter(str(error).strip().splitlines()), repr(error)),
            hint="check that diffusers runs this folder; if it does, please report it",
        ) from error
    model = cast(torch.onnx.ONNXProgram, exported).model
    _rename_dims(model, component)
    _reduce_metadata(model, network.prefix)
    unbound = dict(model.graph.initializers)
    model.graph.initializers.clear()
    for name, value in unbound.items():
        value.name = name.removeprefix(network.prefix)
        if value.uses():
            model.graph.initializers[value.name] = value
    model.graph.name = component.name
    return model


def _arguments(pairs: Iterable[tuple[Port, Any]]) -> dict[str, Any]:
    """Keyword arguments of a network: ports ``name.0``, ``name.1`` and so on are one list."""
    found: dict[str, Any] = {}
    for port, value in pairs:
        name, dot, _ = port.name.partition(".")
        if dot:
            found.setdefault(name, []).append(value)
        else:
            found[name] = value
    return found


def _sample(port: Port, network: Network, dtype: ir.DataType) -> torch.Tensor:
    kinds = {"weights": TORCH_DTYPES[dtype], "float32": torch.float32, "int64": torch.int64}
    with network.mode:
        return torch.zeros(port.sample_shape(network.config), dtype=kinds[port.kind])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch 2.13 says about itself while exporting."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        # torch's own deepcopy of a TreeSpec trips over torch's own deprecation.
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _rename_dims(model: ir.Model, component: Component) -> None:
    """Give torch's symbols (``s43``) the table's names, in every shape of the graph."""
    names: dict[str, str] = {}
    for port, value in zip(component.inputs, model.graph.inputs, strict=True):
        for axis, dim in port.dynamic_axes().items():
            symbol = value.shape[axis] if value.shape is not None else None
            if not isinstance(symbol, ir.SymbolicDim) or symbol.value is None:
                raise SourceError(
                    f"{port.name}: axis {axis} ({dim}) came out fixed at {symbol}",
                    where=component.name,
                    why="the network only runs at one size",
                )
            names.setdefault(symbol.value, dim)
    for value in _values(model):
        if value.shape is None or value.shape.is_static():
            continue
        dims = [_renamed(dim, names) for dim in value.shape]
        value.shape = ir.Shape(dims)
    for port, value in zip(component.outputs, model.graph.outputs, strict=True):
        if value.shape is None:
            raise SourceError(f"{port.name} came out without a shape", where=component.name)
        dims = list(value.shape)
        for axis, dim in port.dynamic_axes().items():
            symbol = dims[axis]
            # A size computed from an input's (8*latent_height) gets the port's own name.
            if isinstance(symbol, ir.SymbolicDim) and symbol.value not in names.values():
                dims[axis] = ir.SymbolicDim(dim)
        value.shape = ir.Shape(dims)


def _renamed(dim: int | ir.SymbolicDim, names: dict[str, str]) -> int | ir.SymbolicDim:
    if isinstance(dim, int) or dim.value is None:
        return dim
    return ir.SymbolicDim(_SYMBOL.sub(lambda m: names.get(m.group(), m.group()), dim.value))


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph.all_nodes():
        yield from node.outputs


def _reduce_metadata(model: ir.Model, prefix: str) -> None:
    """Leave each node its module path and nothing else; no doc strings, no references to torch."""
    for node in model.graph.all_nodes():
        _check_real(node)
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")
        path = module_path(ast.literal_eval(scopes), prefix)
        node.metadata_props.clear()
        node.meta.clear()
        node.doc_string = None
        if path:
            node.metadata_props[MODULE_KEY] = path
    for value in _values(model):
        value.metadata_props.clear()
        value.meta.clear()
        value.doc_string = None
    for holder in (model, model.graph):
        holder.metadata_props.clear()
        holder.meta.clear()
        holder.doc_string = None


def _check_real(node: ir.Node) -> None:
    """Refuse a constant whose value torch made up: under fake mode tensors have none."""
    for attr in node.attributes.values():
        if attr.type == ir.AttributeType.TENSOR:
            raw = getattr(attr.value, "raw", None)
            if isinstance(raw, FakeTensor):
                raise SourceError(
                    f"the constant {node.outputs[0].name} has no value under FakeTensorMode",
                    where=str(node.metadata_props.get("pkg.torch.onnx.name_scopes", "")),
                    hint="this network is not supported yet: please report it",
                )


def module_path(scopes: list[str], prefix: str) -> str:
    """The innermost module in torch's scopes, which end with the name of the FX node itself.

    torch spells a module that is reached around ``__getattr__`` as
    ``unet.__dict__['_modules']['down_blocks'].0`` and one that it knows nothing of as
    ``_empty_nn_module_stack_from_metadata_hook``.
    """
    if len(scopes) < 2 or scopes[-2].startswith("_empty_nn_module_stack"):
        return ""
    path = _MODULES.sub(r".\1", scopes[-2]).strip(".")
    return f"{path}.".removeprefix(prefix).strip(".")
