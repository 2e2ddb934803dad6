"""A detector as YOLOv5 exports it, in miniature: ``images`` to ``output0`` of boxes at 3 strides.

Convolutions with SiLU in C3 blocks, SPPF, a neck that resizes and concatenates, and a head that
turns logits into boxes with slices. Weights are random, names and structure are what counts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ANCHORS = ((10, 13, 16, 30, 33, 23), (30, 61, 62, 45, 59, 119), (116, 90, 156, 198, 373, 326))
STRIDES = (8, 16, 32)
CLASSES = 3
NUMBERS = 5 + CLASSES
"""Of a box: centre, size, whether there is an object, and the classes."""


@dataclass
class Detector:
    """Builds the graph; ``silus`` are the activations in ``model``, once it is built.

    Attributes:
        opset: 9 to 22; below 11 sizes are fixed, since Range came with it.
        size: height and width of ``images``; None makes both, and the batch, dynamic.
        focus: the stem slices the image (until YOLOv5 5.0) instead of a wide convolution.
        norms: BatchNormalization is left behind the convolutions.
        width: channels of the first layer.
    """

    opset: int = 17
    size: tuple[int, int] | None = (64, 96)
    focus: bool = False
    norms: bool = False
    width: int = 8
    silus: int = 0
    _nodes: list[onnx.NodeProto] = field(default_factory=list)
    _weights: list[onnx.TensorProto] = field(default_factory=list)
    _rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    @functools.cached_property
    def model(self) -> onnx.ModelProto:
        """The detector, ``images`` [batch, 3, height, width] to ``output0`` [batch, N, 8]."""
        w = self.width
        x = self._focus("images") if self.focus else "images"
        x = self._conv(x, 12 if self.focus else 3, w, 3 if self.focus else 6, 1 + (not self.focus))
        p3 = self._c3(self._conv(self._conv(x, w, w, 3, 2), w, 2 * w, 3, 2), 2 * w, 2 * w)
        p4 = self._c3(self._conv(p3, 2 * w, 2 * w, 3, 2), 2 * w, 2 * w)
        p5 = self._sppf(self._c3(self._conv(p4, 2 * w, 2 * w, 3, 2), 2 * w, 2 * w), 2 * w)
        n5 = self._conv(p5, 2 * w, w, 1)
        n4 = self._c3(self.op("Concat", self._up(n5), p4, axis=1), 3 * w, w, shortcut=False)
        n4 = self._conv(n4, w, w, 1)
        d3 = self._c3(self.op("Concat", self._up(n4), p3, axis=1), 3 * w, w, shortcut=False)
        d4 = self.op("Concat", self._conv(d3, w, w, 3, 2), n4, axis=1)
        d4 = self._c3(d4, 2 * w, w, shortcut=False)
        d5 = self.op("Concat", self._conv(d4, w, w, 3, 2), n5, axis=1)
        d5 = self._c3(d5, 2 * w, w, shortcut=False)
        boxes = [self._detect(x, level) for level, x in enumerate((d3, d4, d5))]
        self._nodes.append(helper.make_node("Concat", boxes, ["output0"], name="output0", axis=1))
        sides = self.size or ("height", "width")
        image = [1 if self.size else "batch", 3, *sides]
        high, wide = self.size or (0, 0)
        count = sum(3 * (high // stride) * (wide // stride) for stride in STRIDES)
        shapes = image, [image[0], count or "N", NUMBERS]
        graph = helper.make_graph(
            self._nodes,
            "detector",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, shapes[0])],
            [helper.make_tensor_value_info("output0", TensorProto.FLOAT, shapes[1])],
            self._weights,
        )
        opsets = [helper.make_opsetid("", self.opset)]
        made = helper.make_model(graph, opset_imports=opsets, ir_version=min(10, self.opset - 5))
        onnx.checker.check_model(made)
        return made

    def op(self, name: str, *inputs: str, **attributes: object) -> str:
        """One node; returns the name of its output."""
        out = f"{name}_{len(self._nodes)}_out"
        node = helper.make_node(name, list(inputs), [out], name=f"/{name}_{len(self._nodes)}")
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        self._nodes.append(node)
        return out

    def const(self, numbers: object, dtype: type = np.int64) -> str:
        """An initializer."""
        name = f"const_{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(np.asarray(numbers, dtype), name))
        return name

    def _conv(self, x: str, c_in: int, c_out: int, k: int, stride: int = 1) -> str:
        """Convolution and SiLU, as torch writes it."""
        pads = [2] * 4 if k == 6 else [k // 2] * 4
        y = self._plain(x, c_in, c_out, k, strides=[stride] * 2, pads=pads)
        if self.norms:
            mean, spread = self._rng.standard_normal(c_out) / 10, self._rng.random(c_out) + 0.5
            numbers = (np.ones(c_out), np.zeros(c_out), mean, spread)
            inputs = [self.const(one, np.float32) for one in numbers]
            y = self.op("BatchNormalization", y, *inputs, epsilon=1e-3)
        self.silus += 1
        gate = self.op("Sigmoid", y)
        return self.op("Mul", y, gate) if self.silus % 2 else self.op("Mul", gate, y)

    def _plain(self, x: str, c_in: int, c_out: int, k: int, **attributes: object) -> str:
        scale = np.sqrt(2 / (c_in * k * k))
        weight = self._rng.standard_normal((c_out, c_in, k, k)) * scale
        inputs = [self.const(weight, np.float32), self.const(np.zeros(c_out) + 0.1, np.float32)]
        return self.op("Conv", x, *inputs, kernel_shape=[k, k], **attributes)

    def _c3(self, x: str, c_in: int, c_out: int, shortcut: bool = True) -> str:
        half = c_out // 2
        y = self._conv(x, c_in, half, 1)
        inner = self._conv(self._conv(y, half, half, 1), half, half, 3)
        y = self.op("Add", y, inner) if shortcut else inner
        both = self.op("Concat", y, self._conv(x, c_in, half, 1), axis=1)
        return self._conv(both, 2 * half, c_out, 1)

    def _sppf(self, x: str, c: int) -> str:
        found = [self._conv(x, c, c // 2, 1)]
        for _ in range(3):
            pool = {"kernel_shape": [5, 5], "pads": [2] * 4, "strides": [1, 1]}
            found.append(self.op("MaxPool", found[-1], **pool))
        return self._conv(self.op("Concat", *found, axis=1), 2 * c, c, 1)

    def _up(self, x: str) -> str:
        scales = self.const([1, 1, 2, 2], np.float32)
        if self.opset < 11:
            return self.op("Upsample" if self.opset < 10 else "Resize", x, scales, mode="nearest")
        how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        roi = self.const([], np.float32) if self.opset < 13 else ""
        return self.op("Resize", x, roi, scales, mode="nearest", **how)

    def _focus(self, x: str) -> str:
        parts = []
        for column in (0, 1):
            for row in (0, 1):
                rows = self._slice(x, row, 2**31 - 1, 2, 2)
                parts.append(self._slice(rows, column, 2**31 - 1, 3, 2))
        return self.op("Concat", *parts, axis=1)

    def _slice(self, x: str, start: int, end: int, axis: int, step: int = 1) -> str:
        if self.opset < 10:
            assert step == 1
            return self.op("Slice", x, starts=[start], ends=[end], axes=[axis])
        return self.op("Slice", x, *(self.const([n]) for n in (start, end, axis, step)))

    def _detect(self, x: str, level: int) -> str:
        """Logits of three anchors to boxes in pixels of the image, [batch, 3 ny nx, 8]."""
        stride, anchors = STRIDES[level], np.reshape(ANCHORS[level], (1, 3, 1, 1, 2))
        y = self._plain(x, self.width, 3 * NUMBERS, 1)
        if self.size:
            ny, nx = (side // stride for side in self.size)
            shape = self.const([0, 3, NUMBERS, ny, nx])
            cells = np.stack(np.meshgrid(np.arange(nx), np.arange(ny)), -1)[None, None]
            grid = self.const(cells, np.float32)
        else:
            shape, grid = self._sizes(y)
        y = self.op("Transpose", self.op("Reshape", y, shape), perm=[0, 1, 3, 4, 2])
        y = self.op("Sigmoid", y)
        two, half = self.const(2, np.float32), self.const(0.5, np.float32)
        twice = [self.op("Mul", self._slice(y, at, at + 2, 4), two) for at in (0, 2)]
        centre = self.op("Add", self.op("Sub", twice[0], half), grid)
        centre = self.op("Mul", centre, self.const(stride, np.float32))
        size = self.op("Mul", self.op("Pow", twice[1], two), self.const(anchors, np.float32))
        y = self.op("Concat", centre, size, self._slice(y, 4, NUMBERS, 4), axis=4)
        return self.op("Reshape", y, self.const([0, -1, NUMBERS]))

    def _sizes(self, y: str) -> tuple[str, str]:
        """The shape of the logits by anchor, and the cells' corners, both computed."""
        whole = self.op("Shape", y)
        batch, ny, nx = (self.op("Gather", whole, self.const([at]), axis=0) for at in (0, 2, 3))
        numbers = [self.const([3]), self.const([NUMBERS])]
        shape = self.op("Concat", batch, *numbers, ny, nx, axis=0)
        plane = self.op("Concat", self.const([1, 1]), ny, nx, self.const([1]), axis=0)
        sides = []
        for count, place in ((nx, [1, 1, 1, -1, 1]), (ny, [1, 1, -1, 1, 1])):
            empty = self.const([])
            bare = self.op("Reshape", count, empty)
            line = self.op("Range", self.const(0), bare, self.const(1))
            line = self.op("Cast", line, to=TensorProto.FLOAT)
            sides.append(self.op("Expand", self.op("Reshape", line, self.const(place)), plane))
        return shape, self.op("Concat", *sides, axis=4)
