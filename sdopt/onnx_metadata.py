"""The metadata of an ONNX file, read without decoding its graph."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

_METADATA = 14
"""The field of ``ModelProto`` that holds them (onnx.proto: ``metadata_props``)."""
_LENGTHS = {1: 8, 5: 4}
"""Bytes of a field by its wire type, where that says so (protobuf's encoding)."""


def ours(path: Path) -> dict[str, str] | None:
    """The entries of a file that sdopt wrote; None for any other, whatever is wrong with it."""
    try:
        found = entries(path)
    except (OSError, ValueError):
        return None
    return found if any(key.startswith("sdopt.") for key in found) else None


def entries(path: Path) -> dict[str, str]:
    """The entries of a file's metadata; nothing else is looked at, whatever it holds.

    Raises:
        ValueError: the bytes are no protobuf message, or cut short.
        OSError: the file cannot be read.
    """
    if not path.stat().st_size:
        raise ValueError("the file is empty")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = {}
        for start, end in _fields(data, _METADATA):
            try:
                entry = onnx.StringStringEntryProto.FromString(data[start:end])
            except DecodeError as error:
                raise ValueError(f"no entry of metadata at byte {start}") from error
            found[entry.key] = entry.value
        return found


def _fields(data: mmap.mmap, wanted: int) -> Iterator[tuple[int, int]]:
    """Where the values of one length-delimited field of a message begin and end."""
    position, size = 0, len(data)
    while position < size:
        tag, position = _varint(data, position)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            _, position = _varint(data, position)
        elif wire == 2:
            length, position = _varint(data, position)
            if field == wanted and position + length <= size:
                yield position, position + length
            position += length
        elif wire in _LENGTHS:
            position += _LENGTHS[wire]
        else:
            raise ValueError(f"wire type {wire} at byte {position}")
        if field == 0 or position > size:
            raise ValueError(f"cut short, or no message, at byte {min(position, size)}")


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("cut short in a number")
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise ValueError(f"a number of more than ten bytes at byte {position}")
