"""The header of one safetensors file: name -> range of bytes; the data itself is never read.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, that
many bytes of JSON ``{name: {dtype, shape, data_offsets: [begin, end]}}``, then the data, which the
tensors must cover from its first to its last byte without a hole or an overlap.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sdopt.errors import WeightsError

MAX_HEADER = 100_000_000
"""The longest header, in bytes, that the safetensors library itself reads."""

_DTYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "F8_E5M2": ir.DataType.FLOAT8E5M2,
    "I64": ir.DataType.INT64,
    "I32": ir.DataType.INT32,
    "I16": ir.DataType.INT16,
    "I8": ir.DataType.INT8,
    "U64": ir.DataType.UINT64,
    "U32": ir.DataType.UINT32,
    "U16": ir.DataType.UINT16,
    "U8": ir.DataType.UINT8,
    "BOOL": ir.DataType.BOOL,
}
_AXES = 32
"""Of a tensor at most; no network has more."""
_MOST = 1 << 63
"""What a size is less than, as in every tool that reads the format."""
_AGAIN = "download or copy the file again"


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: ``length`` bytes at ``offset`` from the start of ``file``."""

    file: Path
    dtype: ir.DataType
    shape: tuple[int, ...]
    offset: int
    length: int

    def external(self, name: str) -> ir.ExternalTensor:
        """The tensor as a range of its file under ``name``; nothing is read."""
        # Hub caches hold links out of their folder; a range must name the real file and folder.
        real = Path(os.path.realpath(self.file))
        return ir.ExternalTensor(
            real.name,
            self.offset,
            self.length,
            self.dtype,
            shape=ir.Shape(self.shape),
            name=name,
            base_dir=real.parent,
        )


def read_header(path: Path) -> tuple[dict[str, Entry], bytes]:
    """The entries of one safetensors file in the order of their offsets, and its raw header.

    Raises:
        WeightsError: the file is not a whole, well-formed safetensors file.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise broken(path, f"it has {size} bytes, too few for a header length")
            if length > min(size - 8, MAX_HEADER):
                why = f"its header says {length} bytes, the file has {size}"
                raise broken(path, why)
            header = file.read(length)
    except FileNotFoundError:
        raise WeightsError(
            "a weights file is missing", where=str(path), hint="download the missing file"
        ) from None
    except OSError as error:
        raise WeightsError(
            "a weights file cannot be read", where=str(path), why=error.strerror or str(error)
        ) from error
    table = parse_json(header, path)
    table.pop("__metadata__", None)
    entries = {name: _entry(name, item, path, 8 + length) for name, item in table.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].length)))
    end = 8 + length
    for name, entry in ordered.items():
        if entry.offset != end:
            kind = "overlaps the one" if entry.offset < end else "leaves a hole"
            why = f"the tensor {name} {kind} before it (offset {entry.offset}, {end} due)"
            raise broken(path, why)
        end += entry.length
    if end != size:
        kind = f"{end - size} bytes are missing" if end > size else f"{size - end} bytes too many"
        raise broken(path, f"{kind}: the tensors end at {end}, the file at {size}")
    return ordered, header


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON table in which no key stands twice; ``path`` is for the error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        if twice := [key for key, count in counts.items() if count > 1]:
            raise broken(path, f"it names {twice[0]} twice")
        return dict(pairs)

    try:
        table = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # also a UnicodeDecodeError
        raise broken(path, f"its JSON cannot be read ({str(error)[:200]})") from None
    if not isinstance(table, dict):
        raise broken(path, "its JSON is no table")
    return table


def _entry(name: str, item: object, path: Path, base: int) -> Entry:
    match item:
        case {"dtype": str(kind), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise broken(path, f"the tensor {name} lacks a dtype, shape or data_offsets")
    if kind not in _DTYPES:
        raise broken(path, f"the tensor {name} has the dtype {kind}", hint="save it as fp16")
    fits = all(type(dim) is int and 0 <= dim < _MOST for dim in shape) and len(shape) <= _AXES
    if not fits or not 0 <= begin <= end:
        raise broken(path, f"the tensor {name} has a bad shape or offsets: {str(item)[:200]}")
    due = math.prod(shape) * _DTYPES[kind].itemsize
    if end - begin != due:
        raise broken(path, f"the tensor {name} has {end - begin} bytes, {shape} needs {due}")
    return Entry(path, _DTYPES[kind], tuple(shape), base + begin, end - begin)


def broken(path: Path, why: str, hint: str = _AGAIN) -> WeightsError:
    """The error for a weights file or index that does not hold together."""
    return WeightsError("not a usable weights file", where=str(path), why=why, hint=hint)
