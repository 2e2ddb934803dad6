"""``deep_cache``: most steps compute the shallow part of the U-Net, on a kept deep feature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt import companions, flops
from sdopt.passes import _invariant, _skip_connection
from sdopt.passes._extraction import Extraction
from sdopt.passes.base import Interface, Numerics, Pass, PassContext, Reach, Role

_WHERE = "the whole graph"
SHALLOW = "shallow"


@dataclass(frozen=True)
class DeepCache(Pass):
    """Add a shallow form of the U-Net that takes what comes from below out of an earlier step.

    Before / After:
        out = f(sample, timestep, ...)
            ->  out, deep_feature = f(sample, timestep, ...)            every Nth step
                out = shallow(sample, timestep, ..., deep_feature)      in between

    Applies when: the graph joins what comes from below with the skip connections of its way down.
    The feature is what the first join at the highest resolution takes from below (in SD1.x the
    output of the last upsampler), so that a shallow step computes the first down block and the
    last up block. Both forms share their weights. With ``hoist``, which comes first, both take
    what was hoisted. The idea is that of DeepCache (Ma et al., CVPR 2024).

    Numerics: lossy; full steps are exact. examples/digits: 0.57 to 0.66 of a step's time with 3.

    Options:
        every: the full graph computes every Nth step, ``deep_cache=3``; 0 with ``steps``.
        steps: instead, numbers of the steps that the shallow one computes (``steps=1+2+4``); the
            first step of a run is 0, and always full.
        cut: which feature; a number says how often the resolution of its join was halved (0; for
            SDXL 1 is the output of its first upsampler), a module path whose output it is.
        step: name of the input that tells the step, for graphs that call it otherwise.
    """

    every: int
    steps: tuple[str, ...] = ()
    cut: str = "0"
    step: str = ""

    numerics: ClassVar[Numerics] = Numerics.LOSSY
    roles: ClassVar[frozenset[Role]] = frozenset({Role.DENOISER, Role.MODEL})
    after: ClassVar[tuple[str, ...]] = (
        "lora",
        "raise_ops",
        "fuse_qkv",
        "pad_align",
        "tome",
        "hoist",
    )
    interface: ClassVar[Interface] = Interface.CHANGES
    reach: ClassVar[Reach] = Reach.MAIN

    def __post_init__(self) -> None:
        if not all(step.isdigit() and int(step) > 0 for step in self.steps):
            raise ValueError(f"steps must be numbers above 0, not {'+'.join(self.steps)}")
        if self.steps and self.every:
            raise ValueError("give a rhythm (deep_cache=3) or a list (deep_cache=0:steps=1+2)")
        if not self.steps and self.every < 2:
            raise ValueError(f"every must be 2 or more, not {self.every}")

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Find the feature, copy what does not need it computed, and give it as an output."""
        attached = companions.of(model)
        if attached and any(one.schedule.in_place for one in attached.graphs.values()):
            ctx.skip("it has a shallow form already", _WHERE)
            return
        clock = self._clock(model, attached)
        if clock is None:
            ctx.skip("no input is known to tell the step: deep_cache=N:step=NAME", _WHERE)
            return
        feature = self._feature(model)
        if isinstance(feature, str):
            ctx.skip(feature, _WHERE)
            return
        nodes = _skip_connection.needed_beside(model.graph, feature)
        if any(a.type == ir.AttributeType.GRAPH for n in nodes for a in n.attributes.values()):
            ctx.skip("the shallow part holds a node with a body (If, Loop)", _WHERE)
            return
        if feature not in {value for node in nodes for value in node.inputs}:
            ctx.skip("no output depends on the feature", feature.producer() or _WHERE)
            return
        if not _invariant.state_types(model, [feature]):
            ctx.skip("the feature has no known type and rank", feature.producer() or _WHERE)
            return
        ctx.note(_cost(model, nodes, flops.sizes_of(ctx.config)))
        attached = companions.attach(model)
        attached.clock = clock
        attached.same = attached.same or tuple(
            v.name or "" for v in model.graph.inputs if v.name != clock and not _is_map(v)
        )
        _split(model, feature, nodes, ctx.companion(SHALLOW, self._schedule()), ctx)
        ctx.count("shallow_graph")

    def _schedule(self) -> str:
        return f"steps={'+'.join(self.steps)}" if self.steps else f"every={self.every}"

    def _clock(self, model: ir.Model, attached: companions.Attached | None) -> str | None:
        if attached and attached.clock and not self.step:
            return attached.clock
        names = (self.step,) if self.step else _invariant.STEP_INPUTS
        found = _invariant.inputs_named(model.graph, names)
        return found[0].name if found else None

    def _feature(self, model: ir.Model) -> ir.Value | str:
        """The value to keep, or why there is none."""
        if not self.cut.isdigit():
            return _skip_connection.output_of(model.graph, self.cut)
        joins = _skip_connection.find(model.graph)
        if not joins:
            return "it joins no feature map with one from its way down"
        wanted = [one.below for one in joins if one.level == int(self.cut)]
        if not wanted:
            levels = ", ".join(map(str, sorted({one.level for one in joins})))
            return f"no join is at cut={self.cut}: there are {levels}"
        return wanted[0]


def _is_map(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 4


def _cost(model: ir.Model, nodes: list[ir.Node], sizes: Mapping[str, int]) -> str:
    cost = flops.count(model, sizes)
    part = sum(cost.by_node.get(node, 0) for node in nodes)
    return (
        f"a shallow step takes {part / max(cost.total, 1):.1%} of a full one's "
        f"{cost.total / 1e9:.3g} GFLOP ({flops.stated(sizes)})"
    )


def _split(
    model: ir.Model, feature: ir.Value, nodes: list[ir.Node], shallow: ir.Model, ctx: PassContext
) -> None:
    feature.name = ctx.unique("deep_feature")
    copy = Extraction(model, shallow, [feature], model.graph.inputs)
    for node in nodes:
        copy.node(node)
    copy.give(model.graph.outputs)
    model.graph.outputs.append(feature)
