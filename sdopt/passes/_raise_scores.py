"""From the product of q and k to the Softmax, and on to the product with v."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from sdopt import graph
from sdopt.passes._raise_dims import ONE, Dims
from sdopt.passes._raise_products import Product, is_product, product
from sdopt.passes._raise_scale import Factor, NotRaisedError, scaled
from sdopt.passes._raise_shapes import Shapes

_STEPS = 16
"""Operators that may lie between the two products on one side of the Softmax."""

_SAME = frozenset({"Cast", "CastLike", "Identity", "Dropout"})
_VIEWS = frozenset({"Reshape", "Unsqueeze", "Squeeze", "Flatten"})
_BETWEEN = frozenset({"Abs", "Clip", "Div", "Max", "Min", "Mul", "Neg", "Pow", "Relu", "Sub"})
_BETWEEN |= {"Tanh", "Sigmoid", "Softplus", "Where", "Add", "Exp", "Mod", "Sum"}
"""What else is written between the products of attentions that Attention cannot say."""


@dataclass
class Mask:
    """What is added to the scores, or the condition of a Where that fills some of them.

    ``axes`` are the letters of the scores there; ``fill`` goes where the condition is ``filled``;
    ``factors`` scale the mask together with the scores.
    """

    value: ir.Value
    axes: str
    scores: Dims | None
    factors: list[Factor] = field(default_factory=list)
    fill: float | None = None
    filled: bool = False


@dataclass
class Scores:
    """``scale * (q @ k) + masks``, behind a Softmax whose result is multiplied with v.

    Letters: B and H are batch and heads, N is both in one; i and j are queries and keys, d and e
    the head sizes of q and k, and of v.
    """

    first: Product
    second: Product
    q: ir.Value
    k: ir.Value
    v: ir.Value
    axes: dict[str, str]
    """Of ``q``, ``k``, ``v``, and of the result as ``out``."""
    factors: list[Factor]
    masks: list[Mask]
    heads: int | None
    """The number of heads that N was split into, or joined from, on the way."""


def match(softmax: ir.Node, shapes: Shapes) -> Scores | None:
    """The attention around a Softmax, or None where there is none.

    Raises:
        NotRaisedError: it is one, written in a way that Attention has no place for.
    """
    reader, ahead = _reader(softmax)
    if reader is None or softmax.inputs[0] is None:
        return None
    steps: list[tuple[ir.Node, ir.Value]] = []
    value = softmax.inputs[0]
    while not is_product(value.producer()):
        node = value.producer()
        carrier = _carrier(node, shapes) if len(steps) < _STEPS else None
        if node is None or carrier is None:
            if node is not None and _reaches(value):
                raise NotRaisedError(
                    f"a {node.op_type} lies between its products that Attention has no place for"
                )
            return None
        steps.append((node, carrier))
        value = carrier
    node = value.producer()
    assert node is not None
    first = product(node, shapes)
    if len(first.batch) > 2:
        raise NotRaisedError(f"its operands are {len(first.axes[2])}-D, and Attention's are 4-D")
    return _Walk(first, shapes).to(softmax, steps[::-1], ahead, product(reader, shapes))


def _reader(softmax: ir.Node) -> tuple[ir.Node | None, list[ir.Node]]:
    """The product that reads the probabilities, and the nodes before it."""
    value = softmax.outputs[0]
    ahead: list[ir.Node] = []
    for _ in range(_STEPS):
        users = list(dict.fromkeys(value.consumers()))
        guards = [user for user in users if _is_guard(user, value)]
        if guards and len(users) == 2:
            users = guards
        if len(users) != 1 or value.is_graph_output():
            multiplied = [user for user in users if is_product(user)]
            if multiplied and _reaches(softmax.inputs[0]):
                raise NotRaisedError("its probabilities are read by something else as well")
            return None, []
        node = users[0]
        if is_product(node):
            return node, ahead
        if node.op_type not in _SAME | _VIEWS | {"Transpose"} and not guards:
            return None, []
        ahead.append(node)
        value = node.outputs[0]
    return None, []


def _is_guard(node: ir.Node, value: ir.Value) -> bool:
    """``Where(IsNaN(p), 0, p)``, torch's zeros for a query without keys: Attention has them."""
    if node.op_type != "Where" or node.inputs[2] is not value:
        return False
    asked = graph.producer(node.inputs[0], "IsNaN")
    return asked is not None and asked.inputs[0] is value and graph.scalar(node.inputs[1]) == 0


def _carrier(node: ir.Node | None, shapes: Shapes) -> ir.Value | None:
    """The input of ``node`` that the scores come from, if Attention can say what it does."""
    if node is None or node.domain not in ("", "ai.onnx") or not node.inputs:
        return None
    if node.op_type in _SAME | _VIEWS | {"Transpose"}:
        return node.inputs[0]
    if node.op_type in ("Mul", "Div"):
        found = scaled(node, shapes)
        return None if found is None else found[0]
    if node.op_type == "Add":
        return next((side for side in node.inputs if _leads(side, shapes)), None)
    if node.op_type == "Where":
        sides = [(node.inputs[1], node.inputs[2]), (node.inputs[2], node.inputs[1])]
        found_sides = [s for s, fill in sides if graph.scalar(fill) is not None]
        return next((side for side in found_sides if _leads(side, shapes)), None)
    return None


def _leads(value: ir.Value | None, shapes: Shapes, depth: int = 0) -> bool:
    node = value.producer() if value is not None else None
    if node is None or depth > _STEPS:
        return False
    if is_product(node):
        return True
    if node.op_type in ("Add", "Where"):
        return any(_leads(side, shapes, depth + 4) for side in node.inputs)
    carrier = _carrier(node, shapes)
    return carrier is not None and _leads(carrier, shapes, depth + 1)


def _reaches(value: ir.Value | None) -> bool:
    """Whether a product lies behind a few elementwise operators, whatever they are."""
    stack, seen = [value], 0
    while stack and seen < 2 * _STEPS:
        one, seen = stack.pop(), seen + 1
        node = one.producer() if one is not None else None
        if node is None:
            continue
        if is_product(node):
            return True
        if node.op_type in _SAME | _VIEWS | _BETWEEN | {"Transpose"}:
            stack.extend(node.inputs)
    return False


class _Walk:
    """Follows the letters of the scores from the first product to the second."""

    def __init__(self, first: Product, shapes: Shapes) -> None:
        self.first, self.shapes = first, shapes
        left, right, out = first.axes
        own = [next(c for c in a if c not in b) for a, b in ((left, right), (right, left))]
        names = {first.summed: "d", own[0]: "i", own[1]: "j"}
        names |= dict(zip(first.batch, ["", "N", "BH"][len(first.batch)], strict=True))
        self.sides = [_renamed(side, names) for side in (left, right)]
        self.axes = _renamed(out, names)
        self.factors: list[Factor] = []
        self.masks: list[Mask] = []
        self.heads: int | None = None

    def to(
        self,
        softmax: ir.Node,
        steps: list[tuple[ir.Node, ir.Value]],
        ahead: list[ir.Node],
        second: Product,
    ) -> Scores:
        for node, carrier in steps:
            self._step(node, carrier)
        axis = int(graph.attribute(softmax, "axis", -1))
        keys = self.axes[axis] if -len(self.axes) <= axis < len(self.axes) else ""
        for node in ahead:
            if node.op_type not in _SAME | {"Where"}:
                self._step(node, node.inputs[0])
        at = 0 if second.left is (ahead[-1] if ahead else softmax).outputs[0] else 1
        if len(second.axes[at]) != len(self.axes):
            raise NotRaisedError("its products have other ranks than its scores")
        names = dict(zip(second.axes[at], self.axes, strict=True))
        if keys not in ("i", "j") or names.get(second.summed) != keys:
            raise NotRaisedError(f"its Softmax runs over axis {axis}, not over the keys")
        names[next(c for c in second.axes[1 - at] if c not in second.axes[at])] = "e"
        v_axes, out = (_renamed(second.axes[n], names) for n in (1 - at, 2))
        q_at = 0 if keys == "j" else 1
        values = (self.first.left, self.first.right)
        axes = {"q": self.sides[q_at], "k": self.sides[1 - q_at], "v": v_axes, "out": out}
        if keys == "i":
            swapped = {"i": "j", "j": "i"}
            axes = {name: _renamed(text, swapped) for name, text in axes.items()}
            for mask in self.masks:
                mask.axes = _renamed(mask.axes, swapped)
        v = (second.left, second.right)[1 - at]
        return Scores(
            self.first, second, values[q_at], values[1 - q_at], v, axes,
            self.factors, self.masks, self.heads,
        )  # fmt: skip

    def _step(self, node: ir.Node, carrier: ir.Value | None) -> None:
        if node.op_type in _SAME:
            return
        if node.op_type == "Transpose":
            order = graph.attribute(node, "perm", range(len(self.axes))[::-1])
            self.axes = "".join(self.axes[axis] for axis in order)
        elif node.op_type in _VIEWS:
            self._view(node)
        elif node.op_type in ("Mul", "Div"):
            found = scaled(node, self.shapes)
            assert found is not None
            for one in (self.factors, *(mask.factors for mask in self.masks)):
                one.append(found[1:])
        else:
            self._mask(node, carrier)

    def _mask(self, node: ir.Node, carrier: ir.Value | None) -> None:
        dims = self.shapes.dims(carrier)
        at = next(i for i, side in enumerate(node.inputs) if side is carrier)
        if node.op_type == "Add":
            other = node.inputs[1 - at]
            assert other is not None
            self.masks.append(Mask(other, self.axes, dims))
            return
        condition, fill = node.inputs[0], graph.scalar(node.inputs[3 - at])
        assert condition is not None
        self.masks.append(Mask(condition, self.axes, dims, fill=fill, filled=at == 2))

    def _view(self, node: ir.Node) -> None:
        """Heads and batch joined or split; the letters of queries and keys stay."""
        before, after = self.shapes.dims(node.inputs[0]), self.shapes.dims(node.outputs[0])
        if before is not None and after is not None and list(before[-2:]) == list(after[-2:]):
            lead = self.axes[:-2]
            if list(before) == list(after):
                return
            if (lead, len(after)) == ("N", 4) and after[1].known is not None:
                return self._joined(after[1].known, "BH")
            if (lead, len(after)) == ("BH", 3) and before[1].known is not None:
                return self._joined(before[1].known, "N")
            if (lead, len(after), after[0]) == ("", 3, ONE):
                self.axes = f"N{self.axes}"
                return None
        raise NotRaisedError("its scores are reshaped, and not to join or split the heads")

    def _joined(self, heads: int, lead: str) -> None:
        if self.heads not in (None, heads):
            raise NotRaisedError("its scores are split into heads in two ways")
        self.heads, self.axes = heads, lead + self.axes[-2:]


def _renamed(axes: str, names: dict[str, str]) -> str:
    return "".join(names.get(letter, letter) for letter in axes)
