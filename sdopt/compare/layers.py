"""Where two graphs of a model part: the error of every layer that both have, in graph order."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sdopt.compare.figures import Figures, figures, worst
from sdopt.compare.layer_report import LayerComparison, LayerError
from sdopt.compare.looking import Inside, Layer
from sdopt.compare.pairing import SAMPLES, Asked, Feeds, opened_pairs, tolerance_of
from sdopt.compare.sides import Opened
from sdopt.errors import UsageError, storage_error
from sdopt.report import Progress


def compare_layers(
    a: str | Path,
    b: str | Path,
    *,
    components: Sequence[str] | None = None,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    target: str = "ort",
    hooks: str | None = None,
    recorded: str | Path | None = None,
    samples: int = SAMPLES,
    progress: Progress | None = None,
) -> tuple[LayerComparison, ...]:
    """Compare two things layer by layer; the arguments are those of ``compare``.

    Layers are matched by module path; graphs that know no modules by the names of values. Graphs
    are run in pieces by onnxruntime's CPU, PyTorch's modules by hooks: no more than a piece and
    its weights is in memory, and what ``b`` gave waits on disk until ``a`` gives the same layer.

    Raises:
        UsageError: a pair that cannot be compared, or a side that cannot be looked into.
        UnknownNameError, BundleError, BuildError, StorageError: see ``compare``.
    """
    asked = Asked.of(seed, sizes, hooks, recorded, samples)
    pairs, _ = opened_pairs(a, b, target, components, progress)
    found = []
    for name, left, right, tell in pairs:
        if components or (asked.has(left) and asked.has(right)):
            found.append(_compared(name, left, right, asked, tell))
    return tuple(found)


def _compared(
    name: str, a: Opened, b: Opened, asked: Asked, progress: Progress
) -> LayerComparison:
    feeds = asked.feeds(a, b)
    inside_a, inside_b = _inside(a), _inside(b)
    # PyTorch's modules do not say what feeds what: the other side is a graph, which does.
    wired = inside_a if inside_a.wired else inside_b
    shared = [layer for layer in wired.layers if layer in inside_a.layers.keys() & inside_b.layers]
    names = _once(wired, shared)
    errors, reshaped = _errors(inside_a, inside_b, names, feeds, progress)
    depths = {layer: depth for depth, layer in enumerate(wired.layers)}
    by_value = {one.value: one for one in wired.layers.values()}
    fed: dict[str, float] = {}
    layers = []
    for layer in (one for one in names if one in errors):
        known = wired.layers[layer]
        before = _fed(known.value, by_value, fed)
        one = LayerError(layer, depths[layer], known.op, errors[layer], before)
        fed[known.value] = one.error
        layers.append(one)
    return LayerComparison(
        component=name,
        a=a.label,
        b=b.label,
        allowed=tolerance_of(a, b).relative_l2,
        samples=len(feeds),
        layers=tuple(layers),
        reshaped=tuple(reshaped),
        only_a=len(inside_a.layers) - len(shared),
        only_b=len(inside_b.layers) - len(shared),
    )


def _inside(one: Opened) -> Inside:
    if one.inside is None:
        raise UsageError(
            "the layers of this artifact cannot be looked at",
            where=one.label,
            why="its compiler fused them",
            hint="compare the graph that it was built from: BUNDLE@STAGE",
        )
    return one.inside()


def _once(inside: Inside, names: Sequence[str]) -> list[str]:
    """One name per value, the innermost module's, which says most of where it is."""
    found: dict[str, str] = {}
    for name in names:
        value = inside.layers[name].value
        if value not in found or len(name) > len(found[value]):
            found[value] = name
    return list(found.values())


def _fed(value: str, by_value: Mapping[str, Layer], errors: Mapping[str, float]) -> float:
    """The largest error that comes in, looking through layers that were not compared."""
    stack, seen, most = list(by_value[value].before), set[str](), 0.0
    while stack:
        one = stack.pop()
        if one in seen:
            continue
        seen.add(one)
        if one in errors:
            most = max(most, errors[one])
        elif one in by_value:
            stack += by_value[one].before
    return most


def _errors(
    a: Inside, b: Inside, names: Sequence[str], feeds: Sequence[Feeds], progress: Progress
) -> tuple[dict[str, Figures], list[str]]:
    """The figures of each layer, the worst of all samples, and the layers whose shapes differ."""
    found: dict[str, Figures] = {}
    reshaped: dict[str, None] = {}
    total = 2 * len(names) * len(feeds)
    with tempfile.TemporaryDirectory(prefix="sdopt-layers-") as folder:
        files: dict[tuple[int, str], Path] = {}
        for number, layer, array in b.look(feeds, names):
            path = files[number, layer] = Path(folder) / f"{len(files)}.npy"
            try:
                np.save(path, array, allow_pickle=False)
            except OSError as error:
                raise storage_error(error, "keep a layer on disk until it is compared") from error
            progress(f"b: {layer}", len(files) / total)
        done = 0
        for number, layer, array in a.look(feeds, names):
            done += 1
            progress(f"a: {layer}", 0.5 + done / total)
            if (number, layer) not in files:
                continue
            path = files.pop((number, layer))
            other = np.load(path, mmap_mode="r", allow_pickle=False)
            if other.shape == array.shape:
                one = figures(layer, array, other)
                found[layer] = worst([one, found[layer]]) if layer in found else one
            else:
                reshaped[layer] = None
            del other
            path.unlink()
    return {layer: one for layer, one in found.items() if layer not in reshaped}, list(reshaped)
