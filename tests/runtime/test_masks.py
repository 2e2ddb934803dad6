"""``run --mask``: what it needs, and inpainting by a bundle that is not made for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

from sdopt.errors import UsageError
from sdopt.runtime.generate import generate
from tests.exporters import families
from tests.exporters.made import copy_of

DRAW: dict[str, Any] = {"steps": 4, "seed": 3}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a pipeline whose UNet has four channels, and its bundle."""
    return copy_of("sd1-ddim", tmp_path_factory)


@pytest.fixture(scope="module")
def bundle(plain: tuple[Path, Path]) -> Path:
    return plain[1]


def as_class(bundle: Path, name: str, to: Path) -> Path:
    """A copy of the bundle whose index names another pipeline."""
    shutil.copytree(bundle, to)
    index = json.loads((to / "model_index.json").read_text())
    (to / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    return to


def picture(width: int = 104, height: int = 72) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def half(width: int = 104, height: int = 72) -> Image.Image:
    """White on the left."""
    values = np.zeros((height, width), np.uint8)
    values[:, : width // 2] = 255
    return Image.fromarray(values)


@pytest.mark.parametrize("strength", [None, 0.5])
def test_the_image_is_that_of_diffusers(plain: tuple[Path, Path], strength: float | None) -> None:
    source, bundle = plain
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(source, safety_checker=None)
    want = families.inpainted(pipeline, picture(), half(), strength or 1.0)
    (got,) = generate(bundle, ["ab"], image=picture(), mask=half(), strength=strength, **DRAW)
    assert got.strength == (strength or 1.0)
    # A last bit of a float may round to another of the 256 values.
    assert np.abs(np.asarray(got.image, float) - want).max() <= 1
    (other,) = generate(bundle, ["ab"], image=picture(), mask=full(), strength=strength, **DRAW)
    assert np.abs(np.asarray(got.image, float) - np.asarray(other.image, float)).max() > 1


def full() -> Image.Image:
    return Image.new("L", (104, 72), 255)


def test_sizes_and_batches(bundle: Path, tmp_path: Path) -> None:
    picture().save(tmp_path / "image.png")
    half().convert("RGB").save(tmp_path / "mask.png")
    files = {"image": tmp_path / "image.png", "mask": tmp_path / "mask.png"}
    sized = {"width": 64, "height": 80}
    one = list(generate(bundle, ["ab"], count=2, **files, **sized, **DRAW))
    two = list(generate(bundle, ["ab"], count=2, batch=2, **files, **sized, **DRAW))
    assert one[0].image.size == (64, 80)
    for alone, together in zip(one, two, strict=True):
        a, b = (np.asarray(each.image, float) for each in (alone, together))
        assert np.abs(a - b).max() <= 1
    assert not np.array_equal(np.asarray(one[0].image), np.asarray(one[1].image))


def test_what_is_missing_is_said(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no image that it lies on"):
        list(generate(bundle, ["a"], mask=half()))
    made_for_it = as_class(bundle, "StableDiffusionInpaintPipeline", tmp_path / "inpaint")
    with pytest.raises(UsageError, match="wants a mask") as caught:
        list(generate(made_for_it, ["a"], image=picture()))
    assert "--mask FILE" in str(caught.value)
    with pytest.raises(UsageError, match="different sizes") as caught:
        list(generate(bundle, ["a"], image=picture(), mask=half(64, 72)))
    assert "the mask is 64x72, the image 104x72" in str(caught.value)


def test_a_file_that_is_no_mask(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_text("no image")
    with pytest.raises(UsageError, match="no image that pillow reads"):
        list(generate(bundle, ["a"], image=picture(), mask=tmp_path / "mask.png"))
    with pytest.raises(UsageError, match="the mask cannot be read"):
        list(generate(bundle, ["a"], image=picture(), mask=tmp_path / "none.png"))


def test_a_family_without_an_inpainting_pipeline(bundle: Path, tmp_path: Path) -> None:
    other = as_class(bundle, "LatentConsistencyModelPipeline", tmp_path / "lcm")
    with pytest.raises(UsageError, match="no pipeline that runs this bundle with image and mask"):
        list(generate(other, ["a"], image=picture(), mask=half(), **DRAW))
