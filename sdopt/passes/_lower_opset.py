"""Writing a graph in another opset: compose what it lacks, respell what it spells differently."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from sdopt import graph
from sdopt.errors import BuildError
from sdopt.passes import _lower_composites, _lower_signatures
from sdopt.passes._lower_rules import Rules, bad_type, has_opset, introduced, refused
from sdopt.passes._raise_opset import OPSET, SAME_MEANING
from sdopt.passes.base import PassContext

OLDEST, NEWEST = 11, 25

_SAME = SAME_MEANING | {
    *("Attention", "AveragePool", "BatchNormalization", "SplitToSequence", "TopK"),
    *("DequantizeLinear", "QuantizeLinear", "Squeeze", "Unsqueeze", "Dropout", "Split"),
}
"""What an operator of these means did not change, or is looked at by a rule."""

_NEUTRAL = {"dilations": 1, "kernel_shape": None}
"""Attributes without a default that older versions had not, and what says nothing in each."""


def write_in(model: ir.Model, opset: int, ctx: PassContext) -> None:
    """Bring ``model`` to ``opset``.

    Raises:
        BuildError: an operator that cannot be said in it; names node, module path and reason.
    """
    given = graph.opset(model)
    known = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    if given == opset:
        if model.ir_version and model.ir_version > known:
            ctx.count(f"IR version {model.ir_version} to {known}")
            model.ir_version = known
        return
    if given < opset and given < OPSET:
        ctx.skip(
            f"it is of opset {given}, which is older: raise_ops brings it to {OPSET}", "model"
        )
        return
    if model.functions:
        name = next(iter(model.functions.values())).name
        raise BuildError(
            f"the local function {name} cannot be written in opset {opset}",
            why="functions carry an opset of their own",
            hint="raise_ops inlines them: sdopt optimize --passes raise_ops,lower_opset=...",
        )
    rules = Rules(model, given, opset, ctx)
    _lower_composites.compose(rules)
    for node in _standard(model):
        if (rule := _lower_signatures.RULES.get(node.op_type)) is not None:
            rule(rules, node)
    for node in _standard(model):
        _settle(rules, node)
    graph.drop_unused_initializers(model)
    model.opset_imports[""] = opset
    model.opset_imports.pop("ai.onnx", None)
    model.ir_version = min(model.ir_version or known, known)
    if rules.written:
        ctx.count("operator", len(rules.written))
    ctx.count(f"opset {given} to {opset}")


def _standard(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes of the standard domain that ONNX knows; a vendor's own are not judged here."""
    for node in list(graph.nodes(model)):
        if (
            node.domain in ("", "ai.onnx")
            and node.graph is not None
            and onnx.defs.has(node.op_type)
        ):
            yield node


def _settle(rules: Rules, node: ir.Node) -> None:
    """Drop what says nothing, and refuse what the opset's version of the operator cannot say."""
    name = node.op_type
    if not has_opset(name, rules.opset):
        raise refused(rules, node, "the opset has no such operator", least=introduced(name))
    old, new = (onnx.defs.get_schema(name, opset) for opset in (rules.given, rules.opset))
    if old.since_version == new.since_version:
        return
    if name not in _SAME and name not in _lower_signatures.RULES:
        raise refused(rules, node, "it is not known to mean the same", least=old.since_version)
    for key in [key for key in node.attributes if key not in new.attributes]:
        value = graph.attribute(node, key)
        known = old.attributes.get(key)
        default = _default(known) if known is not None else None
        neutral = key in _NEUTRAL and set(value or ()) <= {_NEUTRAL[key]}
        if not neutral and value != default:
            raise refused(rules, node, f"{key} came later", least=_least_with(name, key, rules))
        del node.attributes[key]
        rules.mark(node)
    while len(node.inputs) and node.inputs[-1] is None:
        node.resize_inputs(len(node.inputs) - 1)
    if len(node.inputs) > new.max_input:
        raise refused(rules, node, f"it took {new.max_input} inputs", least=old.since_version)
    if bad := bad_type(rules, node):
        type_name, least = bad
        raise refused(rules, node, f"it had no {type_name}", least=least)


def _default(attribute: onnx.defs.OpSchema.Attribute) -> object:
    if not attribute.default_value.name:
        return None
    value = onnx.helper.get_attribute_value(attribute.default_value)
    return value.decode() if isinstance(value, bytes) else value


def _least_with(name: str, key: str, rules: Rules) -> int:
    """The first opset whose operator has the attribute."""
    return next(
        one
        for one in range(rules.opset, rules.given + 1)
        if has_opset(name, one) and key in onnx.defs.get_schema(name, one).attributes
    )
