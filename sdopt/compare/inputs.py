"""Seeded inputs made from what a graph says that it takes."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from sdopt.errors import UsageError
from sdopt.recorded import HOW, Recording
from sdopt.session import Port
from sdopt.shapes import number_of

SIZES: Mapping[str, int] = {
    "batch_size": 2,
    "sequence_length": 77,
    "height": 16,
    "width": 24,
    "latent_height": 16,
    "latent_width": 24,
    "sample_height": 128,
    "sample_width": 192,
}
"""Sizes of the dynamic dimensions by name. Height and width differ: mixing them up must show."""

_BY_RANK: Mapping[int, tuple[int, ...]] = {
    1: (2,),
    2: (2, 77),
    3: (2, 77, 32),
    4: (2, 4, 16, 24),
}
"""Sizes of dynamic dimensions whose name says nothing, by rank and axis."""

_FEW = 10
"""Integers are drawn below this where the graph does not say how many it knows."""

TRAINED_TIMESTEPS = 1000


def agreed_ports(
    a: Mapping[str, Port], b: Mapping[str, Port], labels: tuple[str, str]
) -> dict[str, Port]:
    """The inputs that both sides take: a fixed size of either side binds the other.

    Raises:
        UsageError: other names, ranks, kinds or fixed sizes, so that no input fits both.
    """
    where = f"{labels[0]} and {labels[1]}"
    if a.keys() != b.keys():
        raise UsageError(
            "these two have different inputs",
            where=where,
            why=f"{', '.join(a)} against {', '.join(b)}",
            hint="compare two forms of one component",
        )
    ports = {}
    for name, left in a.items():
        right = b[name]
        fits = len(left.dims) == len(right.dims) and all(
            isinstance(one, str) or isinstance(other, str) or one == other
            for one, other in zip(left.dims, right.dims, strict=True)
        )
        if not fits or (left.dtype.kind in "iub") != (right.dtype.kind in "iub"):
            raise UsageError(
                f"the input {name!r} of one does not fit the other",
                where=where,
                why=f"{_said(left)} against {_said(right)}",
            )
        dims = tuple(
            one if isinstance(one, int) else other
            for one, other in zip(left.dims, right.dims, strict=True)
        )
        narrow = min((left.dtype, right.dtype), key=lambda dtype: dtype.itemsize)
        ports[name] = Port(narrow, dims)
    return ports


def make(
    ports: Mapping[str, Port],
    seed: int,
    sizes: Mapping[str, int],
    vocabularies: Mapping[str, int],
) -> dict[str, np.ndarray]:
    """One array per input, each from a generator of its own.

    Latents and embeddings are normal, pixels (three channels) normal and clipped to -1 to 1, a
    timestep is one of those trained on, and integers are below the input's vocabulary. Floats are
    rounded to the port's dtype, so that two sides of unequal precision get the same numbers.

    Raises:
        UsageError: ``sizes`` names a dimension that no input has.
    """
    names = {dim for port in ports.values() for dim in port.dims if isinstance(dim, str)}
    if unknown := sizes.keys() - names:
        raise UsageError(
            f"no input has a dimension {', '.join(sorted(unknown))}",
            hint=f"dynamic dimensions: {', '.join(sorted(names)) or 'none'}",
        )
    chosen = {**SIZES, **_of_images(ports), **sizes}
    for port in ports.values():
        defaults = _BY_RANK.get(len(port.dims), ())
        for axis, dim in enumerate(port.dims):
            if isinstance(dim, str):
                number = defaults[axis] if axis < len(defaults) else 2
                chosen.setdefault(dim, _part(dim, chosen) or number)
    return {
        name: _array(
            name,
            port,
            [dim if isinstance(dim, int) else chosen[dim] for dim in port.dims],
            seed,
            vocabularies,
        )
        for name, port in ports.items()
    }


def recorded(
    recording: Recording, ports: Mapping[str, Port], samples: int
) -> list[dict[str, np.ndarray]]:
    """Recorded inputs of exactly these ports, ``samples`` of them evenly over the recording.

    Raises:
        UsageError: nothing was recorded of a component with these inputs.
        BundleError: a sample cannot be read.
    """
    known = recording.of(frozenset(ports))
    if not known:
        counts = ", ".join(f"{count} of {name}" for name, count in recording.counts().items())
        raise UsageError(
            "nothing was recorded of a component with these inputs",
            where=str(recording.folder),
            why=f"it takes {', '.join(ports)}; recorded are {counts}",
            hint=HOW,
        )
    few = min(samples, len(known))
    chosen = sorted({round(i * (len(known) - 1) / max(1, few - 1)) for i in range(few)})
    found = []
    for sample in (known[index] for index in chosen):
        arrays = recording.load(sample)
        found.append({name: arrays[name].astype(port.dtype) for name, port in ports.items()})
    return found


def _part(dim: str, chosen: Mapping[str, int]) -> int | None:
    """The size of a dimension that is a part of a known one (``height_div_2``)."""
    try:
        return number_of(dim, chosen)
    except KeyError:
        return None


def _of_images(ports: Mapping[str, Port]) -> dict[str, int]:
    """Sizes of the dynamic sides of images (three channels), which count pixels by any name.

    They are multiples of 64, since detectors halve an image five or six times.
    """
    found: dict[str, int] = {}
    for port in ports.values():
        if len(port.dims) == 4 and port.dims[1] == 3:
            sides = ("sample_height", "sample_width")
            pairs = zip(port.dims[2:], sides, strict=True)
            found |= {dim: SIZES[side] for dim, side in pairs if isinstance(dim, str)}
    return found


def _array(
    name: str, port: Port, shape: list[int], seed: int, vocabularies: Mapping[str, int]
) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if "timestep" in name:
        return np.full(shape, rng.integers(1, TRAINED_TIMESTEPS)).astype(port.dtype)
    if port.dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(port.dtype)
    if port.dtype.kind in "iu":
        return rng.integers(0, vocabularies.get(name, _FEW), shape).astype(port.dtype)
    values = rng.standard_normal(shape)
    if len(shape) == 4 and shape[1] == 3:
        values = np.clip(values, -1, 1)
    return values.astype(port.dtype)


def _said(port: Port) -> str:
    return f"{port.dtype} [{', '.join(map(str, port.dims))}]"
