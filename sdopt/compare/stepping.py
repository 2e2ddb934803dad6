"""A graph run a piece at a time, so that every value can be looked at and few are held.

onnxruntime keeps all weights of a session, and all outputs that were asked for, in memory. Here
the nodes are cut into pieces in their order; a piece is a session of its own, opened on its own
weights only, run, and closed. What later pieces read is carried, everything else is gone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from sdopt.errors import UsageError
from sdopt.targets.ort import Ort, Piece

Values = Mapping[str, np.ndarray]
"""Arrays by the name that the graph has for them."""

PIECE_NODES = 48
"""Nodes in a piece where values are looked at; their outputs are in memory at once."""
PIECE_BYTES = 256 * 2**20
"""Bytes of weights in a piece, if more than one node reads them."""

_COMPOUND = frozenset(
    {"SplitToSequence", "SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase",
     "SequenceMap", "Optional"}
)  # fmt: skip
"""Operators that give no plain tensor; a piece does not end before their last reader."""


@dataclass
class _Piece:
    """Nodes that one session runs: what they read of earlier ones, and what later ones read."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    reads: set[str] = field(default_factory=set)
    weights: set[str] = field(default_factory=set)
    makes: set[str] = field(default_factory=set)
    gives: list[str] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    """What nothing reads behind this piece."""


class Stepper:
    """A graph that hands out values in the order in which it computes them.

    Args:
        proto: the graph, its nodes in order, its weights inside or beside it.
        folder: what the locations of its weights are relative to.
        taps: names of values to hand out, beside the outputs.
        nodes: at most so many in a piece; none for as many as the weights allow.
        threads: that onnxruntime uses, 0 for one per core.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        folder: Path,
        taps: Collection[str] = (),
        *,
        nodes: int | None = PIECE_NODES,
        threads: int = 0,
    ) -> None:
        self._proto, self._folder, self._ort = proto, folder, Ort(threads=threads)
        self._weights = {one.name: one for one in proto.graph.initializer}
        self._types = {one.name: one for one in proto.graph.input}
        self.inputs = tuple(n for n in self._types if n not in self._weights)
        self.outputs = tuple(value.name for value in proto.graph.output)
        self._wanted = {*self.outputs, *taps}
        self._pieces = self._cut(nodes or len(proto.graph.node) + 1)

    def run(self, feeds: Sequence[Values]) -> Iterator[tuple[int, str, np.ndarray]]:
        """Compute for each of ``feeds``; yields number of the feed, name of the value, its array.

        A piece is computed for all of them before the next, so each weight is read once. Floats
        are cast to what the graph's inputs are declared as.

        Raises:
            UsageError: an input that nothing feeds.
            BuildError: onnxruntime refuses or fails in a piece.
        """
        held = [self._fed(one) for one in feeds]
        for number, values in enumerate(held):
            for name in self.outputs:
                if name in values:
                    yield number, name, values[name]
        for piece in self._pieces:
            session = self._open(piece, held[0])
            for number, values in enumerate(held):
                given = {name: values[name] for name in piece.reads}
                for name, array in session(given).items():
                    values[name] = array
                    if name in self._wanted and isinstance(array, np.ndarray):
                        yield number, name, array
                for name in piece.dead:
                    values.pop(name, None)
            del session

    def results(self, feeds: Sequence[Values]) -> list[dict[str, np.ndarray]]:
        """The outputs alone, for each of ``feeds``."""
        found: list[dict[str, np.ndarray]] = [{} for _ in feeds]
        for number, name, array in self.run(feeds):
            if name in self.outputs:
                found[number][name] = array
        return found

    def _fed(self, feed: Values) -> dict[str, np.ndarray]:
        if missing := [name for name in self.inputs if name not in feed]:
            raise UsageError(
                f"the graph takes {', '.join(self.inputs)}, and nothing feeds {missing[0]}",
                where=str(self._folder),
            )
        found = {}
        for name in self.inputs:
            kind = onnx.helper.tensor_dtype_to_np_dtype(
                self._types[name].type.tensor_type.elem_type
            )
            found[name] = np.asarray(feed[name], kind, order="C")
        return found

    def _open(self, piece: _Piece, values: Values) -> Piece:
        # Without a shape: it is what the arrays have, and may differ from feed to feed.
        inputs = [
            onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(values[name].dtype), None
            )
            for name in sorted(piece.reads)
        ]
        graph = onnx.GraphProto(
            name="piece",
            node=piece.nodes,
            input=inputs,
            output=[onnx.ValueInfoProto(name=name) for name in piece.gives],
            initializer=[self._weights[name] for name in sorted(piece.weights)],
        )
        model = onnx.ModelProto(
            ir_version=self._proto.ir_version,
            opset_import=self._proto.opset_import,
            functions=self._proto.functions,
            graph=graph,
        )
        return self._ort.open_piece(model, self._folder)

    def _cut(self, most: int) -> list[_Piece]:
        """The pieces, in order; each knows what it carries on and what it lets go."""
        pieces = [_Piece()]
        size, pending = 0, set[str]()
        readers = self._last_readers()
        for index, node in enumerate(self._proto.graph.node):
            reads = set(read_by(node))
            weights = {name for name in reads if name in self._weights}
            more = sum(_bytes(self._weights[n]) for n in weights - pieces[-1].weights)
            full = len(pieces[-1].nodes) >= most or size + more > PIECE_BYTES
            if full and pieces[-1].nodes and not pending:
                pieces.append(_Piece())
                more, size = sum(_bytes(self._weights[n]) for n in weights), 0
            piece = pieces[-1]
            size += more
            piece.nodes.append(node)
            piece.weights |= weights
            piece.reads |= reads - weights - piece.makes
            made = {name for name in node.output if name}
            piece.makes |= made
            if node.op_type in _COMPOUND:
                pending |= {name for name in made if name in readers}
            pending = {name for name in pending if readers[name] > index}
        self._settle(pieces)
        return pieces

    def _last_readers(self) -> dict[str, int]:
        return {
            name: index
            for index, node in enumerate(self._proto.graph.node)
            for name in read_by(node)
        }

    def _settle(self, pieces: list[_Piece]) -> None:
        """Say of each piece what it gives, and what is dead behind it."""
        later: set[str] = set()
        for piece in reversed(pieces):
            made = dict.fromkeys(name for node in piece.nodes for name in node.output if name)
            piece.gives = [name for name in made if name in self._wanted or name in later]
            piece.dead = [name for name in {*piece.reads, *piece.gives} if name not in later]
            later |= piece.reads


def read_by(node: onnx.NodeProto) -> Iterator[str]:
    """Names of the values that a node reads, those that its bodies take from outside included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            inside = {one.name for one in body.input} | {one.name for one in body.initializer}
            inside |= {name for node in body.node for name in node.output}
            yield from _outside(body.node, inside)
            yield from (value.name for value in body.output if value.name not in inside)


def _outside(nodes: Iterable[onnx.NodeProto], inside: set[str]) -> Iterator[str]:
    for node in nodes:
        yield from (name for name in read_by(node) if name not in inside)


def _bytes(tensor: onnx.TensorProto) -> int:
    """The size of an initializer from its shape; nothing is read."""
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return math.prod(tensor.dims) * int(kind.itemsize)
