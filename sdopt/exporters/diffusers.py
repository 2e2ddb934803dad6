"""A diffusers folder as a source: what is in it, and each component as a canonical ONNX graph."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sdopt.errors import SourceError, UnknownNameError, UsageError
from sdopt.exporters import residuals
from sdopt.exporters.checkpoint import Checkpoint, weights_files
from sdopt.exporters.components import (
    COMPONENTS,
    FAMILIES,
    SHARED,
    TOKENIZERS,
    supported,
)
from sdopt.exporters.ports import Component
from sdopt.exporters.recognition import (
    check_config,
    check_controlnet,
    check_pipeline,
    controlled,
    family_name,
    listed,
    read_json,
)
from sdopt.exporters.tokenizer import SharedFile, tokenizer_files
from sdopt.passes.base import Role
from sdopt.spec import suggest

FORMAT = 1
"""Goes into every fingerprint; raised when the exporter writes another graph for one source."""

DTYPES: Mapping[str, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")


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


class DiffusersSource:
    """A folder that diffusers' ``save_pretrained`` wrote, whole, partial, or of one component.

    Args:
        folder: where it lies.
        controlnet: the folder of a ControlNet to put before its UNet.

    Raises:
        SourceError: it is no such folder, or not of a supported family, or the ControlNet is not
            for its UNet.
    """

    def __init__(self, folder: Path | str, controlnet: Path | None = None) -> None:
        self.folder = Path(folder)
        self._controlnet = controlnet
        if not self.folder.is_dir():
            raise SourceError("no such folder", where=str(folder))
        self.index: dict[str, Any] = {}
        if (path := self.folder / "model_index.json").is_file():
            self.index = read_json(path)
            if controlnet is not None:
                self.index = controlled(self.index, self.folder)
            check_pipeline(self.index, self.folder)
        self._family = FAMILIES[family_name(self.folder, self.index)]
        self._configs = {
            component.name: (home, config)
            for component in self._family.components
            if (home := self._folder_of(component)) is not None
            and (config := read_json(home / "config.json")) is not None
            and self._is(component, home, config)
        }
        if not self._configs:
            raise SourceError(
                "no component that can be exported is here",
                where=str(self.folder),
                why=f"looked for {', '.join({c.folder: 0 for c in self._family.components})}"
                " with a config.json each",
                hint=supported(),
            )
        self._pair()

    def _pair(self) -> None:
        """With a ControlNet, check that it is this UNet's, whose graph then takes residuals."""
        if self._controlnet is not None and "controlnet" not in self._configs:
            raise SourceError("this folder holds no ControlNet", where=str(self._controlnet))
        if "unet" not in self._configs:
            return
        home, unet = self._configs["unet"]
        if "controlnet" in self._configs:
            check_controlnet(*self._configs["controlnet"], unet)
        elif not listed(self.index, "controlnet"):
            return
        self._configs["unet"] = home, {**unet, residuals.WANTED: True}

    @property
    def family(self) -> str:
        """``sd3``, ``sdxl``, ``sdxl_refiner``, ``sd1``, or ``sd2``: with OpenCLIP's encoder."""
        if self._family is FAMILIES["sd3"]:
            return "sd3"
        if self._family is FAMILIES["sdxl"]:
            alone = bool(self.index) and not listed(self.index, "text_encoder")
            return "sdxl_refiner" if alone else "sdxl"
        _, encoder = self._configs.get("text_encoder", (None, {}))
        _, unet = self._configs.get("unet", (None, {}))
        second = encoder.get("hidden_act") == "gelu" or unet.get("use_linear_projection")
        return "sd2" if second else "sd1"

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about what is not exported."""
        left = [name for name in _LEFT_OUT if listed(self.index, name)]
        if not left:
            return ()
        return (f"{', '.join(left)} left out: a bundle makes images without checking them",)

    def component_names(self) -> list[str]:
        """The components that can be exported from here, in the order in which they run."""
        return list(self._configs)

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

    def shared_files(self) -> list[SharedFile]:
        """What a bundle needs beside the components: pipeline index, scheduler, tokenizer."""
        if not self.index:
            return []
        index = dict(self.index)
        for name in _LEFT_OUT:
            if name in index:
                index[name] = [None, None]
        if "requires_safety_checker" in index:
            index["requires_safety_checker"] = False
        files = [SharedFile("model_index.json", text=json.dumps(index, indent=2) + "\n")]
        for part in SHARED:
            folder = self.folder / part
            files += [
                SharedFile(f"{part}/{path.name}", source=path.absolute())
                for path in sorted(folder.glob("*"))
                if path.is_file() and not path.name.startswith(".")
            ]
        for part in TOKENIZERS:
            files += tokenizer_files(self.folder / part)
        return files

    def _table(self) -> dict[str, Component]:
        return {component.name: component for component in self._family.components}

    def _component(self, name: str) -> tuple[Path, dict[str, Any]]:
        if name not in COMPONENTS:
            raise UnknownNameError(f"no component {name!r}", hint=suggest(name, COMPONENTS))
        if name not in self._configs:
            raise SourceError(
                f"the component {name} is not here",
                where=str(self.folder),
                hint=f"here are: {', '.join(self._configs)}",
            )
        return self._configs[name]

    def _checkpoint(self, name: str, dtype: str | None) -> Checkpoint:
        folder, _ = self._component(name)
        # Half precision that lies there ready need not be computed.
        ready = weights_files([file.name for file in folder.iterdir()])
        return Checkpoint.open(folder, variant=dtype if dtype in ready else None)

    def _folder_of(self, component: Component) -> Path | None:
        """The component's folder if it is here; the root itself may be that of one component."""
        if component.name == "controlnet" and self._controlnet is not None:
            return self._controlnet if (self._controlnet / "config.json").is_file() else None
        for folder in (self.folder / component.folder, self.folder):
            if (folder / "config.json").is_file():
                return folder
        return None

    def _is(self, component: Component, folder: Path, config: dict[str, Any]) -> bool:
        """Whether ``folder`` holds ``component``; another class in its folder is an error."""
        architectures = config.get("architectures") or [None]
        found = config.get("_class_name") or architectures[0]
        if found in (component.class_name, *component.also):
            check_config(component, folder, config)
            return True
        if folder == self.folder:
            return False
        raise SourceError(
            f"{component.folder} is a {found}, not a {component.class_name}",
            where=str(folder / "config.json"),
            hint=supported(),
        )
