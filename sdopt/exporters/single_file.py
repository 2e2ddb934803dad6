"""A checkpoint in one safetensors file with the names of latent-diffusion as a source."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from sdopt.errors import SourceError, UsageError
from sdopt.exporters import ldm
from sdopt.exporters.checkpoint import Checkpoint
from sdopt.exporters.clip_vocabulary import clip_tokenizer
from sdopt.exporters.components import FAMILIES
from sdopt.exporters.file_metadata import hints_of, metadata_of, table_of
from sdopt.exporters.identify import refuse_file, refuse_names
from sdopt.exporters.parts import check_class, component_class
from sdopt.exporters.ports import Component
from sdopt.exporters.published import LCM, PUBLISHED
from sdopt.exporters.recognition import check_config, controlled, read_json
from sdopt.exporters.source import OPTIONS, Source
from sdopt.exporters.tokenizer import SharedFile, given_tokenizer
from sdopt.safetensors_header import read_header

_V = ("v", "v_prediction", "v-prediction")


class SingleFileSource(Source):
    """Stable Diffusion 1.x, 2.x or XL in one file; reads its header and nothing from a network.

    Args:
        path: the ``.safetensors`` file.
        supplied: folders of parts that it lacks or that replace its own, by their folder's name
            in a pipeline.
        components: those that are wanted; only their tokenizers need to be there.

    Raises:
        SourceError: it is another kind of file or of another family; says which.
        WeightsError: it is corrupted or truncated.
    """

    def __init__(
        self,
        path: Path | str,
        supplied: Mapping[str, Path] | None = None,
        components: Sequence[str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.folder = self.path.parent
        self.supplied = supplied or {}
        refuse_file(self.path)
        entries, header = read_header(self.path)
        self._whole = Checkpoint(entries, {self.path: header})
        self._metadata = metadata_of(header)
        self._hints = hints_of(self._metadata, self.path)
        self._shapes = {name: entry.shape for name, entry in entries.items()}
        strange = any("joint_blocks." in name or "double_blocks." in name for name in entries)
        if strange or not ldm.inside(self._shapes, ldm.UNET):
            refuse_names(entries, self.path)
        self._name = ldm.family_of(self._shapes, self._config_hints("unet"))
        self._known = PUBLISHED[self._name]
        self._family = FAMILIES[self._known.key]
        self._configs = {
            component.name: found
            for component in self._family.components
            if (found := self._find(component)) is not None
        }
        self._wanted = set(self._configs if components is None else components)
        self._check_unet()
        self._check_parts()
        self._pair(wanted=False)

    def _check_unet(self) -> None:
        """Refuse relatives of the families whose UNets take more.

        Raises:
            SourceError: naming what is known.
        """
        _, unet = self._configs["unet"]
        if unet["in_channels"] not in self._known.pipelines or "label_emb.weight" in ldm.inside(
            self._shapes, ldm.UNET
        ):
            raise SourceError(
                f"a UNet of {unet['in_channels']} input channels is not supported here",
                where=str(self.path),
                why=f"{self._known.title} is known with "
                + ", ".join(map(str, self._known.pipelines)),
                hint="depth and upscaling models take inputs that are not supported",
            )

    @property
    def family(self) -> str:
        """``sd1``, ``sd2``, ``sdxl`` or ``sdxl_refiner``."""
        return self._name

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What the file lacks, and what was chosen where it does not say."""
        found = [
            f"the file holds no {folder}, and the bundle makes no images without one: "
            f"supply it with {OPTIONS[folder]}"
            for folder in self.lacking()
        ]
        if any(name.startswith("model_ema.") for name in self._shapes):
            found.append(
                "the file holds averaged weights (model_ema) too: the plain ones are used"
            )
        if self._name == "sd2" and self._prediction() is None:
            found.append(
                "the file does not say whether it predicts noise or v: taken for v, as 2.1 at 768 "
                "pixels; for 2.x at 512 set prediction_type to epsilon in the bundle's "
                "scheduler/scheduler_config.json"
            )
        return tuple(found)

    def check_in_place(self) -> None:
        """Refuse ``--in-place``: one file holds several components, a folder each is the law.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "--in-place cannot be done with a single file",
            where=str(self.path),
            why="each component's graph lies in a folder of its own, beside its weights, and no "
            "runtime reads weights from outside the graph's folder",
            hint="export with -o BUNDLE: the weights are copied inside the kernel",
        )

    def shared_files(self) -> list[SharedFile]:
        """The pipeline's index and its scheduler, and a tokenizer for each text encoder."""
        index: dict[str, Any] = {"_class_name": self._pipeline(), **self._known.pipeline}
        scheduler = self._scheduler()
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
        files = []
        for component in self._family.components:
            held = component.folder not in self._unused()
            if not component.optional:
                _, config = self._configs.get(component.name, (None, {}))
                named = component_class(component, config) if held else (None, None)
                index[component.folder] = list(named)
        for part, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
            if encoder in index:
                held = encoder not in self._unused()
                index[part] = ["transformers", "CLIPTokenizer"] if held else [None, None]
                if encoder in self._wanted:
                    files += self._tokenizer(part)
        if "controlnet" in self._configs:
            index = controlled(index, self.path)
        return [
            _json("model_index.json", index),
            _json("scheduler/scheduler_config.json", scheduler),
            *files,
        ]

    def _own_checkpoint(self, name: str, dtype: str | None) -> Checkpoint:
        from sdopt.exporters.ldm_weights import convert  # imports torch and diffusers

        if name not in self._converted:
            self._converted[name] = convert(self._whole, name, self._component(name)[1])
        return self._converted[name]

    @cached_property
    def _converted(self) -> dict[str, Checkpoint]:
        return {}

    def _components(self) -> list[Component]:
        return [one for one in self._family.components if one.name in self._configs]

    def _unused(self) -> set[str]:
        """The folders of the family that this model has no use for."""
        return {"text_encoder"} if self._name == "sdxl_refiner" else set()

    def _config_hints(self, folder: str) -> dict[str, Any]:
        found = self._hints["configs"].get(folder, {})
        return dict(found) if isinstance(found, dict) else {}

    def _find(self, component: Component) -> tuple[Path, dict[str, Any]] | None:
        """Where a component lies and its configuration; None if it is neither here nor given."""
        if (given := self.supplied.get(component.folder)) is not None:
            return self._given(component, given)
        hints = self._config_hints(component.folder)
        if component.name == "unet":
            if self._name == "sd2" and self._prediction() == "epsilon":
                hints = {"sample_size": 64, **hints}
            config = ldm.unet_config(self._shapes, self._name, hints, str(self.path))
        elif component.folder == "vae":
            prefix = next((one for one in ldm.VAES if ldm.inside(self._shapes, one)), None)
            if prefix is None:
                return None
            config = ldm.vae_config(ldm.inside(self._shapes, prefix), self._known, hints)
        else:
            found = next(
                (
                    prefix
                    for prefix, (_, name) in ldm.TEXTS.items()
                    if name == component.name and ldm.inside(self._shapes, prefix)
                ),
                None,
            )
            if found is None or component.folder in self._unused():
                return None
            shapes = ldm.inside(self._shapes, found)
            config = ldm.text_config(shapes, component.name, self._known, hints)
        check_config(component, self.path, config)
        return self.path, config

    def _given(self, component: Component, folder: Path) -> tuple[Path, dict[str, Any]] | None:
        path = folder / "config.json"
        if not path.is_file():
            return None
        config = read_json(path)
        check_class(component, path, config)
        return folder, config

    def _pipeline(self) -> str:
        _, unet = self._configs["unet"]
        if unet.get("time_cond_proj_dim") and self._known.key == "sd":
            return "LatentConsistencyModelPipeline"
        return self._known.pipelines[unet["in_channels"]]

    def _prediction(self) -> str | None:
        """``epsilon`` or ``v_prediction`` where the file says it."""
        if own := self._own_scheduler():
            return str(own.get("prediction_type", "epsilon"))
        said = str(self._metadata.get("modelspec.prediction_type", "")).lower()
        architecture = str(self._metadata.get("modelspec.architecture", ""))
        if "v_pred" in self._shapes or said in _V or "-v2-768-v" in architecture:
            return "v_prediction"
        told = said in ("epsilon", "eps") or "-v2-512" in architecture
        first = f"{ldm.UNET}input_blocks.0.0.weight"
        told |= ldm.size(self._shapes, first, 1) != 4  # for inpainting
        return "epsilon" if told else None

    def _own_scheduler(self) -> dict[str, Any]:
        text = self._hints["files"].get("scheduler/scheduler_config.json")
        table = table_of(text, self.path) if text is not None else {}
        return table if isinstance(table.get("_class_name"), str) else {}

    def _scheduler(self) -> dict[str, Any]:
        """The schedule in the file's metadata, else the family's as it was published."""
        if own := self._own_scheduler():
            return own
        config: dict[str, Any] = dict(self._known.scheduler)
        if self._pipeline().startswith("LatentConsistency"):
            config = dict(LCM)
        default = "v_prediction" if self._name == "sd2" else "epsilon"
        config["prediction_type"] = self._prediction() or default
        if "ztsnr" in self._shapes:
            config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return config

    def _tokenizer(self, part: str) -> list[SharedFile]:
        if (given := self.supplied.get("tokenizer")) is not None:
            return given_tokenizer(given, part)
        own = {p: t for p, t in self._hints["files"].items() if p.startswith(f"{part}/")}
        if own:
            return [SharedFile(path, text=text) for path, text in own.items()]
        return clip_tokenizer(part, pad_with_zero=self._name == "sd2" or part == "tokenizer_2")


def _json(path: str, table: Mapping[str, Any]) -> SharedFile:
    return SharedFile(path, text=json.dumps(table, indent=2, sort_keys=True) + "\n")
