"""One user and a password from a file; wrong guesses are slowed down and then refused."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sdopt.errors import UsageError

DELAY_SECONDS = 0.5
"""How long the answer to a wrong password takes."""
GUESSES = 10
"""Wrong ones from one address, after which it is refused."""
REFUSED_SECONDS = 60.0
_MOST_ADDRESSES = 10_000
_SHORTEST = 8


@dataclass(frozen=True)
class Account:
    """The user that may connect."""

    user: str
    password: bytes = field(repr=False)

    @classmethod
    def read(cls, text: str) -> Account:
        """The account that ``USER:FILE`` says.

        Raises:
            UsageError: it says none, or others can read the file, or what it holds is too short.
        """
        user, colon, name = text.partition(":")
        if not colon or not user or not name or not user.isprintable():
            raise UsageError(
                "this says no user and no file with a password",
                hint="write --auth USER:FILE; the password stands in FILE, and in no command line",
            )
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError(
                "there is no such password file",
                where=str(path),
                hint=f"make one: (umask 077; openssl rand -base64 18 > {path})",
            )
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise UsageError(
                    "others can read the password file",
                    where=str(path),
                    why=f"its mode is {mode:03o}",
                    hint=f"chmod 600 {path}",
                )
            password = file.read(4096).strip(b"\r\n")
        if len(password) < _SHORTEST:
            raise UsageError(
                "the password is too short",
                where=str(path),
                why=f"it has fewer than {_SHORTEST} characters",
                hint=f"make another: (umask 077; openssl rand -base64 18 > {path})",
            )
        return cls(user, password)

    def accepts(self, header: str) -> bool:
        """Whether an ``Authorization: Basic`` header is of this user; takes equally long."""
        kind, _, text = header.partition(" ")
        try:
            given = base64.b64decode(text.strip(), validate=True)
        except (binascii.Error, ValueError):
            given = b""
        given = given if kind.lower() == "basic" else b""
        user, _, password = given.partition(b":")
        right_user = _equal(user, self.user.encode())
        right_password = _equal(password, self.password)
        return right_user and right_password


@dataclass
class Guesses:
    """Counts wrong passwords by where they come from."""

    clock: Callable[[], float] = time.monotonic
    _wrong: dict[str, tuple[int, float]] = field(default_factory=dict)

    def is_refused(self, client: str) -> bool:
        """Whether an address guessed too often, too lately."""
        count, last = self._wrong.get(_network(client), (0, 0.0))
        return count >= GUESSES and self.clock() - last < REFUSED_SECONDS

    def wrong(self, client: str) -> None:
        """Count one; older than the time of refusal they are forgotten."""
        now, key = self.clock(), _network(client)
        if len(self._wrong) >= _MOST_ADDRESSES:
            self._wrong = {k: v for k, v in self._wrong.items() if now - v[1] < REFUSED_SECONDS}
        count, last = self._wrong.get(key, (0, now))
        self._wrong[key] = (count + 1 if now - last < REFUSED_SECONDS else 1, now)

    def right(self, client: str) -> None:
        """Forget those of an address that knows the password."""
        self._wrong.pop(_network(client), None)


def _equal(one: bytes, other: bytes) -> bool:
    """Compares in a time that tells neither where they differ nor how long they are."""
    digests = (hashlib.sha256(text).digest() for text in (one, other))
    return hmac.compare_digest(*digests)


def _network(client: str) -> str:
    """An IPv4 address, or the /64 that one customer has of IPv6."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))
    return str(address)
