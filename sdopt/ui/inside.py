"""Names that come from a page, as paths below the one folder that the page is about."""

from __future__ import annotations

import os
from pathlib import Path

from sdopt.errors import UsageError
from sdopt.reading import user_path


def inside(root: Path, name: str) -> Path:
    """The path below ``root`` that ``name`` says; whether anything is there is not asked.

    Raises:
        UsageError: it is absolute, goes upwards, or is a link that leads out.
    """
    path = Path(name)
    if not name or path.is_absolute() or ".." in path.parts or name.startswith("~"):
        raise _outside(name)
    place = user_path(root / path)
    real = os.path.join(os.path.realpath(root), "")
    if not os.path.join(os.path.realpath(place), "").startswith(real):
        raise _outside(name)
    return place


def bundle_folder(root: Path, name: str) -> Path:
    """The folder of a bundle below ``root``, which may not be there yet.

    Raises:
        UsageError: the name is no single visible component of a path, or is that of a link.
    """
    if not name.isprintable() or name.startswith(".") or Path(name).name != name:
        raise UsageError(
            f"{name!r} is no name for a bundle",
            hint="use letters, digits, dashes and underscores",
        )
    folder = inside(root, name)
    if folder.is_symlink():
        raise _outside(name)
    return folder


def _outside(name: str) -> UsageError:
    return UsageError(
        "this is no place in the folder that is shown here",
        where=repr(name)[:120],
        hint="give a path relative to it, without .. and without links that lead out",
    )
