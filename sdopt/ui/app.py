"""What the page is given: the folder it works in, the queue it fills, and how it was started."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdopt.errors import UsageError

if TYPE_CHECKING:
    from sdopt.ui.jobs import JobQueue
    from sdopt.ui.workspace import Workspace

PORT = 7860
MAX_UPLOAD_BYTES = 50 * 10**9


@dataclass(frozen=True)
class Settings:
    """How the server is started.

    Attributes:
        root: the folder that it works in.
        host: the address or name that it listens on.
        port: 0 takes a free one.
        auth: ``USER:FILE``, where FILE holds the password; needed where others can connect.
        max_upload_bytes: of an uploaded or downloaded model at most.
        allow_private_urls: whether URLs may lead to this machine and its network.
        names: names under which the server is reached, beside addresses and ``host``: that of a
            proxy in front of it, for example.
    """

    root: Path
    host: str = "127.0.0.1"
    port: int = PORT
    auth: str | None = None
    max_upload_bytes: int = MAX_UPLOAD_BYTES
    allow_private_urls: bool = False
    names: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)

    def check(self) -> None:
        """Refuse to be open to others without a password.

        Raises:
            UsageError: saying what to give.
        """
        if not self.is_local and self.auth is None:
            raise UsageError(
                f"on {self.host} others can connect, and there is no password",
                hint="give one: --auth USER:PASSWORD-FILE; or leave --host away, and reach it "
                f"from elsewhere with ssh -L {self.port or PORT}:127.0.0.1:{self.port or PORT}",
            )


def is_loopback(host: str) -> bool:
    """Whether a host, as it stands in a URL or an option, is this machine's own address."""
    text = host.removeprefix("[").removesuffix("]")
    if text.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(text).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class App:
    """What ``sdopt.ui.page.build`` makes a page of; ``queue`` is a ``sdopt.ui.jobs.JobQueue``."""

    workspace: Workspace
    queue: JobQueue
    settings: Settings
