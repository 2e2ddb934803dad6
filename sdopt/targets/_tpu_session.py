"""A .bmodel opened by Sophgo's simulator: exact arithmetic of the chip, seconds per call."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdopt import artifacts
from sdopt.errors import BuildError, BundleError, UsageError
from sdopt.session import Port, checked_feeds
from sdopt.targets._tpu_tools import Tools


class BmodelSession:
    """A bmodel with its record beside it, under the names of the graph it was made from."""

    def __init__(self, path: Path, tools: Tools) -> None:
        self._path, self._tools = path, tools
        facts = _facts(path)
        self.inputs: Mapping[str, Port] = _ports(facts["inputs"])
        self.outputs: Mapping[str, Port] = _ports(facts["outputs"])
        self._sizes = [
            {name: tuple(shape) for name, shape in one.items()} for one in facts["sizes"]
        ]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute every output on the simulator; outputs come in the graph's dtypes.

        Raises:
            UsageError: feeds that are not the graph's inputs, or of none of the compiled sizes.
            BuildError: the simulator failed.
        """
        arrays = checked_feeds(self.inputs, feeds, str(self._path))
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes not in self._sizes:
            raise UsageError(
                f"this bmodel was not compiled for {_said(shapes)}",
                where=str(self._path),
                why="; ".join(f"it takes {_said(one)}" for one in self._sizes),
                hint="build it for that size too: --shapes",
            )
        with tempfile.TemporaryDirectory(prefix="sdopt-tpu-") as name:
            folder = Path(name)
            # The simulator writes a copy and its inputs beside the file that it is given.
            (folder / "model.bmodel").symlink_to(self._path.absolute())
            given = {key: np.atleast_1d(array) for key, array in arrays.items()}
            np.savez(folder / "in.npz", allow_pickle=False, **given)
            words = ("--input", "in.npz", "--model", "model.bmodel", "--output", "out.npz")
            self._tools.run("model_runner", words, folder, lambda line: None)
            with np.load(folder / "out.npz", allow_pickle=False) as found:
                values = [found[key] for key in found.files]
        if len(values) != len(self.outputs):
            raise BuildError(
                f"the simulator gave {len(values)} outputs, and {len(self.outputs)} are due",
                where=str(self._path),
            )
        # The compiler renames outputs (out_sample_Conv_f32) and keeps their order.
        return {
            name: value.astype(port.dtype, copy=False)
            for (name, port), value in zip(self.outputs.items(), values, strict=True)
        }


def _facts(path: Path) -> dict[str, Any]:
    found = artifacts.recorded(path)
    if found is None or not {"inputs", "outputs", "sizes"} <= found.facts.keys():
        raise BundleError(
            "this bmodel's record is missing, or of other bytes",
            where=str(artifacts.record_path(path)),
            why="it says which names and sizes the bmodel has",
            hint="build it again: sdopt build BUNDLE --target tpu",
        )
    return found.facts


def _ports(known: list[tuple[str, str, list[int | str]]]) -> dict[str, Port]:
    return {name: Port(np.dtype(kind), tuple(dims)) for name, kind, dims in known}


def _said(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
