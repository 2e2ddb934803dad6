"""What a bundle has to download: compiled artifacts, and what ``--emit-only`` wrote."""

from __future__ import annotations

from pathlib import Path

from sdopt import artifacts
from sdopt.bundle import Bundle
from sdopt.errors import UnknownNameError
from sdopt.spec import suggest
from sdopt.ui.workspace import Workspace

ARTIFACTS = "artifacts"
_PREFIX = "build-"


def offered(bundle: Bundle) -> list[str]:
    """Names of packages: ``artifacts``, and ``build-TARGET`` per emit-only package."""
    emitted = sorted(path.stem for path in bundle.path.glob(f"{_PREFIX}*.md"))
    return [*([ARTIFACTS] if artifacts.under(bundle.path) else []), *emitted]


def files(bundle: Bundle, name: str) -> list[Path]:
    """The files of a package.

    Raises:
        UnknownNameError: there is no such package.
    """
    known = offered(bundle)
    if name not in known:
        raise UnknownNameError(f"there is no package {name!r}", hint=suggest(name, known))
    if name == ARTIFACTS:
        found = [path for path, _ in artifacts.under(bundle.path)]
        return [*found, *map(artifacts.record_path, found)]
    page = bundle.path / f"{name}.md"
    named = [line.strip() for line in page.read_text("utf-8").splitlines() if line[:4] == "    "]
    return [page, *(bundle.path / one for one in named)]


def zipped(workspace: Workspace, bundle: Bundle, name: str) -> Path:
    """A zip of a package, in the server's own folder.

    Raises:
        UnknownNameError: there is no such package.
        StorageError: it cannot be written.
    """
    return workspace.zipped(files(bundle, name), f"{bundle.path.name}-{name}")
