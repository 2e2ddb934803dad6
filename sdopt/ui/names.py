"""Names that come from people and from servers: which are paths below a root, which are safe."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

from sdopt.errors import PathError

LONGEST = 200
"""Of one component, in bytes: file systems take 255, and ``.part.json`` or ``-2`` may follow."""
LONGEST_PATH = 1024
"""Of a whole relative path, in bytes."""
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""A name that sdopt writes under."""

_HINT = "give a path below the root, such as models/sd15.safetensors"


def check(name: str) -> tuple[str, ...]:
    """The components of a relative path; looks at the text alone.

    Raises:
        PathError: it is absolute, leads up, names what is hidden, or holds what no name should.
    """
    parts = tuple(name.removesuffix("/").split("/"))
    why = None
    if not name.strip():
        why = "it is empty"
    elif not name.isprintable():
        why = "it holds a character that cannot be printed"
    elif "\\" in name:
        why = "it holds a backslash"
    elif name.startswith(("/", "~")):
        why = "it does not start at the root"
    elif ".." in parts:
        why = "it leads upwards"
    elif any(part.startswith(".") for part in parts):
        why = "it names something hidden"
    elif "" in parts:
        why = "a part of it is empty"
    elif len(name.encode()) > LONGEST_PATH or any(len(part.encode()) > LONGEST for part in parts):
        why = "it is too long"
    if why is not None:
        raise PathError("this is no path below the root", where=shown(name), why=why, hint=_HINT)
    return parts


def inside(root: Path, name: str) -> Path:
    """The real path of what ``name`` means below ``root``, which is a real path itself.

    Raises:
        PathError: there is nothing, or it is a link that leads out, or see ``check``.
    """
    check(name)
    try:
        found = Path(os.path.realpath(root / name, strict=True))
    except (OSError, ValueError) as error:
        raise PathError(
            "there is no such file or folder below the root",
            where=shown(name),
            why=(error.strerror if isinstance(error, OSError) else None) or str(error),
            hint="choose one that is listed; a model of the Hub is downloaded to the root first",
        ) from None
    if found == root or not found.is_relative_to(root):
        raise PathError(
            "this is a link that leads out of the root",
            where=shown(name),
            hint="put the file or folder itself below the root",
        )
    return found


def check_links(folder: Path, root: Path) -> None:
    """Refuse a folder that holds a link out of ``root``, at any depth.

    Raises:
        PathError: naming the link.
    """
    for home, folders, files in os.walk(folder):
        for entry in (*folders, *files):
            path = os.path.join(home, entry)
            if os.path.islink(path) and not Path(os.path.realpath(path)).is_relative_to(root):
                raise PathError(
                    "the folder holds a link that leads out of the root",
                    where=shown(str(Path(path).relative_to(root))),
                    hint="put the file itself there",
                )


def plain(name: str) -> str:
    """``name`` if it is one that sdopt writes under: letters, digits and ``. _ -``.

    Raises:
        PathError: it is none.
    """
    if not PLAIN.fullmatch(name) or name.endswith("."):
        raise PathError(
            f"{shown(name)!r} is no name for something new",
            hint="use letters, digits, dots, dashes and underscores, a letter or digit first",
        )
    return name


def made_plain(name: str, otherwise: str = "file") -> str:
    """The nearest plain name to what a server or a browser calls a file; never a path.

    The ending is kept, so that a long name is still a ``.safetensors``.
    """
    last = re.split(r"[/\\]", name)[-1]
    ascii_only = unicodedata.normalize("NFKD", last).encode("ascii", "ignore").decode()
    words = re.sub(r"[^A-Za-z0-9._-]+", "_", ascii_only).strip("._-")
    stem, dot, suffix = words.rpartition(".")
    if not dot or not suffix.isalnum():
        return words[:100].rstrip(".") or otherwise
    return f"{stem[: 99 - len(suffix[:20])].rstrip('._-') or otherwise}.{suffix[:20]}"


def numbered(name: str, number: int) -> str:
    """``model.safetensors`` to ``model-2.safetensors``; the first is the name itself."""
    if number == 1:
        return name
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}-{number}.{suffix}" if dot else f"{name}-{number}"


def shown(name: str) -> str:
    """A name as an error shows it: short, and nothing in it that a terminal would act on."""
    printable = "".join(one if one.isprintable() else "?" for one in name[:200])
    return printable + ("..." if len(name) > 200 else "")


def is_path(text: str) -> bool:
    """Whether a text may lead anywhere as a path: out of the current folder, that is."""
    return "/" in text or "\\" in text or text.startswith((".", "~"))
