"""Writing weights: ranges copied inside the kernel, computed tensors streamed, names by digest."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from sdopt.errors import WeightsError, storage_error
from sdopt.weights import byte_blocks, check_location

DIGEST_LENGTH = 12
SUFFIX = ".onnx_data"
_ALIGN_SMALL, _ALIGN_LARGE, _LARGE = 64, 4096, 1 << 20
_COPY_CHUNK = 1 << 30
_SAMPLE = 64
_NOT_OFFERED = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


def data_name(stem: str, digest: str) -> str:
    """``optimized`` and a digest to ``optimized-<digest>.onnx_data``."""
    return f"{stem}-{digest}{SUFFIX}"


def is_data_name(name: str, stem: str) -> bool:
    """Whether ``name`` is a data file, finished or not, that a stage called ``stem`` wrote."""
    middle = name.removeprefix(f"{stem}-").removesuffix(SUFFIX)
    return name == f"{stem}-{middle}{SUFFIX}" and (
        middle.startswith("tmp") or (len(middle) == DIGEST_LENGTH and set(middle) <= _HEX)
    )


_HEX = frozenset("0123456789abcdef")


def write(
    tensors: Sequence[ir.TensorProtocol], folder: Path, stem: str
) -> tuple[list[ir.ExternalTensor], int]:
    """Write tensors into one new data file in ``folder``; returns them as ranges of it, and bytes.

    The file appears under its final name, which carries the digest of what it holds, only when it
    is complete and synced. Computed tensors are hashed as they stream; ranges of other files are
    copied by the kernel, holes kept, and count by name, size and sampled bytes.

    Raises:
        StorageError: the disk is full or the folder cannot be written; nothing is left behind.
        WeightsError: a source range is missing or short.
    """
    if not tensors:
        return [], 0
    state = hashlib.sha256()
    temporary = folder / data_name(stem, f"tmp{secrets.token_hex(4)}")
    offsets: list[int] = []
    try:
        with open(temporary, "xb") as file:
            position = 0
            for tensor in tensors:
                position = _place(tensor, position)
                offsets.append(position)
                state.update(f"{tensor.name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
                position = _put(tensor, file, position, state)
            file.truncate(position)
            file.flush()
            os.fsync(file.fileno())
        name = data_name(stem, state.hexdigest()[:DIGEST_LENGTH])
        os.replace(temporary, folder / name)
    except OSError as error:
        raise storage_error(error, f"write weights into {folder}") from error
    finally:
        temporary.unlink(missing_ok=True)
    written = [
        ir.ExternalTensor(
            name,
            offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
            base_dir=folder,
        )
        for tensor, offset in zip(tensors, offsets, strict=True)
    ]
    return written, position


def _place(tensor: ir.TensorProtocol, position: int) -> int:
    """Where ``tensor`` may begin; large ranges keep their offset in a page, so holes survive."""
    if tensor.nbytes < _LARGE:
        return -(-position // _ALIGN_SMALL) * _ALIGN_SMALL
    page = -(-position // _ALIGN_LARGE) * _ALIGN_LARGE
    if isinstance(tensor, ir.ExternalTensor):
        return page + (tensor.offset or 0) % _ALIGN_LARGE
    return page


def _put(tensor: ir.TensorProtocol, file: BinaryIO, position: int, state: hashlib._Hash) -> int:
    file.seek(position)
    end = position + tensor.nbytes
    if isinstance(tensor, ir.ExternalTensor):
        check_location(tensor)
        file.flush()
        with open(tensor.path, "rb", buffering=0) as source:
            start = tensor.offset or 0
            for at in (start, start + tensor.nbytes // 2):
                state.update(os.pread(source.fileno(), min(_SAMPLE, tensor.nbytes), at))
            copy_range(source.fileno(), start, file.fileno(), position, tensor.nbytes)
        return end
    for block in byte_blocks(tensor):
        state.update(block.data)
        file.write(block.data)
    if file.tell() != end:
        raise WeightsError(
            f"{tensor.name}: {file.tell() - position} bytes came, {end - position} due"
        )
    return end


def copy_range(source: int, start: int, target: int, position: int, count: int) -> None:
    """Copy ``count`` bytes between open files inside the kernel, leaving holes as holes.

    Both are file descriptors; ``start`` and ``position`` are byte offsets. The target must not
    hold data there yet (a hole is skipped, not written).
    """
    end = start + count
    shift = position - start
    while start < end:
        data, hole = _next_data(source, start, end)
        _copy_bytes(source, data, target, data + shift, hole - data)
        start = hole
    if os.fstat(target).st_size < position + count:
        os.ftruncate(target, position + count)


def _next_data(source: int, start: int, end: int) -> tuple[int, int]:
    """The next stretch of data in ``[start, end)``; empty at ``end`` when only a hole is left."""
    try:
        data = min(os.lseek(source, start, os.SEEK_DATA), end)
    except OSError as error:
        if error.errno == errno.ENXIO:  # no data behind start
            return end, end
        if error.errno == errno.EINVAL:  # a file system that knows no holes
            return start, end
        raise
    return data, min(os.lseek(source, data, os.SEEK_HOLE), end) if data < end else end


def _copy_bytes(source: int, start: int, target: int, position: int, count: int) -> None:
    done = 0
    while done < count:
        try:
            moved = os.copy_file_range(
                source, target, min(count - done, _COPY_CHUNK), start + done, position + done
            )
        except OSError as error:
            if error.errno not in _NOT_OFFERED:
                raise
            # Across file systems, or where the call is not offered: still never a whole tensor.
            chunk = os.pread(source, min(count - done, 1 << 20), start + done)
            moved = os.pwrite(target, chunk, position + done)
        if not moved:
            raise WeightsError("a weights file became shorter while it was copied")
        done += moved


def copy_file(source: Path, target: Path) -> None:
    """Copy one file inside the kernel, holes kept, under its final name only when complete."""
    temporary = target.with_name(f".{target.name}.tmp{secrets.token_hex(4)}")
    try:
        with open(source, "rb", buffering=0) as reader, open(temporary, "xb") as writer:
            copy_range(reader.fileno(), 0, writer.fileno(), 0, os.fstat(reader.fileno()).st_size)
        os.replace(temporary, target)
    except OSError as error:
        raise storage_error(error, f"copy {source.name}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file so that it appears whole and synced, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise storage_error(error, f"write {path.name}") from error
    finally:
        temporary.unlink(missing_ok=True)
