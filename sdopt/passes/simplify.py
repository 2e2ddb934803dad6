"""``simplify``: runs onnx-simplifier on the graph, with the weights left outside."""

from __future__ import annotations

import contextlib
import importlib
import io
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx
import onnx_ir as ir

from sdopt import graph
from sdopt.errors import MissingDependencyError, SdoptError
from sdopt.passes import _external
from sdopt.passes.base import Numerics, Pass, PassContext

LARGEST_FOLD = "1MB"  # nothing larger is computed in advance; the package's own limit is 1.5 GB


@dataclass(frozen=True)
class Simplify(Pass):
    """Run onnx-simplifier (onnxsim) on the graph, with the weights left outside.

    Before / After:
        whatever onnxsim folds, fuses and removes   ->   its result, with the same weights

    Applies when: always. Weights above 1 kB are declared as inputs while onnxsim works, so it
    neither loads nor copies them, and what would compute with their values (a BatchNormalization
    into its Conv, a Transpose of a weight) stays as it is. So do inputs with default values.
    Nodes that keep their name, or whose output does, keep their module path.

    Numerics: reassociated (it fuses and reorders; it computes constants with another runtime).

    Options: none.

    Example:
        sdopt optimize model.onnx -o simple.onnx --passes simplify
    """

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED

    def reads(self) -> tuple[str, ...]:
        """The package's version."""
        _package()
        return _external.decided_by("onnxsim")

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Hand over, simplify, take back.

        Raises:
            MissingDependencyError: onnxsim is not installed.
            SdoptError: onnxsim refused the graph or made an invalid one.
        """
        onnxsim = _package()
        outside = _external.Outside(model, keeps=_external.is_small)
        proto = onnx.ModelProto()
        proto.CopyFrom(outside.proto)
        lifted = _declare_as_inputs(proto.graph)
        if lifted is None:
            ctx.skip("two weights inside bodies of If, Loop or Scan share a name", "the graph")
            return
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                made, _ = onnxsim.simplify(proto, tensor_size_threshold=LARGEST_FOLD)
        except Exception as error:
            raise _error("onnxsim failed on this graph", str(error)) from error
        for line in dict.fromkeys(said.getvalue().splitlines()):
            ctx.note(line)
        _declare_as_weights(made.graph, lifted, outside.proto.graph)
        if _nodes(made) == _nodes(outside.proto):
            return  # onnxsim 0.8 reorders Constant nodes at every call
        nodes = graph.op_counts(model)
        try:
            changed = outside.adopt(made)
        except onnx.checker.ValidationError as error:
            raise _error("onnxsim made a graph that is not valid", str(error)) from error
        if changed:
            gone = sum(nodes.values()) - sum(graph.op_counts(model).values())
            ctx.count("nodes removed" if gone > 0 else "graph rewritten", max(gone, 1))


def _error(what: str, why: str) -> SdoptError:
    return SdoptError(what, where="simplify", why=why, hint="leave simplify out: clean folds too")


def _package() -> Any:
    try:
        return importlib.import_module("onnxsim")
    except ImportError as error:
        raise MissingDependencyError(
            "the pass simplify needs onnxsim", why=str(error), hint='pip install "sdopt[simplify]"'
        ) from error


def _declare_as_inputs(main: onnx.GraphProto) -> dict[str, onnx.TensorProto] | None:
    """Turn stand-ins, and defaults of inputs, into inputs; None where names are not unique."""
    declared = {one.name for one in main.input}
    lifted: dict[str, onnx.TensorProto] = {}
    stack = [main]
    while stack:
        one = stack.pop()
        stack.extend(_external.bodies(one))
        for tensor in list(one.initializer):
            is_default = one is main and tensor.name in declared
            if not (is_default or tensor.data_location == onnx.TensorProto.EXTERNAL):
                continue
            if tensor.name in lifted:
                return None
            lifted[tensor.name] = onnx.TensorProto.FromString(tensor.SerializeToString())
            one.initializer.remove(tensor)
            if not is_default:
                main.input.append(
                    onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                )
    return lifted


def _declare_as_weights(
    made: onnx.GraphProto, lifted: dict[str, onnx.TensorProto], before: onnx.GraphProto
) -> None:
    """Undo that in the result, whose inputs and outputs become what they were."""
    used = _names_read(made)
    wanted = {one.name for one in before.input}
    made.initializer.extend(t for name, t in lifted.items() if name in used | wanted)
    for field in ("input", "output"):
        now, then = getattr(made, field), getattr(before, field)
        del now[:]
        now.extend(then)


def _nodes(model: onnx.ModelProto) -> list[tuple[object, ...]]:
    """What is computed, in no order; a weight counts by what reads it."""
    return sorted(
        (
            *(node.domain, node.op_type, *node.input, "->", *node.output),
            *sorted(str(attr) for attr in node.attribute),
        )
        for node in model.graph.node
    )


def _names_read(one: onnx.GraphProto) -> set[str]:
    names = {name for node in one.node for name in node.input}
    names.update(output.name for output in one.output)
    for body in _external.bodies(one):
        names |= _names_read(body)
    return names
