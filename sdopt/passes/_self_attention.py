"""Finding self-attentions over the tokens of an image, by structure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from sdopt import graph
from sdopt.errors import SdoptError
from sdopt.passes import _linear

_SAME = frozenset({"Identity", "Cast"})
_SCALED = frozenset({"Mul", "Div"})
_STRIDED = frozenset({"Conv", "AveragePool", "MaxPool"})


KIND = "self_attention"
"""What a site counts as in a report."""


class NotASiteError(SdoptError):
    """An attention that is no self-attention over an image's tokens; ``message`` says why.

    ``kind`` is KIND where it might be one but for that, empty where it is something else.
    """

    def __init__(self, message: str, kind: str = KIND) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Site:
    """A pre-norm self-attention with its residual: ``Add(to_out(attend(norm(x))), x)``.

    Attributes:
        attention: the Attention node.
        projections: the MatMuls of q, k and v (one if they are fused), all reading ``tokens``.
        tokens: what the projections read, the normed hidden states ``[B, H * W, C]``.
        hidden: the input of the norm.
        image: the feature map that the token sequence was made from ``[B, C', H, W]``.
        residual, branch: the Add, and which of its inputs comes from the attention.
        reshapes: the Reshape nodes between projections and residual.
        inner: the values between them, whose second-axis or head-wise length is that of tokens.
        level: how often the latent was halved before this place.
    """

    attention: ir.Node
    projections: tuple[ir.Node, ...]
    tokens: ir.Value
    hidden: ir.Value
    image: ir.Value
    residual: ir.Node
    branch: int
    reshapes: tuple[ir.Node, ...]
    inner: tuple[ir.Value, ...]
    level: int


def find(model: ir.Model) -> tuple[list[Site], list[tuple[str, ir.Node, str]]]:
    """Self-attention sites in graph order, and the other attentions: why they are none, and KIND.

    A cross-attention is of no kind: it is none of those that could be merged.
    """
    levels = levels_of(model.graph)
    sites: list[Site] = []
    refused: list[tuple[str, ir.Node, str]] = []
    for node in model.graph:
        if node.op_type == "Attention" and node.domain in ("", "ai.onnx"):
            try:
                sites.append(_site(node, levels))
            except NotASiteError as error:
                refused.append((error.message, node, error.kind))
    return sites, refused


def _site(node: ir.Node, levels: dict[ir.Value, int]) -> Site:
    if any(value is not None for value in node.inputs[3:]) or graph.attribute(node, "is_causal"):
        raise NotASiteError("it has a mask or a cache, which depends on token positions")
    inner: list[ir.Value] = []
    reshapes: list[ir.Node] = []
    linears = [_projection(value, inner, reshapes) for value in node.inputs[:3]]
    q, k, v = (linear.x for linear in linears)
    if k is not v or q is not k:
        raise NotASiteError("its keys or values come from another input than its queries", "")
    norm = graph.producer(_origin(q), "LayerNormalization")
    if norm is None or norm.inputs[0] is None:
        raise NotASiteError("no LayerNormalization precedes its projections")
    hidden = norm.inputs[0]
    residual, branch = _residual(node, _origin(hidden), inner, reshapes)
    for reshape in reshapes:
        token_free_shape(reshape)
    image = _image(hidden)
    if image is None or image not in levels:
        raise NotASiteError("its tokens do not come from a [batch, channels, height, width] map")
    unique = tuple(dict.fromkeys(linear.matmul for linear in linears))
    return Site(
        node, unique, q, hidden, image, residual, branch, tuple(reshapes), tuple(inner),
        levels[image],
    )  # fmt: skip


def _projection(
    value: ir.Value | None, inner: list[ir.Value], reshapes: list[ir.Node]
) -> _linear.Linear:
    """The Linear behind one input of an attention, past its head layout and a fused Split."""
    relaid = False
    while value is not None:
        inner.append(value)
        if (linear := _linear.match(value)) is not None:
            inner.append(linear.matmul.outputs[0])
            return linear
        node = value.producer()
        if node is None:
            break
        if node.op_type == "Reshape" and not relaid:
            reshapes.append(node)
            relaid = True
        elif node.op_type == "Split":
            rank = len(value.shape) if value.shape is not None else 3
            if graph.attribute(node, "axis", 0) not in (-1, rank - 1):
                break
        elif not (
            (node.op_type == "Transpose" and not relaid) or _is_scaling(node) or _is_same(node)
        ):
            break
        value = node.inputs[0]
    raise NotASiteError("its q, k and v are no linear projections of one input")


def _residual(
    node: ir.Node, hidden: ir.Value, inner: list[ir.Value], reshapes: list[ir.Node]
) -> tuple[ir.Node, int]:
    """The Add of ``hidden`` that ends the attention's branch, and which input the branch is."""
    value, projected = node.outputs[0], False
    while (user := graph.single_consumer(value)) is not None:
        index = next(i for i, read in enumerate(user.inputs) if read is value)
        if user.op_type == "Add" and projected:
            other = user.inputs[1 - index]
            if other is not None and _origin(other) is hidden:
                return user, index
            if _linear.match(user.outputs[0]) is None:
                break
        elif user.op_type == "MatMul" and not projected:
            projected = _linear.match(user.outputs[0]) is not None and index == 0
            if not projected:
                break
        elif user.op_type == "Reshape" and not projected and index == 0:
            reshapes.append(user)
        elif not (
            (user.op_type == "Transpose" and not projected) or _is_scaling(user) or _is_same(user)
        ):
            break
        inner.append(value)
        value = user.outputs[0]
    raise NotASiteError("no residual Add of the norm's input follows its output projection")


def token_free_shape(reshape: ir.Node) -> list[int] | None:
    """A target shape without the token count, ``[0, -1, ...]``, or None if it has -1 there.

    Raises:
        NotASiteError: a later axis is not known.
    """
    shape = reshape.inputs[1]
    dims: list[int | None]
    if (whole := graph.constant(shape)) is not None:
        dims = [int(dim) for dim in whole]
    elif (concat := graph.producer(shape, "Concat")) is not None:
        # Each part of the Concats that exporters write is one number.
        numbers = [graph.scalar(part) for part in concat.inputs]
        dims = [None if number is None else int(number) for number in numbers]
    else:
        out = reshape.outputs[0].shape
        dims = [dim if isinstance(dim, int) else None for dim in out] if out is not None else []
    if len(dims) > 1 and dims[1] == -1:
        return None
    rest = [dim for dim in dims[2:] if dim is not None and dim > 0]
    if not 3 <= len(dims) <= 4 or len(rest) != len(dims) - 2:
        raise NotASiteError("a Reshape inside it bakes the number of tokens into unknown sizes")
    return [0, -1, *rest]


def _image(hidden: ir.Value) -> ir.Value | None:
    """The map whose flattening ``hidden`` continues: nearest first, along the residual stream."""
    queue, seen = deque([hidden]), {hidden}
    while queue:
        value = queue.popleft()
        if (image := _flattened(value)) is not None:
            return image
        for before in _stream(value):
            if before not in seen:
                seen.add(before)
                queue.append(before)
    return None


def _stream(value: ir.Value) -> Iterator[ir.Value]:
    node = value.producer()
    if node is None:
        return
    if (linear := _linear.match(value)) is not None:
        yield linear.x
    elif node.op_type == "Add":
        yield from (side for side in node.inputs if side is not None)
    elif (_is_scaling(node) or _is_same(node)) and node.inputs[0] is not None:
        yield node.inputs[0]


def _flattened(value: ir.Value) -> ir.Value | None:
    """The map behind Reshape(Transpose(0, 2, 3, 1)) or Transpose(0, 2, 1)(Reshape), else None."""
    if (reshape := graph.producer(value, "Reshape")) is not None and reshape.inputs[0] is not None:
        transpose = graph.producer(_origin(reshape.inputs[0]), "Transpose")
        if transpose is not None and list(graph.attribute(transpose, "perm", [])) == [0, 2, 3, 1]:
            return transpose.inputs[0]
    transpose = graph.producer(value, "Transpose")
    if transpose is not None and list(graph.attribute(transpose, "perm", [])) == [0, 2, 1]:
        reshape = graph.producer(transpose.inputs[0], "Reshape")
        source = reshape.inputs[0] if reshape is not None else None
        if source is not None and source.shape is not None and len(source.shape) == 4:
            return source
    return None


def levels_of(main: ir.Graph) -> dict[ir.Value, int]:
    """How often each map was halved on its shortest way from the latent.

    Skip connections make the shortest way the one that shows a map's size: upsampling undoes what
    the way around did. The latent is the image-shaped input that a Conv reads; others, such as a
    ControlNet's residuals, are added to maps later.
    """
    images = [v for v in main.inputs if v.shape is not None and len(v.shape) == 4]
    levels = dict.fromkeys([v for v in images if _feeds_conv(v)] or images, 0)
    for node in main:
        known = [levels[v] for v in node.inputs if v is not None and v in levels]
        if not known or node.op_type in ("Shape", "Size"):
            continue
        level = min(known)
        if node.op_type in _STRIDED:
            level += int(math.log2(max(graph.attribute(node, "strides", None) or [1])))
        levels.update(dict.fromkeys(node.outputs, level))
    return levels


def _feeds_conv(value: ir.Value) -> bool:
    return any(
        user.op_type == "Conv"
        or ((_is_same(user) or _is_scaling(user)) and _feeds_conv(user.outputs[0]))
        for user in value.consumers()
    )


def _origin(value: ir.Value) -> ir.Value:
    """What ``value`` is a copy or a cast of."""
    node = value.producer()
    while node is not None and _is_same(node) and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _is_same(node: ir.Node) -> bool:
    return node.op_type in _SAME


def _is_scaling(node: ir.Node) -> bool:
    return node.op_type in _SCALED and graph.scalar(node.inputs[1]) is not None
