"""CLIP score: the cosine between what CLIP makes of an image and of its prompt, from -1 to 1."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdopt.errors import MissingDependencyError, UsageError
from sdopt.evaluating import openclip
from sdopt.evaluating.openclip import Model

if TYPE_CHECKING:
    from PIL.Image import Image

_DIGITS = 16
_OURS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_OTHERS = ("preprocessor_config.json", "tokenizer.json", "vocab.json", "merges.txt")
_BICUBIC = 3
"""Of Pillow's filters; the number stands in preprocessor_config.json."""


@dataclass(frozen=True)
class Preprocessing:
    """An image to what CLIP takes: shortest side to ``size``, its middle, scaled and shifted.

    Attributes:
        size: pixels of the shortest side.
        crop: height and width that are cut out.
        mean: of red, green and blue from 0 to 1.
        std: likewise.
        filter: of Pillow, by number.
    """

    size: int
    crop: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    filter: int = _BICUBIC

    def __call__(self, images: Sequence[Image]) -> np.ndarray:
        """``[B, 3, height, width]`` in float32."""
        return np.stack([self._one(image.convert("RGB")) for image in images])

    def _one(self, image: Image) -> np.ndarray:
        from PIL import Image as Pillow

        short = min(image.size)
        scaled = tuple(int(self.size * side / short) for side in image.size)
        height, width = self.crop
        left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
        small = image.resize((scaled[0], scaled[1]), Pillow.Resampling(self.filter))
        pixels = np.asarray(small.crop((left, top, left + width, top + height)), np.float32)
        normal: np.ndarray = (pixels / 255 - np.array(self.mean)) / np.array(self.std)
        return normal.transpose(2, 0, 1).astype(np.float32)


class ClipScorer:
    """CLIP from a folder: transformers' CLIPModel, or OpenCLIP's file with its configuration.

    The prompt is cut at CLIP's 77 tokens, as everywhere.

    Raises:
        UsageError: the folder holds no CLIP.
        MissingDependencyError: torch or transformers is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._is_open = False
        if _is_clip(self.folder / "config.json"):
            files = [path for path in map(self.folder.joinpath, _OURS) if path.is_file()][:1]
            files += sorted(self.folder.glob("model-*.safetensors"))
        else:
            files = []
        if not files and openclip.is_folder(self.folder):
            files, self._is_open = openclip.files(self.folder), True
        if not files:
            raise UsageError(
                "this folder holds no CLIP",
                where=str(self.folder),
                why="a config.json of model_type clip with model.safetensors, or "
                f"{openclip.CONFIG} with {openclip.WEIGHTS[0]}, would be one",
                hint="download one, e.g. openai/clip-vit-base-patch32, and give its folder",
            )
        self._files = [*files, self.folder / "config.json", *map(self.folder.joinpath, _OTHERS)]
        for package in ("torch", "transformers"):
            if importlib.util.find_spec(package) is None:
                raise MissingDependencyError(
                    f"CLIP scores need {package}", hint='pip install "sdopt[ort]"'
                )

    @property
    def name(self) -> str:
        """The folder's name."""
        return f"CLIP score of {self.folder.resolve().name}"

    @functools.cached_property
    def digest(self) -> str:
        """Of every file that decides a score, weights included."""
        state = hashlib.sha256()
        for path in sorted({path for path in self._files if path.is_file()}):
            with path.open("rb") as file:
                state.update(f"{path.name}\0".encode())
                state.update(hashlib.file_digest(file, "sha256").digest())
        return state.hexdigest()[:_DIGITS]

    def score(self, images: list[Image], prompts: list[str]) -> list[float]:
        """The cosine of each image with its prompt."""
        import torch

        model, tokenizer, prepare = self._loaded
        ids = tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).input_ids
        pixels = torch.from_numpy(prepare(images))
        with torch.inference_mode():
            found = model(input_ids=ids.to(model.device), pixel_values=pixels.to(model.device))
        cosines = (found.image_embeds * found.text_embeds).sum(-1)
        return [float(one) for one in cosines]

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any, Preprocessing]:
        import torch

        loaded: Model = openclip.load(self.folder) if self._is_open else _load(self.folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = loaded.model.to(device).float().eval()
        size = model.config.vision_config.image_size
        prepare = _preprocessing(loaded.preprocessing, size, str(self.folder))
        return model, loaded.tokenizer, prepare


def _is_clip(config: Path) -> bool:
    if not config.is_file():
        return False
    try:
        found = json.loads(config.read_text("utf-8"))
    except ValueError as error:
        raise UsageError(
            "this configuration is no JSON", where=str(config), why=str(error)
        ) from error
    return isinstance(found, dict) and found.get("model_type") == "clip"


def _load(folder: Path) -> Model:
    from transformers import CLIPModel, CLIPTokenizer

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(
            "transformers cannot load this CLIP", where=str(folder), why=str(error)
        ) from error
    path = folder / "preprocessor_config.json"
    return Model(model, tokenizer, json.loads(path.read_text("utf-8")) if path.is_file() else {})


def _preprocessing(config: Mapping[str, Any], image_size: int, where: str) -> Preprocessing:
    """From preprocessor_config.json; what that leaves out is CLIP's own.

    Raises:
        UsageError: it says something that CLIP's preprocessing is not.
    """
    off = [key for key, value in config.items() if key.startswith("do_") and value is False]
    size = config.get("size", image_size)
    short = size.get("shortest_edge") if isinstance(size, dict) else size
    crop = config.get("crop_size", image_size)
    area = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
    if off or not isinstance(short, int) or max(area) > short:
        raise UsageError(
            "this preprocessing is not CLIP's",
            where=f"{where}/preprocessor_config.json",
            why=f"{off[0]} is false" if off else f"size is {size} and crop_size {crop}",
            hint="score with a function of yours: --scorer FILE.py:FUNCTION",
        )
    return Preprocessing(
        short,
        area,
        tuple(config.get("image_mean", openclip.MEAN)),
        tuple(config.get("image_std", openclip.STD)),
        int(config.get("resample", _BICUBIC)),
    )
