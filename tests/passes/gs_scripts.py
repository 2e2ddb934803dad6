"""Scripts that tests hand to `graphsurgeon=tests.passes.gs_scripts.NAME`."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

not_a_function = 3


def nothing(graph: gs.Graph) -> None:
    """Leaves everything as it is."""


def tidy(graph: gs.Graph) -> gs.Graph:
    """What scripts end with."""
    return graph.cleanup().toposort()


def relu_to_gelu(graph: gs.Graph) -> None:
    """Replaces an operator in place, as TensorRT users do by name."""
    for one in (graph, *graph.subgraphs(recursive=True)):
        for node in one.nodes:
            if node.op == "Relu":
                node.op = "Gelu"
    print("replaced")  # noqa: T201 - as users' scripts do


def halve_v(graph: gs.Graph) -> gs.Graph:
    """Changes one weight with an assignment."""
    weight = graph.tensors()["v"]
    weight.values = weight.values / np.float32(2)
    return graph


def zero_v_in_place(graph: gs.Graph) -> None:
    """Changes one weight through the array."""
    graph.tensors()["v"].values[...] = 0


def read_everything(graph: gs.Graph) -> None:
    """Looks at each weight and changes none."""
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            assert np.isfinite(tensor.values.astype(np.float32)).all()


def rename_and_copy(graph: gs.Graph) -> gs.Graph:
    """One weight gets another name; the graph that comes back is a copy."""
    graph.tensors()["v"].name = "renamed"
    return graph.copy()


def add_bias(graph: gs.Graph) -> gs.Graph:
    """A new weight and a new node in front of the output."""
    (out,) = graph.outputs
    before = gs.Variable("before_bias", dtype=out.dtype, shape=out.shape)
    out.inputs[0].outputs = [before]
    bias = gs.Constant("new_bias", np.arange(512, dtype=np.float32))
    graph.nodes.append(gs.Node("Add", "bias_add", inputs=[before, bias], outputs=[out]))
    return graph.cleanup().toposort()


def second_output(graph: gs.Graph) -> None:
    """Changes the interface."""
    hidden = graph.nodes[0].outputs[0]
    hidden.dtype, hidden.shape = np.float32, (2, 512)
    graph.outputs.append(hidden)


def raises(graph: gs.Graph) -> None:
    """A script with a bug."""
    raise KeyError("no such layer")


def garbage(graph: gs.Graph) -> object:
    """Forgets what to return."""
    return [graph]


def unsorted(graph: gs.Graph) -> None:
    """Forgets toposort."""
    graph.nodes.reverse()


def untyped_output(graph: gs.Graph) -> None:
    """An output without a dtype, which graphsurgeon does not export."""
    graph.outputs.append(gs.Variable("nothing_makes_me"))
