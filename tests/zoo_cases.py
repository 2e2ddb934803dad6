"""The models that the onnx package ships for testing backends, with what to feed each."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test.loader as loader
from onnx import numpy_helper

DATA = Path(loader.DATA_DIR)
FOLDERS = ("light", "pytorch-converted", "pytorch-operator", "simple")
CHUNKS = 16
"""The cases are dealt into this many parts of about equal size."""

Feeds = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One model, with the inputs that onnx ships for it."""

    name: str
    category: str
    load: Callable[[], tuple[onnx.ModelProto, Feeds, Sequence[Any]]]
    """The model, what to feed it, and what onnx says comes out (empty if it does not say)."""


@functools.cache
def cases() -> tuple[Case, ...]:
    """Every model of the package: the node tests, which it generates, and the folders."""
    with warnings.catch_warnings():
        # onnx 1.23's own generators overflow and divide by zero on purpose.
        warnings.simplefilter("ignore")
        made = loader.load_node_model_tests()
    found = [Case(one.name, "node", functools.partial(_from_memory, one)) for one in made]
    found += [
        Case(path.stem, "light", functools.partial(_light, path))
        for path in sorted((DATA / "light").glob("*.onnx"))
    ]
    found += [
        Case(path.parent.name, folder, functools.partial(_from_folder, path))
        for folder in FOLDERS[1:]
        for path in sorted((DATA / folder).glob("*/model.onnx"))
    ]
    return tuple(found)


def chunk(index: int) -> tuple[Case, ...]:
    """One of ``CHUNKS`` parts."""
    return cases()[index::CHUNKS]


def _from_memory(case: Any) -> tuple[onnx.ModelProto, Feeds, Sequence[Any]]:
    inputs, outputs = case.data_sets[0]
    names = [one.name for one in case.model.graph.input]
    return case.model, dict(zip(names, map(_plain, inputs), strict=False)), [*map(_plain, outputs)]


def _from_folder(path: Path) -> tuple[onnx.ModelProto, Feeds, Sequence[Any]]:
    model = onnx.load(path)
    sets = path.parent / "test_data_set_0"
    feeds = {
        one.name: _read(sets / f"input_{index}.pb", one.type)
        for index, one in enumerate(model.graph.input)
        if (sets / f"input_{index}.pb").exists()
    }
    wanted = [
        _read(sets / f"output_{index}.pb", one.type)
        for index, one in enumerate(model.graph.output)
    ]
    return model, feeds, wanted


def _light(path: Path) -> tuple[onnx.ModelProto, Feeds, Sequence[Any]]:
    """The input is the ramp that onnx's own runner feeds these (``generate_dummy_data``)."""
    model = onnx.load(path)
    given = {tensor.name for tensor in model.graph.initializer}
    feeds = {}
    for one in model.graph.input:
        if one.name not in given:
            shape = [dim.dim_value or 1 for dim in one.type.tensor_type.shape.dim]
            size = int(np.prod(shape))
            feeds[one.name] = (np.arange(size).reshape(shape) / size).astype(np.float32)
    output = onnx.load_tensor(path.with_name(f"{path.stem}_output_0.pb"))
    return model, feeds, [numpy_helper.to_array(output)]


def _read(path: Path, kind: onnx.TypeProto) -> Any:
    data = path.read_bytes()
    if kind.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(data))
    if kind.HasField("optional_type"):
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
    return numpy_helper.to_array(onnx.TensorProto.FromString(data))


def _plain(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value
