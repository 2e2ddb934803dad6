"""Late operators that no rule is written for, as the function bodies in ONNX's own definitions."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from sdopt import graph
from sdopt.passes._lower_rules import Rules, refused
from sdopt.passes._raise_shapes import Shapes

_DOMAIN = "sdopt.bodies"

_WITH_BODIES = frozenset({"Attention", "SequenceMap", "SoftmaxCrossEntropyLoss"})
"""ONNX writes their bodies with names that repeat, which onnx-ir 1.1 does not read."""


def inline(rules: Rules, names: Collection[str]) -> None:
    """Replace nodes of these operators by the bodies that ONNX gives them, if it gives one.

    What has none is left for the check that refuses it.
    """
    added = 0
    names = set(names) - _WITH_BODIES
    for node in [n for n in graph.nodes(rules.model) if n.op_type in names and not n.domain]:
        body = _body(rules, node)
        if body is None:
            continue
        rules.mark(node)
        _spell_defaults(rules, node)
        body.domain, body.name = _DOMAIN, f"{node.op_type}_{added}"
        function = ir.from_proto(body)
        for inner in function:
            inner.metadata_props.setdefault(graph.MODULE_KEY, graph.module_path(node))
            inner.name = rules.ctx.unique(f"{graph.module_path(node)}/lower_opset/{inner.op_type}")
        rules.model.functions[function.identifier()] = function
        node.domain, node.op_type = _DOMAIN, body.name
        added += 1
    if added:
        rules.model.opset_imports[_DOMAIN] = 1
        InlinePass()(rules.model)
        rules.model.opset_imports.pop(_DOMAIN, None)
        rules.shapes = Shapes(rules.model.graph)


def _spell_defaults(rules: Rules, node: ir.Node) -> None:
    """Bodies refer to the node's attributes, also to those that it leaves at their defaults."""
    for name, attribute in onnx.defs.get_schema(node.op_type, rules.given).attributes.items():
        if name not in node.attributes and attribute.default_value.name:
            node.attributes[name] = ir.from_proto(attribute.default_value)


def _body(rules: Rules, node: ir.Node) -> onnx.FunctionProto | None:
    """The newest body that the graph's own opset can hold."""
    schema: Any = onnx.defs.get_schema(node.op_type, rules.given)  # stubs lack the bodies
    if schema.has_function:
        usable = [v for v in schema.function_opset_versions if v <= rules.given]
        text = schema.get_function_with_opset_version(max(usable)) if usable else None
        return onnx.FunctionProto.FromString(text) if text else None
    if not schema.has_context_dependent_function:
        return None
    usable = [v for v in schema.context_dependent_function_opset_versions if v <= rules.given]
    types = []
    for value in node.inputs:
        dtype = rules.shapes.dtype(value)
        if value is not None and dtype is None:
            raise refused(rules, node, "the element types of its inputs are not known")
        shape = (
            [dim.known for dim in rules.shapes.dims(value) or ()] if value is not None else None
        )
        kind = int(dtype or ir.DataType.FLOAT)
        types.append(onnx.helper.make_tensor_type_proto(kind, shape).SerializeToString())
    proto = ir.to_proto(node).SerializeToString()
    text = schema.get_context_dependent_function_with_opset_version(max(usable), proto, types)
    return onnx.FunctionProto.FromString(text) if text else None
