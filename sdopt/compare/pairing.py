"""What two sides have in common: components, inputs, and how far they may be apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdopt.compare import inputs
from sdopt.compare.hooks import Hooks, load
from sdopt.compare.sides import Opened, Side, side
from sdopt.errors import UnknownNameError, UsageError
from sdopt.manifest import Step
from sdopt.recorded import Recording, open_recording
from sdopt.report import Progress, part
from sdopt.spec import parse, suggest
from sdopt.tolerance import Change, Intent, Numerics, Tolerance, between

Feeds = dict[str, np.ndarray]

SAMPLES = 8
"""Recorded samples that are compared, where there are more."""


@dataclass(frozen=True)
class Asked:
    """What both sides are to be fed.

    Attributes:
        seed: of inputs that are made up.
        sizes: of dynamic dimensions by name.
        hooks: what makes other inputs of them, and of the outputs.
        recording: recorded inputs, in place of made ones.
        samples: of the recorded ones at most so many, evenly chosen.
    """

    seed: int
    sizes: Mapping[str, int]
    hooks: Hooks
    recording: Recording | None = None
    samples: int = SAMPLES

    @classmethod
    def of(
        cls,
        seed: int,
        sizes: Mapping[str, int] | None,
        hooks: str | None,
        recorded: str | Path | None,
        samples: int,
    ) -> Asked:
        """From the options of a comparison.

        Raises:
            UsageError: options that exclude each other, or a number that cannot be.
            BundleError: no recording there.
        """
        if samples < 1:
            raise UsageError(f"samples must be 1 or more, not {samples}")
        if recorded is not None and sizes:
            raise UsageError(
                "recorded inputs have sizes of their own",
                hint="leave --dim out, or record at that size: sdopt record --width --height",
            )
        around = load(hooks) if hooks is not None else Hooks("")
        recording = open_recording(recorded) if recorded is not None else None
        return cls(seed, sizes or {}, around, recording, samples)

    def feeds(self, a: Opened, b: Opened) -> list[Feeds]:
        """What both take: one made-up set of inputs, or each recorded sample.

        Raises:
            UsageError: no input fits both, or nothing was recorded for these.
        """
        ports_a, ports_b = a.ports or b.ports, b.ports or a.ports
        if ports_a is None or ports_b is None:
            raise UsageError(
                "two checkpoints have no graph to compare",
                where=f"{a.label} and {b.label}",
                hint="export one of them: sdopt export SOURCE -o BUNDLE",
            )
        ports = inputs.agreed_ports(ports_a, ports_b, (a.label, b.label))
        if self.recording is not None:
            found = inputs.recorded(self.recording, ports, self.samples)
            return [self.hooks.before(one) for one in found]
        limits = {
            dim: min(size, inputs.SIZES[dim])
            for dim, size in {**a.sizes, **b.sizes}.items()
            if any(dim in port.dims for port in ports.values())
        }
        vocabularies = {
            key: min(one.vocabularies[key] for one in (a, b) if key in one.vocabularies)
            for key in {*a.vocabularies, *b.vocabularies}
        }
        made = inputs.make(ports, self.seed, {**limits, **self.sizes}, vocabularies)
        return [self.hooks.before(made)]

    def has(self, one: Opened) -> bool:
        """Whether there is anything to feed it: always, but for a recording of others."""
        return (
            self.recording is None
            or one.ports is None
            or bool(self.recording.of(frozenset(one.ports)))
        )


def opened_pairs(
    a: str | Path,
    b: str | Path,
    target: str,
    components: Sequence[str] | None,
    progress: Progress | None,
) -> tuple[Iterator[tuple[str, Opened, Opened, Progress]], tuple[str, ...]]:
    """Each component of both, opened when it is its turn, and the names of those left out.

    Raises:
        UsageError: the two have nothing in common.
        UnknownNameError: a component or stage that is not there.
    """
    left, right = side(a, target), side(b, target)
    found, skipped = _pairs(left, right, components or None)

    def pairs() -> Iterator[tuple[str, Opened, Opened, Progress]]:
        for index, (name_a, name_b) in enumerate(found):
            name = name_b if left.anonymous else name_a
            tell = part(progress, index, len(found))
            tell(name, 0.0)
            yield name, left.components[name_a](name_a), right.components[name_b](name_b), tell

    return pairs(), skipped


def _pairs(
    left: Side, right: Side, asked: Sequence[str] | None
) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """The names on both sides of what is compared, and the components left out."""
    if left.anonymous or right.anonymous:
        named = right if left.anonymous else left
        (file,) = (left if left.anonymous else right).components
        if not (left.anonymous and right.anonymous):
            if asked is None and len(named.components) > 1:
                raise UsageError(
                    "which component is this file?",
                    where=(left if left.anonymous else right).label,
                    hint=f"name it: --component {' or '.join(named.components)}",
                )
            (other,) = _known(named, asked or list(named.components))
        else:
            (other,) = named.components
        return [(file, other) if left.anonymous else (other, file)], ()
    shared = [name for name in left.components if name in right.components]
    if asked is not None:
        _known(left, asked)
        _known(right, asked)
        return [(name, name) for name in asked], ()
    if not shared:
        raise UsageError(
            "these two have no component in common",
            where=f"{left.label} and {right.label}",
            why=f"{', '.join(left.components)} against {', '.join(right.components)}",
            hint="adopt a file as what it is: sdopt adopt FILE.onnx --component unet",
        )
    skipped = {*left.components, *right.components} - set(shared)
    return [(name, name) for name in shared], tuple(sorted(skipped))


def _known(one: Side, asked: Sequence[str]) -> Sequence[str]:
    for name in asked:
        if name not in one.components:
            raise UnknownNameError(
                f"there is no {name!r} to compare",
                where=one.label,
                hint=suggest(name, one.components),
            )
    return asked


def passes_between(a: Opened, b: Opened) -> tuple[Step, ...]:
    """The passes that only one of the two went through; with another file it is another pass."""
    shared = 0
    if a.origin is not None and a.origin == b.origin:
        for one, other in zip(a.history, b.history, strict=False):
            if (one.spec, one.reads) != (other.spec, other.reads):
                break
            shared += 1
    return a.history[shared:] + b.history[shared:]


def tolerance_of(a: Opened, b: Opened) -> Tolerance:
    """The distance that the passes between two sides allow."""
    changes = [
        Change(parse(step.spec)[0].name, Numerics(step.numerics), Intent(step.intent))
        for step in passes_between(a, b)
    ]
    if a.origin is None or a.origin != b.origin:
        # Two exporters, or PyTorch's own kernels.
        changes.append(Change("another origin", Numerics.REASSOCIATED))
    return between(changes, a.dtypes | b.dtypes)
