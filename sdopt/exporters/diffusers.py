"""A diffusers folder as a source: what is in it, and where."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from sdopt.errors import SourceError, UsageError
from sdopt.exporters.components import (
    FAMILIES,
    SHARED,
    TOKENIZERS,
    supported,
)
from sdopt.exporters.parts import check_class, component_class
from sdopt.exporters.ports import Component
from sdopt.exporters.recognition import (
    check_config,
    check_pipeline,
    class_of,
    controlled,
    family_name,
    listed,
    read_json,
)
from sdopt.exporters.source import Source
from sdopt.exporters.tokenizer import (
    CLIP,
    SharedFile,
    folder_files,
    given_tokenizer,
    tokenizer_files,
)

_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")


class DiffusersSource(Source):
    """A folder that diffusers' ``save_pretrained`` wrote, whole, partial, or of one component.

    Args:
        folder: where it lies.
        supplied: folders of parts that are taken in place of its own, by their name in it.

    Raises:
        SourceError: it is no such folder, or not of a supported family, or the ControlNet is not
            for its UNet.
    """

    def __init__(self, folder: Path | str, supplied: Mapping[str, Path] | None = None) -> None:
        self.folder = Path(folder)
        self.supplied = supplied or {}
        if not self.folder.is_dir():
            raise SourceError("no such folder", where=str(folder))
        self.index: dict[str, Any] = {}
        if (path := self.folder / "model_index.json").is_file():
            self.index = read_json(path)
            if "controlnet" in self.supplied:
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
                hint=self._single_files() or supported(),
            )
        self._check_parts()
        self._pair(listed(self.index, "controlnet"))

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

    def _unused(self) -> set[str]:
        """What the index says that the pipeline has none of, as XL's refiner."""
        if not self.index:
            return set()
        return {
            one.folder for one in self._family.components if not listed(self.index, one.folder)
        }

    def check_in_place(self) -> None:
        """Refuse ``--in-place`` in a Hub cache, and where a part comes from another folder.

        Raises:
            SourceError, UsageError: saying why, and what to do.
        """
        if self.supplied:
            raise UsageError(
                "--in-place takes no parts from other folders",
                where=", ".join(map(str, self.supplied.values())),
                why="the graphs would lie beside the weights of another model",
                hint="export with -o BUNDLE, which copies the weights inside the kernel",
            )
        if any(path.is_symlink() for path in self.folder.glob("*/*.safetensors")):
            raise SourceError(
                "--in-place is refused in a Hugging Face cache",
                where=str(self.folder),
                why="its weight files are links out of their folder, which no runtime follows",
                hint="export with -o BUNDLE, which copies the weights inside the kernel",
            )

    def shared_files(self) -> list[SharedFile]:
        """What a bundle needs beside the components: pipeline index, scheduler, tokenizer."""
        if not self.index:
            return []
        index = dict(self.index)
        for name in _LEFT_OUT:
            if name in index:
                index[name] = [None, None]
        for component in self._family.components:
            if component.folder in self.supplied:
                _, config = self._component(component.name)
                index[component.folder] = list(component_class(component, config))
        if "requires_safety_checker" in index:
            index["requires_safety_checker"] = False
        files = [SharedFile("model_index.json", text=json.dumps(index, indent=2) + "\n")]
        given = self.supplied.get("tokenizer")
        for part in SHARED:
            if given is None or part not in CLIP:
                files += folder_files(self.folder / part, part)
                files += tokenizer_files(self.folder / part) if part in TOKENIZERS else []
            elif listed(self.index, part):
                files += given_tokenizer(given, part)
        return files

    def _single_files(self) -> str:
        """A hint where the folder holds single files, which are sources of their own."""
        files = sorted(path.name for path in self.folder.glob("*.safetensors"))
        return f"give the file itself: {self.folder / files[0]}" if files else ""

    def _folder_of(self, component: Component) -> Path | None:
        """The component's folder if it is here; the root itself may be that of one component."""
        if (other := self.supplied.get(component.folder)) is not None:
            return other if (other / "config.json").is_file() else None
        for folder in (self.folder / component.folder, self.folder):
            if (folder / "config.json").is_file():
                return folder
        return None

    def _is(self, component: Component, folder: Path, config: dict[str, Any]) -> bool:
        """Whether ``folder`` holds ``component``; another class in its folder is an error."""
        if folder == self.folder and class_of(config) not in component.classes:
            return False
        check_class(component, folder / "config.json", config)
        check_config(component, folder, config)
        return True
