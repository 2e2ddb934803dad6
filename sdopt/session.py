"""What anything that computes a graph looks like: named arrays in, named arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sdopt.errors import UsageError


@dataclass(frozen=True)
class Port:
    """One input or output: its dtype, and per axis a size or the name of a dynamic one."""

    dtype: np.dtype
    dims: tuple[int | str, ...]


class Session(Protocol):
    """An opened graph."""

    @property
    def inputs(self) -> Mapping[str, Port]:
        """The inputs, in order."""

    @property
    def outputs(self) -> Mapping[str, Port]:
        """The outputs, in order."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute every output; float feeds are cast to the declared dtype."""


class Wrapped:
    """A session around another one, of which it has the ports; subclasses say what runs."""

    def __init__(self, session: Session) -> None:
        self.session = session

    @property
    def inputs(self) -> Mapping[str, Port]:
        """Those of the session."""
        return self.session.inputs

    @property
    def outputs(self) -> Mapping[str, Port]:
        """Those of the session."""
        return self.session.outputs


def checked_feeds(
    ports: Mapping[str, Port], feeds: Mapping[str, np.ndarray], where: str
) -> dict[str, np.ndarray]:
    """``feeds`` in the declared dtypes, contiguous, one for every port.

    Raises:
        UsageError: an unknown or missing name, another rank, another size in a fixed axis, or
            numbers of another kind (float for int).
    """
    if ports.keys() != feeds.keys():
        raise UsageError(
            f"the graph takes {_names(ports)}, not {_names(feeds)}",
            where=where,
            hint="feed exactly the inputs of the graph",
        )
    return {name: _checked(name, port, feeds[name], where) for name, port in ports.items()}


def _checked(name: str, port: Port, feed: np.ndarray, where: str) -> np.ndarray:
    array = np.asarray(feed)
    fits = array.ndim == len(port.dims) and all(
        isinstance(dim, str) or dim == size
        for dim, size in zip(port.dims, array.shape, strict=True)
    )
    if not fits:
        raise UsageError(
            f"the input {name!r} is {_shape(port.dims)}, and was given {_shape(array.shape)}",
            where=where,
        )
    if array.dtype == port.dtype:
        return array.copy() if not array.flags.c_contiguous else array
    # ml_dtypes' bfloat16 is of kind "V" to numpy, so a float is told by what it is not.
    if (port.dtype.kind in "iub") != (array.dtype.kind in "iub"):
        raise UsageError(
            f"the input {name!r} holds {port.dtype}, and was given {array.dtype}", where=where
        )
    return array.astype(port.dtype, order="C")


def _names(known: Mapping[str, object]) -> str:
    return ", ".join(known) or "nothing"


def _shape(dims: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, dims))}]"
