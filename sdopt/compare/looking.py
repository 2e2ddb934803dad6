"""Looking into a graph: the value that each module gives, handed out while it is computed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from sdopt import companions, graph, modelfile
from sdopt.compare.stepping import Stepper, Values
from sdopt.errors import UsageError

Seen = tuple[int, str, np.ndarray]
"""Number of the sample, the layer's name, what it gave."""


class Inside(Protocol):
    """Something whose layers can be looked at; ``wired`` if it knows what feeds each of them."""

    @property
    def wired(self) -> bool:
        """Whether ``Layer.before`` is known."""

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The layers by name, in the order they are computed."""

    def look(self, feeds: Sequence[Values], names: Collection[str]) -> Iterator[Seen]:
        """Compute, and hand out these layers as they come."""


@dataclass(frozen=True)
class Layer:
    """A value of a graph that has the same meaning in other graphs of the model.

    Attributes:
        name: the path of the module whose result it is; the value's own name in graphs that know
            no modules.
        value: its name in this graph.
        op: the operator that computes it.
        before: values of the layers that it is computed from, the nearest on every way.
    """

    name: str
    value: str
    op: str
    before: frozenset[str] = frozenset()


@dataclass
class InsideGraphs:
    """A stage's graphs in the order they run, and the layers in them.

    ``in_place`` companions, which run instead of the main graph, are not looked at: a run begins
    with the main graph.
    """

    path: Path
    layers: dict[str, Layer] = field(default_factory=dict)
    wired: bool = True

    def __post_init__(self) -> None:
        """Read the graphs; no weight is."""
        model = modelfile.load(self.path)
        text = model.metadata_props.get(companions.PLAN_KEY)
        self._plan = companions.Plan.loads(text, str(self.path)) if text else None
        beside = companions.graphs(model)
        before = [
            beside[one.name]
            for one in (self._plan.graphs if self._plan else ())
            if not companions.Schedule(one.schedule).in_place
        ]
        self._graphs: list[ir.Model] = [*before, model]
        double: set[str] = set()
        named = any(map(_has_modules, self._graphs))
        sources: dict[str, frozenset[str]] = {}
        for one in self._graphs:
            ShapeInferencePass(strict_mode=False)(one)
            for layer in layers_of(one, named, sources):
                if layer.name in self.layers:
                    double.add(layer.name)  # its parts lie in several graphs
                self.layers[layer.name] = layer
        for name in double:
            del self.layers[name]

    def look(self, feeds: Sequence[Values], names: Collection[str]) -> Iterator[Seen]:
        """Run the graphs and hand out these layers, in the order they are computed.

        Raises:
            BuildError: onnxruntime refuses or fails in the graph.
        """
        names_of: dict[str, list[str]] = {}
        for name in names:
            names_of.setdefault(self.layers[name].value, []).append(name)
        values = [dict(one) for one in feeds]
        for name, (source, axis) in (self._plan.sizes if self._plan else {}).items():
            for each in values:
                each[name] = np.array([np.shape(each[source])[axis]], np.int64)
        for one in self._graphs:
            stepper = Stepper(ir.to_proto(one), self.path.parent, names_of)
            if unknown := set(stepper.inputs) - values[0].keys():
                raise UsageError(
                    f"nothing feeds {', '.join(sorted(unknown))}", where=str(self.path)
                )
            for number, value, array in stepper.run([dict(each) for each in values]):
                for name in names_of.get(value, ()):
                    yield number, name, array
                if value in stepper.outputs:
                    values[number][value] = array


def layers_of(model: ir.Model, named: bool, sources: dict[str, frozenset[str]]) -> Iterator[Layer]:
    """The layers of one graph, in its order; of modules with one result the innermost first.

    A module's result is the last float value of it that is read outside of it. ``sources`` holds
    by value which layers' values it comes from, and is added to.
    """
    results = _results(model) if named else _values(model)
    names: dict[ir.Value, list[str]] = {}
    for name, value in results.items():
        names.setdefault(value, []).append(name)
    for node in model.graph:
        feeding = [value for value in node.inputs if value is not None]
        feeding += [v for body in graph.bodies(node) for v in _captured(body)]
        before = frozenset().union(*(sources.get(v.name or "", frozenset()) for v in feeding))
        for value in node.outputs:
            label = value.name or ""
            sources[label] = frozenset({label}) if value in names else before
            for name in sorted(names.get(value, ()), key=len, reverse=True):
                yield Layer(name, label, node.op_type, before)


def _captured(body: ir.Graph) -> Iterator[ir.Value]:
    for node in body.all_nodes():
        yield from (value for value in node.inputs if value is not None)


def _has_modules(model: ir.Model) -> bool:
    return any(graph.MODULE_KEY in node.metadata_props for node in model.graph)


def _is_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def _values(model: ir.Model) -> dict[str, ir.Value]:
    """Every computed float value by its own name, for graphs that know no modules."""
    return {
        value.name: value
        for node in model.graph
        for value in node.outputs
        if value.name
        and value.dtype is not None
        and _is_float(value)
        and node.op_type != "Cast"
        and not _is_of_weights(node)
    }


def _results(model: ir.Model) -> dict[str, ir.Value]:
    """Module path to the last float value that leaves the module."""
    found: dict[str, ir.Value] = {}
    for node in model.graph:
        path = node.metadata_props.get(graph.MODULE_KEY)
        if not path or _is_of_weights(node):
            continue
        for value in filter(_is_float, node.outputs):
            readers = [user.metadata_props.get(graph.MODULE_KEY, "") for user in value.consumers()]
            for module in _modules(path):
                if value.is_graph_output() or not all(graph.in_module(r, module) for r in readers):
                    found[module] = value
    return found


def _modules(path: str) -> Iterator[str]:
    """A module path and those it lies in, the innermost first."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        yield ".".join(parts[:count])


def _is_of_weights(node: ir.Node) -> bool:
    """Whether a node works on weights alone, as the transposition of a linear layer's does."""
    feeding = [value for value in node.inputs if value is not None]
    return all(value.is_initializer() for value in feeding)
