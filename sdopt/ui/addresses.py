"""Requests that go to public addresses only, whatever a name, a redirect or a resolver says."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator

import httpx

from sdopt.errors import FetchError, UsageError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_COMPATIBLE = ipaddress.IPv6Network("::/96")


class RefusedAddressError(FetchError):
    """A URL that leads to this machine or to a network that is not public."""

    exit_code = 2


def parsed(url: str) -> httpx.URL:
    """A URL that can be asked for.

    Raises:
        UsageError: another scheme, or none; the text is not shown, as it may hold a password.
    """
    try:
        found = httpx.URL(url.strip())
    except httpx.InvalidURL:
        raise UsageError("this is no URL", hint="give one that starts with https://") from None
    if found.scheme not in ("http", "https") or not found.host:
        raise UsageError(
            "only http and https URLs are fetched",
            where=found.scheme or None,
            hint="give one that starts with https://",
        )
    return found


def is_public(address: Address) -> bool:
    """Whether an address, and each IPv4 address that is written in it, is of the public net."""
    return all(one.is_global and not one.is_multicast for one in _meant(address))


def _meant(address: Address) -> Iterator[Address]:
    """What packets to ``address`` may reach: itself, and IPv4 addresses that stand in it."""
    if isinstance(address, ipaddress.IPv4Address):
        yield address
        return
    translated = address.ipv4_mapped or (_last_bits(address) if address in _NAT64 else None)
    if translated is not None:
        yield translated
        return
    yield address
    tunnels = (address.sixtofour, *(address.teredo or ()))
    yield from (one for one in tunnels if one is not None)
    if address in _COMPATIBLE:
        yield _last_bits(address)


def _last_bits(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)


def resolve(host: str, port: int) -> list[Address]:
    """The addresses of a host, as the system resolves it, in its order.

    Raises:
        FetchError: there is no such host.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise FetchError(
            f"there is no host {host}",
            why=getattr(error, "strerror", None) or str(error),
            hint="check the URL, and that this machine is online",
        ) from None
    texts = dict.fromkeys(str(item[4][0]).partition("%")[0] for item in found)
    return [ipaddress.ip_address(text) for text in texts]


def checked(host: str, port: int, allow_private: bool) -> list[Address]:
    """The addresses of a host, all of which a request may go to.

    Raises:
        RefusedAddressError: one of them is not public.
        FetchError: there is no such host.
    """
    found = resolve(host, port)
    if not allow_private and not all(map(is_public, found)):
        raise RefusedAddressError(
            "this URL leads to an address that is not public",
            where=host,
            why="this machine and its network are not to be reached through the page",
            hint="start sdopt ui with --allow-private-urls where that is meant",
        )
    return found


class CheckedTransport(httpx.BaseTransport):
    """Connects to the very address that was checked, for the request and every redirect.

    The name goes into the Host header, and into TLS, whose certificate is checked against it; it
    is not resolved a second time. Connections are not kept, so none is used for another name.
    """

    def __init__(self, allow_private: bool, inner: httpx.BaseTransport | None = None) -> None:
        limits = httpx.Limits(max_keepalive_connections=0)
        self._inner = inner or httpx.HTTPTransport(trust_env=False, limits=limits)
        self._allow_private = allow_private

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request to the first address of its host that answers."""
        url = request.url
        if url.scheme not in ("http", "https"):
            raise RefusedAddressError(
                "only http and https URLs are fetched", where=f"{url.scheme}://{url.host}"
            )
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        *others, last = checked(_host(url), port, self._allow_private)
        for address in others:
            try:
                return self._send(request, address)
            except httpx.ConnectError:
                continue
        return self._send(request, last)

    def close(self) -> None:
        """Close what is open."""
        self._inner.close()

    def _send(self, request: httpx.Request, address: Address) -> httpx.Response:
        pinned = httpx.Request(
            request.method,
            request.url.copy_with(host=str(address)),
            headers=request.headers,
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": _host(request.url)},
        )
        return self._inner.handle_request(pinned)


def _host(url: httpx.URL) -> str:
    """The host in ASCII, as resolvers and certificates have it."""
    return url.raw_host.decode("ascii")
