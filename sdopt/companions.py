"""Graphs beside a main graph: what each takes and gives and when it runs, as data.

A pass may move work out of a stage's graph into companions, or add a cheaper form of the graph.
Values go between them by name: what one graph gives under a name, the next takes under that name.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from sdopt import reading
from sdopt.errors import BundleError
from sdopt.manifest import read_object

PLAN_KEY = "sdopt.companions"
"""Metadata key of a main graph: its ``Plan`` as JSON."""

_FREE_WEIGHTS = 4
"""The IR version since which a weight need not be an input as well."""

SCHEMA = 1
_ATTACHED = "sdopt.companions"
_FILE = re.compile(r"([^/\\]+)-[a-z_]+-[0-9a-f]{12}\.onnx")
_SCHEDULE = re.compile(r"prompt|step|every=\d+|steps=\d+(\+\d+)*")


@dataclass(frozen=True)
class Schedule:
    """When a companion runs, as text.

    ``prompt``: before the main graph, once per prompt. ``step``: before the main graph, once per
    value of the timestep. ``every=3``: in place of the main graph, which then runs at every third
    step only. ``steps=1+2+4``: in place of the main graph at the steps of these numbers (from 0).
    """

    text: str

    def __post_init__(self) -> None:
        if not _SCHEDULE.fullmatch(self.text) or self.text == "every=0":
            raise ValueError(f"{self.text!r} is no schedule")

    @property
    def in_place(self) -> bool:
        """Whether the companion runs in place of the main graph, not before it."""
        return "=" in self.text

    def replaces(self, step: int) -> bool:
        """Whether it runs in place of the main graph at the step of that number, from 0."""
        kind, _, value = self.text.partition("=")
        if kind == "every":
            return step % int(value) != 0
        return kind == "steps" and str(step) in value.split("+")


@dataclass(frozen=True)
class Entry:
    """One companion in a plan: its file beside the main graph, and what goes in and out."""

    name: str
    schedule: str
    file: str
    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a schedule that is none, and a file elsewhere, which only a forged plan names."""
        Schedule(self.schedule)
        if not isinstance(self.name, str) or (self.file and not is_file_name(self.file)):
            raise ValueError(f"{self.file!r} is no companion's file name")


@dataclass(frozen=True)
class Plan:
    """How companions and main graph together are one function, kept in the main graph's file.

    Attributes:
        inputs: names of what the function takes, in order.
        outputs: names of what it gives; what the main graph gives beyond them is for companions.
        graphs: in the order they run.
        sizes: inputs of companions that are a size, as int64 ``[1]``: name to (input, axis).
        clock: the input that tells the step.
        same: the inputs that do not change within a run.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    graphs: tuple[Entry, ...]
    sizes: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    clock: str = ""
    same: tuple[str, ...] = ()
    schema: int = SCHEMA

    def dumps(self) -> str:
        """The plan as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def loads(cls, text: str, where: str) -> Plan:
        """Read a plan.

        Raises:
            BundleError: unreadable, by a newer sdopt, or it names a file outside the folder.
        """
        data = read_object(text, where)
        try:
            graphs = tuple(
                Entry(
                    one["name"], one["schedule"], one["file"],
                    tuple(one["takes"]), tuple(one["gives"]),
                )
                for one in data["graphs"]
            )  # fmt: skip
            if not all(one.file for one in graphs) or len({g.name for g in graphs}) < len(graphs):
                raise ValueError("a companion without a file, or two of one name")  # noqa: TRY301
            plain = {key: value for key, value in data.items() if key != "graphs"}
            found = reading.fields(cls, plain)
            return cls(
                inputs=tuple(found["inputs"]),
                outputs=tuple(found["outputs"]),
                graphs=graphs,
                sizes={key: (name, axis) for key, (name, axis) in found["sizes"].items()},
                clock=found["clock"],
                same=tuple(found["same"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(
                "the plan of this graph's companions cannot be read",
                where=where,
                why=f"{type(error).__name__}: {error}",
                hint="make the stage again from the one that it came from",
            ) from error


@dataclass
class Companion:
    """One companion in memory."""

    model: ir.Model
    schedule: Schedule


@dataclass
class Attached:
    """The companions of a model in memory; see ``Plan`` for the fields."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    graphs: dict[str, Companion] = field(default_factory=dict)
    sizes: dict[str, tuple[str, int]] = field(default_factory=dict)
    clock: str = ""
    same: tuple[str, ...] = ()

    def plan(self, files: Mapping[str, str]) -> Plan:
        """What is written of it, once the companions' files have names."""
        graphs = tuple(
            Entry(
                name,
                one.schedule.text,
                files[name],
                tuple(v.name or "" for v in needed_inputs(one.model.graph)),
                tuple(v.name or "" for v in one.model.graph.outputs),
            )
            for name, one in self.graphs.items()
        )
        return Plan(self.inputs, self.outputs, graphs, self.sizes, self.clock, self.same)


def of(model: ir.Model) -> Attached | None:
    """The companions of a model, or None if it has none."""
    found: Attached | None = model.meta.get(_ATTACHED)
    return found


def attach(model: ir.Model) -> Attached:
    """The companions of a model; without any, what it takes and gives now is remembered."""
    if (found := of(model)) is None:
        inputs = tuple(value.name or "" for value in needed_inputs(model.graph))
        outputs = tuple(value.name or "" for value in model.graph.outputs)
        found = model.meta[_ATTACHED] = Attached(inputs, outputs)
    return found


def needed_inputs(one: ir.Graph) -> list[ir.Value]:
    """The inputs that a caller must give: those that no initializer stands behind."""
    return [value for value in one.inputs if not value.is_initializer()]


def adopt(model: ir.Model, plan: Plan, graphs: Mapping[str, ir.Model]) -> None:
    """Attach companions that were read from disk."""
    model.meta[_ATTACHED] = Attached(
        plan.inputs,
        plan.outputs,
        {one.name: Companion(graphs[one.name], Schedule(one.schedule)) for one in plan.graphs},
        dict(plan.sizes),
        plan.clock,
        plan.same,
    )


def graphs(model: ir.Model) -> dict[str, ir.Model]:
    """The companions' graphs by name, in the order they run; empty if there are none."""
    found = of(model)
    return {name: one.model for name, one in found.graphs.items()} if found else {}


def family(model: ir.Model) -> Iterator[ir.Model]:
    """The main graph, then its companions."""
    yield model
    yield from graphs(model).values()


def file_name(stem: str, companion: str, digest: str) -> str:
    """``optimized``, ``prompt`` and a digest to ``optimized-prompt-<digest>.onnx``."""
    return f"{stem}-{companion}-{digest[:12]}.onnx"


def is_file_name(name: str, stem: str | None = None) -> bool:
    """Whether ``name`` is that of a companion's file (of a stage called ``stem``, if given)."""
    found = _FILE.fullmatch(name)
    return found is not None and stem in (None, found[1])


def settle_types(model: ir.Model) -> None:
    """Let every graph take what another gives in the type in which it is given."""
    given: dict[str, ir.DataType | None] = {}
    attached = of(model)
    for one in attached.graphs.values() if attached else ():
        if not one.schedule.in_place:
            given |= {value.name or "": value.dtype for value in one.model.graph.outputs}
    for each in family(model):
        for value in list(each.graph.inputs):
            wanted = None if value.is_initializer() else given.get(value.name or "")
            if wanted is not None and value.dtype not in (wanted, None):
                _cast_input(each.graph, value, wanted)
        if each is model:
            given |= {value.name or "": value.dtype for value in each.graph.outputs}


def settle_ir_versions(model: ir.Model) -> None:
    """Raise an IR version below 4, where every weight must be an input, if one is not."""
    for each in family(model):
        weights = each.graph.initializers.values()
        if each.ir_version < _FREE_WEIGHTS and not all(v.is_graph_input() for v in weights):
            each.ir_version = _FREE_WEIGHTS


def _cast_input(one: ir.Graph, value: ir.Value, wanted: ir.DataType) -> None:
    """Let a graph take an input in another type and cast it to the one it computes in."""
    names = {out.name for node in one for out in node.outputs}
    name = f"{value.name}_cast"
    while name in names:
        name += "_"
    cast = ir.node("Cast", [value], {"to": int(value.dtype or wanted)}, name=name)
    output = cast.outputs[0]
    output.name, output.type, output.shape = name, value.type, value.shape
    for user, index in list(value.uses()):
        if user is not cast:
            user.replace_input_with(index, output)
    value.type = ir.TensorType(wanted)
    nodes = list(one)
    one.insert_before(nodes[0], cast) if nodes else one.append(cast)


def broken_wire(model: ir.Model) -> str | None:
    """What is wrong with the values that go between a model's graphs, or None.

    Every input of a graph is one of the function's, a size, or given by a graph that runs before
    it, in the type that it is given in; together they give every output of the function.
    """
    found = of(model)
    if found is None:
        return None
    known: dict[str, Any] = dict.fromkeys((*found.inputs, *found.sizes))
    main = {value.name or "": value.dtype for value in model.graph.outputs}
    if missing := set(found.outputs) - main.keys():
        return f"the main graph gives no {', '.join(sorted(missing))}"
    ahead = [(n, c.model, c.schedule.in_place) for n, c in found.graphs.items()]
    order = [one for one in ahead if not one[2]]
    order += [("the main graph", model, False), *[one for one in ahead if one[2]]]
    for name, one, in_place in order:
        for value in needed_inputs(one.graph):
            label = value.name or ""
            if label not in known:
                return f"{name} takes {label!r}, which nothing gives"
            if known[label] is not None and known[label] != value.dtype:
                return f"{name} takes {label!r} as {value.dtype}, it is given as {known[label]}"
        gives = {value.name or "": value.dtype for value in one.graph.outputs}
        if in_place and gives.keys() != set(found.outputs):
            return f"{name} gives {sorted(gives)} in place of {sorted(found.outputs)}"
        if not in_place:
            known |= gives
    return None
