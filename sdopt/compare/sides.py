"""What can be compared: bundles' stages, ONNX files, artifacts, a checkpoint's PyTorch modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from sdopt import artifacts, companions, graph, modelfile, registry, spec
from sdopt.bundle import MANIFEST, OPTIMIZED, Bundle, read_record
from sdopt.compare import polygraphed
from sdopt.compare.looking import Inside, InsideGraphs
from sdopt.errors import UnknownNameError, UsageError
from sdopt.manifest import RECORD_KEY, StageRecord, Step
from sdopt.runtime.scheduled import open_stage
from sdopt.session import Port, Session

if TYPE_CHECKING:
    from sdopt.compare import reference

PYTORCH = "pytorch"
"""In the place of a stage: the checkpoint that lies in the same folder, run by PyTorch."""

Compute = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Opened:
    """One component of a side, ready to run.

    Attributes:
        label: what a report calls it.
        run: computes its outputs.
        ports: its inputs; None where it takes what the other side takes.
        origin: the model that it was exported from, if that is known.
        history: the passes that it went through and that changed it.
        dtypes: names of the floating types that its weights and inputs are in.
        vocabularies: how many values an integer input may have, where the graph says it.
        sizes: the largest sizes of dynamic dimensions that its configuration allows.
        inside: looks into it, layer by layer; None where that cannot be done.
    """

    label: str
    run: Compute
    ports: Mapping[str, Port] | None
    origin: str | None = None
    history: tuple[Step, ...] = ()
    dtypes: frozenset[str] = frozenset()
    vocabularies: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    inside: Callable[[], Inside] | None = None


@dataclass(frozen=True)
class Side:
    """One of the two things: its components by name, each with how to open it."""

    label: str
    components: Mapping[str, Callable[[str], Opened]]
    anonymous: bool = False
    """One ONNX file that says of no component that it is one: it fits any."""


def side(text: str | Path, target: str) -> Side:
    """Find out what a text names: a path first, else ``BUNDLE@STAGE``.

    Raises:
        UsageError: neither.
        UnknownNameError: the bundle has no such stage.
    """
    path, stage = Path(text), None
    if not path.exists():
        head, at, stage = str(text).rpartition("@")
        path = Path(head)
        if not at or not path.is_dir():
            raise UsageError(
                "there is nothing to compare here",
                where=str(text),
                hint="give BUNDLE, BUNDLE@STAGE, FILE.onnx or a diffusers folder",
            )
    if path.is_file():
        made = artifacts.recorded(path)
        return _artifact(path, made.facts, target) if made else _file(path, target)
    is_bundle = (path / MANIFEST).is_file() or not (path / "model_index.json").is_file()
    if stage == PYTORCH or (stage is None and not is_bundle):
        return _checkpoint(path)
    return _bundle(Bundle.open(path), stage, target)


def _file(path: Path, target: str) -> Side:
    text = modelfile.load(path).metadata_props.get(RECORD_KEY)
    name = StageRecord.loads(text, str(path)).component if text else path.stem
    label = str(path)
    return Side(label, {name: lambda _: _graph(path, label, target, {})}, anonymous=text is None)


def _artifact(path: Path, facts: Mapping[str, Any], target: str) -> Side:
    """An artifact, run by its own target: on a card, or on a simulator at its first size.

    Raises:
        UsageError: what it was built from is not known any more.
    """
    if "simulated" in facts:
        how = facts["simulated"]

        def simulated(name: str) -> Opened:
            session = registry.make("targets", facts["target"]).open(path)
            first = facts["sizes"][0]
            ports = {k: Port(port.dtype, tuple(first[k])) for k, port in session.inputs.items()}
            history = tuple(Step(**step) for step in how["history"])
            dtypes = frozenset(how["dtypes"])
            return Opened(str(path), session.run, ports, how["origin"], history, dtypes)

        return Side(str(path), {facts["component"]: simulated})
    lowered = path.with_suffix(".onnx")
    record = read_record(lowered) if lowered.is_file() else None
    if record is None or "target" not in facts:
        raise UsageError(
            "what this artifact was built from is not known",
            where=str(path),
            why=f"{lowered.name} beside it says so",
            hint="build it again: sdopt build BUNDLE --target ...",
        )

    def opened(_: str) -> Opened:
        graph_of = _graph(lowered, str(path), target, {})
        run = _Lazy(lambda: polygraphed.session(path, facts["target"]))
        return dataclasses.replace(graph_of, run=run, inside=None)

    return Side(str(path), {record.component: opened})


def _bundle(bundle: Bundle, stage: str | None, target: str) -> Side:
    stages = {
        name: bundle.current(name, OPTIMIZED) if stage is None else bundle.stage(name, stage)
        for name in bundle.components
        if stage is None or stage in bundle.stages(name)
    }
    if not stages:
        known = {one for name in bundle.components for one in bundle.stages(name)}
        raise UnknownNameError(
            f"no component has a stage {stage!r}",
            where=str(bundle.path),
            hint=spec.suggest(stage or "", known),
        )

    def opened(name: str) -> Opened:
        one = stages[name]
        label = f"{bundle.path}@{one.name}"
        return _graph(one.path, label, target, bundle.config(name))

    return Side(str(bundle.path), dict.fromkeys(stages, opened))


def _graph(path: Path, label: str, target: str, config: Mapping[str, Any]) -> Opened:
    model = modelfile.load(path)
    text = model.metadata_props.get(RECORD_KEY)
    record = StageRecord.loads(text, str(path)) if text else None
    limit = config.get("max_position_embeddings")
    return Opened(
        label,
        _Lazy(lambda: _session(path, target)),
        ports_of(model, str(path)),
        origin=record.origin if record else None,
        history=tuple(s for s in record.history if s.changed) if record else (),
        dtypes=frozenset(_float_types(model)),
        vocabularies=vocabularies(model),
        sizes={"sequence_length": limit} if limit else {},
        inside=lambda: InsideGraphs(path),
    )


class _Lazy:
    """A session that is opened when it is first run: its weights may not fit into memory."""

    def __init__(self, opens: Callable[[], polygraphed.Runs]) -> None:
        self._opens = opens
        self._session: polygraphed.Runs | None = None

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._session = self._session or self._opens()
        return self._session.run(feeds)


def ports_of(model: ir.Model, where: str) -> dict[str, Port]:
    """The inputs of a graph, of a stage with companions those of the function they are together.

    Raises:
        BundleError: the plan of the companions cannot be read.
    """
    text = model.metadata_props.get(companions.PLAN_KEY)
    values = {v.name or "": v for one in companions.family(model) for v in one.graph.inputs}
    weights = {name for one in companions.family(model) for name in one.graph.initializers}
    names = companions.Plan.loads(text, where).inputs if text else list(values)
    found = {}
    for name in (name for name in names if name in values and name not in weights):
        value = values[name]
        dims = tuple(
            dim if isinstance(dim, int) else dim.value or "?" for dim in value.shape or ()
        )
        dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
        found[name] = Port(dtype, dims)
    return found


def _session(path: Path, target: str) -> Session:
    (item,) = spec.parse(target)
    chosen = spec.bind(registry.resolve("targets", item.name), item)
    return open_stage(chosen, path, optimize=False)


def _checkpoint(path: Path) -> Side:
    from sdopt.compare import reference

    return Side(
        f"{path} in PyTorch",
        {
            name: lambda name: _module(path, reference.module(path, name))
            for name in reference.components(path)
        },
    )


def _module(path: Path, module: reference.Module) -> Opened:
    return Opened(f"{path}@{PYTORCH}", module.run, None, inside=lambda: module)


def _float_types(model: ir.Model) -> set[str]:
    """The floating types of the weights and inputs; single numbers do not count."""
    graphs = list(companions.family(model))
    tensors = [v.const_value for one in graphs for v in modelfile.initializers(one)]
    types = {tensor.dtype for tensor in tensors if tensor is not None and tensor.size > 1}
    types |= {v.dtype for one in graphs for v in one.graph.inputs if v.dtype is not None}
    return {str(one.numpy()) for one in types if one.is_floating_point()}


_PASSING = ("Reshape", "Cast", "Identity", "Unsqueeze", "Squeeze", "Flatten")


def vocabularies(model: ir.Model) -> dict[str, int]:
    """Rows of the embedding table that each integer input picks from."""
    found = {}
    for value in (v for one in companions.family(model) for v in one.graph.inputs):
        if value.dtype is not None and value.dtype.is_integer() and (rows := _rows(value)):
            found[value.name or ""] = rows
    return found


def _rows(value: ir.Value) -> int | None:
    for node in value.consumers():
        if node.op_type == "Gather" and node.inputs[1] is value:
            table = node.inputs[0]
            axis = graph.attribute(node, "axis", 0)
            if table is not None and table.const_value is not None:
                return int(table.const_value.shape.numpy()[axis])
        elif node.op_type in _PASSING and (rows := _rows(node.outputs[0])):
            return rows
    return None
