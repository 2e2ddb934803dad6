"""What every source is: components with configurations and checkpoints, and each as a graph."""

from __future__ import annotations

import abc
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sdopt.errors import SourceError, UnknownNameError, UsageError
from sdopt.exporters import controlnet_file, residuals
from sdopt.exporters.checkpoint import Checkpoint, weights_files
from sdopt.exporters.components import COMPONENTS, Family
from sdopt.exporters.parts import check_widths
from sdopt.exporters.ports import Component
from sdopt.exporters.recognition import check_controlnet
from sdopt.exporters.tokenizer import SharedFile
from sdopt.passes.base import Role
from sdopt.spec import suggest

FORMAT = 2
"""Goes into every fingerprint; raised when the exporter writes another graph for one source."""

DTYPES: Mapping[str, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}
OPTIONS: Mapping[str, str] = {
    "text_encoder": "--text-encoder DIR",
    "text_encoder_2": "--text-encoder-2 DIR",
    "vae": "--vae DIR",
    "controlnet": "--controlnet DIR|FILE",
    "tokenizer": "--tokenizer DIR",
}
"""Folders of a pipeline that may be supplied from elsewhere, and the option that does it."""


@dataclass(frozen=True)
class Exported:
    """One component as a graph.

    Attributes:
        name: the component's folder in a bundle.
        role: what it is for.
        model: the graph; its weights are ranges of the checkpoint, or lazy casts of them.
        config: the component's ``config.json``.
        fingerprint: a digest of what it was made from.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
    """

    name: str
    role: Role
    model: ir.Model = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    fingerprint: str
    dtype: str


class Source(abc.ABC):
    """A pipeline that can be exported; where its parts lie is what the kinds differ in.

    Attributes:
        folder: the folder of its files.
        supplied: parts that come from other folders, by their folder in a pipeline.
    """

    folder: Path
    supplied: Mapping[str, Path]
    _family: Family
    _configs: dict[str, tuple[Path, dict[str, Any]]]
    _control_file: Checkpoint | None = None

    @property
    @abc.abstractmethod
    def family(self) -> str:
        """The family's name in a bundle's manifest."""

    @property
    @abc.abstractmethod
    def notes(self) -> tuple[str, ...]:
        """What a user should know about what is not exported, and what was assumed."""

    @abc.abstractmethod
    def shared_files(self) -> list[SharedFile]:
        """What a bundle needs beside the components: pipeline index, scheduler, tokenizer."""

    @abc.abstractmethod
    def check_in_place(self) -> None:
        """Refuse ``--in-place`` where the weights do not lie in the components' own folders.

        Raises:
            SourceError, UsageError: saying why, and what to do.
        """

    def _own_checkpoint(self, name: str, dtype: str | None) -> Checkpoint:
        """The weights of a component that was not supplied from elsewhere."""
        return _open(self._component(name)[0], dtype)

    def component_names(self) -> list[str]:
        """The components that can be exported from here, in the order in which they run."""
        return list(self._configs)

    def lacking(self) -> tuple[str, ...]:
        """Folders of a pipeline of this family that are neither here nor supplied."""
        needed = {one.folder for one in self._family.components if not one.optional}
        known = self._table()
        return tuple(
            sorted(needed - self._unused() - {known[one].folder for one in self._configs})
        )

    def _unused(self) -> set[str]:
        """The folders of the family that this model has no use for."""
        return set()

    def config(self, name: str) -> dict[str, Any]:
        """A component's configuration.

        Raises:
            SourceError, UnknownNameError: it is not here, or there is no such component.
        """
        return dict(self._component(name)[1])

    def mixes(self, name: str, dtype: str | None = None) -> list[str]:
        """The float dtypes that a component's weights are in, the most frequent first."""
        sizes = Counter(
            {
                kind: sum(math.prod(one.shape) for one in entries)
                for kind, entries in self._by_dtype(name, dtype).items()
            }
        )
        return [str(kind.numpy()) for kind, _ in sizes.most_common()]

    def dtype_of(self, name: str, dtype: str | None = None) -> str:
        """The dtype that ``name`` is exported in: the one asked for, else the checkpoint's.

        Raises:
            UsageError: a dtype that is not fp32, fp16 or bf16, or none asked for and the
                checkpoint's is none of them.
        """
        if dtype is None:
            kind = self._checkpoint(name, dtype).dtype
            names = [short for short, one in DTYPES.items() if one == kind]
            if not names:
                raise UsageError(
                    f"{name} is saved as {kind.name}",
                    hint=f"choose a dtype to export it in: {', '.join(DTYPES)}",
                )
            return names[0]
        if dtype not in DTYPES:
            raise UsageError(f"{dtype!r} is no dtype", hint=f"choose one of {', '.join(DTYPES)}")
        return dtype

    def fingerprint(self, name: str, dtype: str | None = None) -> str:
        """A digest of what ``export(name, dtype)`` would read; reads no weights whole."""
        _, config = self._component(name)
        chosen = self.dtype_of(name, dtype)
        parts = [FORMAT, name, chosen, config, self._checkpoint(name, dtype).fingerprint()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def remarks(self, names: Sequence[str], dtype: str | None = None) -> list[str]:
        """The notes, and of each component whose weights are of several dtypes, which."""
        found = list(self.notes)
        for name in names:
            kinds = self.mixes(name, dtype)
            if len(kinds) > 1:
                found.append(
                    f"{name}: the checkpoint mixes {' and '.join(kinds)}; "
                    f"all of it is exported in {self.dtype_of(name, dtype)}"
                )
        return found

    def export(self, name: str, dtype: str | None = None) -> Exported:
        """Trace ``name`` and point its weights at the checkpoint; no weight is read.

        Raises:
            SourceError: the component is not here, or its checkpoint and its configuration do not
                fit each other.
            WeightsError: a weights file is corrupted or truncated.
        """
        from sdopt.exporters.binding import bind, match  # torch takes seconds to import
        from sdopt.exporters.modules import build
        from sdopt.exporters.trace import trace

        folder, config = self._component(name)
        checkpoint = self._checkpoint(name, dtype)
        chosen = self.dtype_of(name, dtype)
        digest = self.fingerprint(name, dtype)
        component, kind = self._table()[name], DTYPES[chosen]
        network = build(component, config, kind)
        keys = match(network.shapes(), network.tied(), checkpoint, str(folder))
        model = trace(component, network, kind)
        bind(model, keys, checkpoint, kind)
        return Exported(name, component.role, model, dict(config), digest, chosen)

    def _by_dtype(self, name: str, dtype: str | None) -> dict[ir.DataType, list[Any]]:
        found: dict[ir.DataType, list[Any]] = {}
        for entry in self._checkpoint(name, dtype).entries.values():
            if entry.dtype.is_floating_point():
                found.setdefault(entry.dtype, []).append(entry)
        return found

    def _table(self) -> dict[str, Component]:
        return {component.name: component for component in self._family.components}

    def _component(self, name: str) -> tuple[Path, dict[str, Any]]:
        if name not in COMPONENTS:
            raise UnknownNameError(f"no component {name!r}", hint=suggest(name, COMPONENTS))
        if name not in self._configs:
            option = OPTIONS.get(COMPONENTS[name].folder)
            supply = f"; supply it: {option}" if option and name in self._table() else ""
            raise SourceError(
                f"the component {name} is not here",
                where=str(self.folder),
                hint=f"here are: {', '.join(self._configs)}{supply}",
            )
        return self._configs[name]

    def _checkpoint(self, name: str, dtype: str | None) -> Checkpoint:
        folder, _ = self._component(name)
        if self._control_file is not None and name == "controlnet":
            return self._control_file
        if COMPONENTS[name].folder in self.supplied:
            return _open(folder, dtype)
        return self._own_checkpoint(name, dtype)

    def _check_parts(self) -> None:
        """Refuse parts that do not fit each other, and folders given for what they do not hold.

        Raises:
            SourceError: a folder that is not what it was given for, or of another width.
        """
        file = self.supplied.get("controlnet")
        if file is not None and file.is_file() and "unet" in self._configs:
            config, self._control_file = controlnet_file.read(file, self._configs["unet"][1])
            found = {**self._configs, "controlnet": (file, config)}
            self._configs = {name: found[name] for name in self._table() if name in found}
        for part, folder in self.supplied.items():
            names = [one.name for one in self._family.components if one.folder == part]
            if (
                part in OPTIONS
                and part != "tokenizer"
                and not any(n in self._configs for n in names)
            ):
                raise SourceError(
                    f"no {part} can be taken from this folder",
                    where=str(folder),
                    why=f"the family has no {part}" if not names else "it has no config.json",
                    hint=f"{OPTIONS[part]} takes a folder that save_pretrained wrote",
                )
        check_widths({name: config for name, (_, config) in self._configs.items()})

    def _pair(self, wanted: bool) -> None:
        """With a ControlNet, check that it is this UNet's, whose graph then takes residuals.

        Args:
            wanted: whether the UNet's graph does so although no ControlNet is here.

        Raises:
            SourceError: the ControlNet is for another model.
        """
        if "unet" not in self._configs:
            return
        home, unet = self._configs["unet"]
        if "controlnet" in self._configs:
            check_controlnet(*self._configs["controlnet"], unet)
        elif not wanted:
            return
        self._configs["unet"] = home, {**unet, residuals.WANTED: True}


def _open(folder: Path, dtype: str | None) -> Checkpoint:
    # Half precision that lies there ready need not be computed.
    ready = weights_files([file.name for file in folder.iterdir()])
    return Checkpoint.open(folder, variant=dtype if dtype in ready else None)
