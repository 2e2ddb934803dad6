"""What ``cast_fp16`` and ``cast_bf16`` share: all but the type and its range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt import graph
from sdopt.passes import _precision
from sdopt.passes.base import Intent, Interface, Numerics, Pass, PassContext

_WORDS = {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}


@dataclass(frozen=True)
class HalfCast(Pass):
    """A cast of weights and arithmetic from float32 to ``half``."""

    numerics: ClassVar[Numerics] = Numerics.LOSSY
    intent: ClassVar[Intent] = Intent.CAST
    after: ClassVar[tuple[str, ...]] = (
        "lora",
        "clean",
        "raise_ops",
        "fuse_qkv",
        "pad_align",
        "tome",
    )
    interface: ClassVar[Interface] = Interface.CHANGES
    half: ClassVar[ir.DataType]
    """The type to compute in."""
    narrow: ClassVar[bool]
    """Whether ``half`` holds fewer magnitudes than float32, so that weights may not fit."""

    keep: tuple[str, ...] = ()

    def changes_interface(self) -> bool:
        """Inputs and outputs become half unless ``keep`` holds ``io``."""
        return "io" not in self.keep

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Decide per node, then retype values, weights and inputs."""
        if _precision.is_half_already(model):
            ctx.skip("the weights are in a half type already", "the whole graph")
            return
        known = {value: (value.type, value.shape) for value in _precision.values(model)}
        _precision.infer_types(model)
        if not any(map(_precision.is_float, _precision.values(model))):
            for value, (kind, shape) in known.items():
                value.type, value.shape = kind, shape
            return
        types = _precision.Types(graph.opset(model), self.half)
        nodes = list(graph.nodes(model))
        stays = self._staying(model, nodes, types, ctx)
        saturated = self._out_of_range(model, stays, ctx)
        floats = {
            v for node in nodes for v in node.inputs if v is not None and _precision.is_float(v)
        }
        floats |= {v for node in nodes for v in node.outputs if _precision.is_float(v)}
        ctx.count("node", sum(1 for node in nodes if node not in stays and _computes(node)))
        caster = _precision.Caster(self.half, types, stays.__contains__, saturated, ctx.unique)
        if self.changes_interface():
            self._retype_inputs(model, stays)
        for node in nodes:
            caster.retype_outputs(node)
        for node in nodes:
            caster.settle_inputs(node, floats.__contains__)
        self._settle_outputs(model, caster, floats)
        graph.drop_unused_initializers(model)
        ctx.count("weight cast", caster.weights)
        ctx.count("Cast inserted", caster.casts)
        ctx.count("node kept in fp32", len(stays))

    def _staying(
        self,
        model: ir.Model,
        nodes: list[ir.Node],
        types: _precision.Types,
        ctx: PassContext,
    ) -> set[ir.Node]:
        """The nodes that stay in float32, whatever their weights are."""
        stays = _precision.phase_nodes(nodes) | _precision.index_nodes(nodes)
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
        word = _WORDS[self.half]
        for node in nodes:
            known = types.of(node)
            if node.graph is not model.graph or any(
                a.type == ir.AttributeType.GRAPH for a in node.attributes.values()
            ):
                if node.graph is model.graph and node not in stays and _computes(node):
                    ctx.skip(f"{node.op_type} stays in fp32, with all inside", node, "node")
                stays.add(node)
            elif any(map(_precision.is_compound, [*node.inputs, *node.outputs])):
                if node not in stays:
                    ctx.skip(f"{node.op_type} handles sequences and stays in fp32", node, "node")
                stays.add(node)
            elif known is None and _computes(node):
                if node not in stays:
                    reason = f"{node.op_type} has no known {word} form and stays in fp32"
                    ctx.skip(reason, node, "node")
                stays.add(node)
            elif known is not None and not known[1]:
                if node not in stays and any(map(_precision.is_float, node.outputs)):
                    opset = graph.opset(model)
                    reason = f"{node.op_type} has no {word} form in opset {opset}"
                    ctx.skip(reason, node, "node")
                stays.add(node)
        return stays

    def _out_of_range(
        self, model: ir.Model, stays: set[ir.Node], ctx: PassContext
    ) -> frozenset[ir.Value]:
        """The constants whose overflow is clipped; nodes whose weights would overflow join stays.

        Where ``half`` has the range of float32 only masks are read: the lowest float32 is the
        one number in use that still rounds to ``-inf`` there.
        """
        saturated = set()
        for value in [v for one in model.graphs() for v in one.initializers.values()]:
            if value.const_value is None or value.const_value.dtype != ir.DataType.FLOAT:
                continue
            mask = _precision.is_mask(value)
            if not self.narrow and not mask:
                continue
            beyond, negative = _precision.out_of_range(value.const_value, self.half)
            if beyond and negative and mask:
                saturated.add(value)
                ctx.count("mask made finite")
            elif beyond and self.narrow:
                for user in [user for user in value.consumers() if user not in stays]:
                    reason = f"{value.name} holds values beyond 65504: kept in fp32"
                    ctx.skip(reason, user, "node")
                    stays.add(user)
        return frozenset(saturated)

    def _retype_inputs(self, model: ir.Model, stays: set[ir.Node]) -> None:
        """Inputs become half.

        Not one that only float32 nodes read (the timestep), nor one with a default value.
        """
        for value in model.graph.inputs:
            readers = list(value.consumers())
            if value.is_initializer():
                continue  # its default value would have to change with it
            if _precision.is_float(value) and not all(r in stays for r in readers):
                value.dtype = self.half

    def _settle_outputs(
        self, model: ir.Model, caster: _precision.Caster, floats: set[ir.Value]
    ) -> None:
        """Give each output that was float32 its declared type under its own name."""
        wanted = self.half if self.changes_interface() else ir.DataType.FLOAT
        for index, value in enumerate(model.graph.outputs):
            if value.is_initializer():
                continue  # a weight that is an output as well
            if value in floats and value.dtype != wanted:
                graph.append_output_cast(model.graph, index, wanted, caster.unique)


def _computes(node: ir.Node) -> bool:
    """Whether floats go in or come out."""
    return any(map(_precision.is_float, [*node.inputs, *node.outputs]))
