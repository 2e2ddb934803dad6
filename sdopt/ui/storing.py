"""Files that arrive get their names, files that leave are put together; nothing is overwritten."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from sdopt.errors import PathError, SourceError, StorageError, UsageError, storage_error
from sdopt.exporters.identify import refuse_file
from sdopt.safetensors_header import read_header
from sdopt.ui import names
from sdopt.units import size

SUFFIX = ".safetensors"
MOST_PIXELS = 64_000_000
"""Of an image that is given for img2img."""
_PICTURES = ("PNG", "JPEG", "WEBP")
_MOST_NAMES = 10_000


def check_weights(path: Path) -> None:
    """Refuse what is no whole safetensors file; reads its header.

    Raises:
        SourceError, WeightsError: saying what it is instead.
    """
    refuse_file(path)
    read_header(path)


def weights_name(name: str) -> str:
    """A plain name for a weights file that someone else calls ``name``.

    Raises:
        SourceError: it is to be another kind of file.
    """
    made = names.made_plain(name, "model")
    if not made.endswith(SUFFIX):
        raise SourceError(
            "only .safetensors files are taken",
            where=names.shown(name),
            hint="pickles run whatever code is in them; get the model as .safetensors",
        )
    return made


def settle(file: Path, folder: Path, name: str) -> Path:
    """Rename ``file`` to ``name`` in ``folder``, or to ``NAME-2`` where another has that name.

    One that is there with the same bytes is kept, and ``file`` goes away.

    Raises:
        StorageError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(1, _MOST_NAMES):
            target = folder / names.numbered(name, number)
            try:
                # The name is taken first, so that no rename replaces another's file.
                os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW))
            except FileExistsError:
                if same(file, target):
                    file.unlink()
                    return target
                continue
            try:
                os.replace(file, target)
            except OSError:
                target.unlink()
                raise
            return target
    except OSError as error:
        raise storage_error(error, f"put a file into {folder}") from error
    raise StorageError("too many files of one name", where=str(folder / name))


def same(one: Path, other: Path) -> bool:
    """Whether two plain files hold the same bytes; read in blocks, and only if as long."""
    if other.is_symlink() or not other.is_file() or one.stat().st_size != other.stat().st_size:
        return False
    return digest(one) == digest(other)


def digest(path: Path) -> str:
    """The SHA-256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuse what does not fit on the disk.

    Raises:
        StorageError: saying how much is missing.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise StorageError(
            "there is too little space on the disk",
            where=str(folder),
            why=f"{size(needed_bytes)} are needed and {size(free)} are free",
            hint="free some space; nothing was written",
        )


def check_picture(path: Path) -> tuple[int, int]:
    """Width and height of an image that decodes, at most ``MOST_PIXELS`` in all.

    Raises:
        UsageError: it is none, of another kind, or larger.
    """
    from PIL import Image

    hint = "give a PNG, JPEG or WebP image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # limited just below
            with Image.open(path, formats=_PICTURES) as image:
                width, height = image.size
                if width * height <= MOST_PIXELS:
                    image.load()
                    return width, height
    # Pillow's plugins raise whatever the bytes lead them to.
    except Exception as error:
        raise UsageError(
            "this is no image that can be read", where=path.name, why=str(error), hint=hint
        ) from error
    raise UsageError(
        "this image is too large",
        where=path.name,
        why=f"it has {width}x{height} pixels, more than {MOST_PIXELS // 1_000_000} million",
        hint="make it smaller first",
    )


def write_zip(paths: Sequence[Path], base: Path, output: Path) -> None:
    """Put files and folders into one archive, not compressed, their names relative to ``base``.

    Links and what is hidden are left out. The archive appears by a rename when it is whole.

    Raises:
        PathError: a path outside ``base``, or nothing to put in.
        StorageError: the disk is full.
    """
    found = sorted({file for path in paths for file in _files(path, base)})
    if not found:
        raise PathError("there is nothing to put into the archive", where=str(base))
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        check_space(output.parent, sum(file.stat().st_size for file in found))
        with zipfile.ZipFile(temporary, "x", strict_timestamps=False) as archive:
            for file in found:
                archive.write(file, file.relative_to(base).as_posix())
        os.replace(temporary, output)
    except OSError as error:
        raise storage_error(error, f"write {output.name}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _files(path: Path, base: Path) -> Iterator[Path]:
    if not path.is_relative_to(base):
        raise PathError("this is not in the bundle", where=str(path))
    if path.is_symlink() or any(one.startswith(".") for one in path.relative_to(base).parts):
        return
    if path.is_file():
        yield path
    elif path.is_dir():
        for child in path.iterdir():
            yield from _files(child, base)
