"""What a build for ``tpu`` is asked for: fixed sizes of every input, and samples of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sdopt.errors import UsageError, storage_error
from sdopt.recorded import Recording
from sdopt.shapes import Extent
from sdopt.targets.base import Order

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of every input, in the order of the graph's inputs."""


def shapes_of(order: Order, guidance: bool) -> list[Shapes]:
    """The fixed shapes of each size that a component is compiled for, without repeats.

    A denoiser's batch is that of both halves of guidance, or of one half without ``guidance``.

    Raises:
        UsageError: a range of sizes, of batches or of another axis.
    """
    if ranges := [str(one) for one in order.sizes if not one.fixed]:
        low, _, high = ranges[0].partition("..")
        raise UsageError(
            f"a bmodel is of fixed sizes, and {ranges[0]} is a range",
            where=order.component,
            hint=f"name each size, as many as you need: --shapes {low},{high}",
        )
    if order.batch[0] != order.batch[1]:
        raise UsageError(
            f"a bmodel is of a fixed batch, and {'..'.join(map(str, order.batch))} is a range",
            where=order.component,
            hint=f"--batch {order.batch[1]}",
        )
    found: list[Shapes] = []
    for profile in order.profiles:
        one = {
            name: tuple(
                _fixed(extent, axis, order, name, guidance) for axis, extent in enumerate(axes)
            )
            for name, axes in profile.items()
        }
        if one not in found:
            found.append(one)
    return found


def _fixed(extent: Extent, axis: int, order: Order, name: str, guidance: bool) -> int:
    if extent.fixed:
        return extent.low
    images = order.batch[0]
    if axis == 0 and extent == (images, 2 * images, 2 * images):
        return extent.high if guidance else extent.low
    raise UsageError(
        f"a bmodel is of fixed sizes, and axis {axis} of {name} goes from {extent.low} "
        f"to {extent.high}",
        where=order.component,
        hint="fix it: --dim NAME=N",
    )


def described(
    values: Sequence[ir.Value], shapes: Sequence[Shapes]
) -> list[tuple[str, str, list[int | str]]]:
    """Name, dtype and dims in order; an axis that is the same in all sizes is a number."""
    found: list[tuple[str, str, list[int | str]]] = []
    for value in values:
        name, dtype = value.name or "", value.dtype or ir.DataType.FLOAT
        dims: list[int | str] = []
        for axis, dim in enumerate(value.shape or ()):
            known = {one[name][axis] for one in shapes}
            free = dim if isinstance(dim, int) else str(dim.value)
            dims.append(known.pop() if len(known) == 1 else free)
        found.append((name, dtype.numpy().name, dims))
    return found


def write_samples(recording: Recording, shapes: Shapes, folder: Path, component: str) -> int:
    """Write the recorded samples of exactly these shapes for Sophgo's calibration, and a list.

    Raises:
        UsageError: none was recorded at this size.
        StorageError: the folder cannot be written.
    """
    samples = recording.of(frozenset(shapes))
    fitting = [
        one
        for one in samples
        if all(tuple(one.inputs[name][1]) == shape for name, shape in shapes.items())
    ]
    if not fitting:
        known = dict.fromkeys(_said({n: one.inputs[n][1] for n in shapes}) for one in samples)
        raise UsageError(
            f"nothing recorded fits {_said(shapes)}",
            where=f"{component}, {recording.folder}",
            why="; ".join(known) or "no sample is of these inputs",
            hint="record at that size: sdopt record BUNDLE --prompts FILE --steps N "
            "--height H --width W",
        )
    # One .npy per input and a list of them: from .npz files tpu_mlir 1.30.2 puts samples together
    # until an input of one element is as long as the batch, and then loses count of the others.
    lines = []
    try:
        folder.mkdir()
        for index, one in enumerate(fitting):
            arrays = recording.load(one)
            names = [f"{folder.name}/{index:04}-{axis}.npy" for axis in range(len(shapes))]
            for file, name in zip(names, shapes, strict=True):
                # The frontend makes an axis of one element for a scalar.
                np.save(folder.parent / file, np.atleast_1d(arrays[name]), allow_pickle=False)
            lines.append(",".join(names))
        folder.with_suffix(".txt").write_text("\n".join(lines) + "\n")
    except OSError as error:
        raise storage_error(error, f"write samples into {folder}") from error
    return len(fitting)


def _said(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
