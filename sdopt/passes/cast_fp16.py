"""``cast_fp16``: half-precision weights and arithmetic, with a keep-list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from sdopt import graph
from sdopt.passes import _precision
from sdopt.passes.base import Interface, Numerics, Pass, PassContext


@dataclass(frozen=True)
class CastFp16(Pass):
    """Compute in float16; weights are cast while they are written, never held.

    Before / After:
        fp32 weight, fp32 arithmetic      ->  fp16 weight, fp16 arithmetic
        sin and cos of the timestep       ->  as they were, a Cast behind them
        -inf in a mask                    ->  -65504

    Applies when: the weights are float32. Nodes whose weights pass 65504 stay in float32 and are
    reported by module path; so do operators that have no fp16 form, and control flow.

    Numerics: lossy, small (relative L2 about 1e-3 on a UNet).

    Options:
        keep: what stays in float32, joined by ``+``: ``io`` (the graph's inputs and outputs), an
            operator (``GroupNormalization``), or a module path, ``*`` for one level
            (``up_blocks.3+mid_block.attentions.*``).
    """

    numerics: ClassVar[Numerics] = Numerics.LOSSY
    after: ClassVar[tuple[str, ...]] = ("clean", "raise_ops", "fuse_qkv", "pad_align", "tome")
    interface: ClassVar[Interface] = Interface.CHANGES

    keep: tuple[str, ...] = ()

    def changes_interface(self) -> bool:
        """Inputs and outputs become fp16 unless ``keep`` holds ``io``."""
        return "io" not in self.keep

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Decide per node, then retype values, weights and inputs."""
        if _precision.is_half_already(model):
            ctx.skip("the weights are in a half type already", "the whole graph")
            return
        ShapeInferencePass()(model)  # exporters leave intermediate values without a type
        half = ir.DataType.FLOAT16
        types = _precision.Types(graph.opset(model), half)
        nodes = list(graph.nodes(model))
        stays, saturated = self._decide(model, nodes, types, half, ctx)
        floats = {
            v for node in nodes for v in node.inputs if v is not None and _precision.is_float(v)
        }
        floats |= {v for node in nodes for v in node.outputs if _precision.is_float(v)}
        caster = _precision.Caster(half, types, stays.__contains__, saturated, ctx.unique)
        if self.changes_interface():
            self._retype_inputs(model, stays, half)
        for node in nodes:
            caster.retype_outputs(node)
        for node in nodes:
            caster.settle_inputs(node, floats.__contains__)
        self._settle_outputs(model, caster, floats, half)
        graph.drop_unused_initializers(model)
        ctx.count("weight cast", caster.weights)
        ctx.count("Cast inserted", caster.casts)
        ctx.count("node kept in fp32", len(stays))

    def _decide(
        self,
        model: ir.Model,
        nodes: list[ir.Node],
        types: _precision.Types,
        half: ir.DataType,
        ctx: PassContext,
    ) -> tuple[set[ir.Node], frozenset[ir.Value]]:
        """The nodes that stay in float32, and the constants whose overflow is clipped."""
        stays = _precision.phase_nodes(nodes)
        stays |= {node for node in nodes if graph.FLOAT32_KEY in node.metadata_props}
        for entry in (entry for entry in self.keep if entry != "io"):
            found = {
                node
                for node in nodes
                if entry == node.op_type or graph.in_module(graph.module_path(node), entry)
            }
            if not found:
                ctx.skip(f"keep={entry} names no operator and no module of this graph", entry)
            stays |= found
        for node in nodes:
            known = types.of(node)
            if node.graph is not model.graph or any(
                a.type == ir.AttributeType.GRAPH for a in node.attributes.values()
            ):
                stays.add(node)
            elif known is None and any(map(_precision.is_float, [*node.inputs, *node.outputs])):
                ctx.skip(f"{node.op_type} has no known fp16 form and stays in fp32", node)
                stays.add(node)
            elif known is not None and not known[1]:
                stays.add(node)
        saturated = set()
        for value in [v for one in model.graphs() for v in one.initializers.values()]:
            if value.const_value is None or value.const_value.dtype != ir.DataType.FLOAT:
                continue
            beyond, negative = _precision.out_of_range(value.const_value, half)
            if beyond and negative and _precision.is_mask(value):
                saturated.add(value)
                ctx.count("mask made finite")
            elif beyond:
                for user in value.consumers():
                    ctx.skip(f"{value.name} holds values beyond 65504: kept in fp32", user)
                    stays.add(user)
        return stays, frozenset(saturated)

    def _retype_inputs(self, model: ir.Model, stays: set[ir.Node], half: ir.DataType) -> None:
        """Inputs become fp16, except one that only float32 nodes read (the timestep)."""
        for value in model.graph.inputs:
            readers = list(value.consumers())
            if value.dtype == ir.DataType.FLOAT and not all(r in stays for r in readers):
                value.dtype = half

    def _settle_outputs(
        self, model: ir.Model, caster: _precision.Caster, floats: set[ir.Value], half: ir.DataType
    ) -> None:
        """Give each output that was float32 its declared type under its own name."""
        wanted = half if self.changes_interface() else ir.DataType.FLOAT
        for index, value in enumerate(model.graph.outputs):
            if value in floats and value.dtype != wanted:
                graph.append_output_cast(model.graph, index, wanted, caster.unique)
