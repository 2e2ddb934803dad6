from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdopt.bundle import Bundle
from sdopt.errors import (
    BundleError,
    MissingDependencyError,
    SpecError,
    StorageError,
    UnknownNameError,
    UsageError,
)
from sdopt.manifest import Step
from sdopt.runtime import generate as generating
from sdopt.runtime.generate import Generated, generate, save_png
from sdopt.runtime.pipeline import load_pipeline
from sdopt.runtime.schedulers import SCHEDULERS
from sdopt.runtime.session import choose_stages, opener
from tests.runtime import toy

SMALL = {"steps": 2, "width": 32, "height": 24}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return toy.bundle(tmp_path_factory.mktemp("toy") / "bundle")


def pixels(images: Sequence[Generated]) -> list[np.ndarray]:
    return [np.asarray(one.image, np.int16) for one in images]


def log(told: list[tuple[str, float]]) -> Callable[[str, float], None]:
    return lambda what, share: told.append((what, share))


def draw(bundle: Bundle, prompts: Sequence[str], **options: Any) -> list[Generated]:
    return list(generate(bundle, prompts, **{**SMALL, **options}))


def test_every_image_has_a_seed_and_no_batch_changes_it(bundle: Bundle) -> None:
    prompts = ["a handwritten seven", "a handwritten four"]
    together = draw(bundle, prompts, count=3, batch=4, seed=10)
    assert [one.seed for one in together] == [10, 11, 12, 13, 14, 15]
    assert [one.prompt for one in together] == [prompts[0]] * 3 + [prompts[1]] * 3
    apart = draw(bundle, prompts, count=3, batch=1, seed=10)
    for one, other in zip(pixels(together), pixels(apart), strict=True):
        assert np.abs(one - other).max() <= 1
    (alone,) = draw(bundle, prompts[1:], seed=13)
    assert np.abs(pixels([alone])[0] - pixels(together)[3]).max() <= 1


def test_seed_prompt_negative_and_guidance_all_count(bundle: Bundle) -> None:
    def one(**options: Any) -> np.ndarray:
        prompt = options.pop("prompt", "a handwritten seven")
        return pixels(draw(bundle, [prompt], **options))[0]

    first = one()
    np.testing.assert_array_equal(one(), first)
    for other in (
        {"seed": 1},
        {"prompt": "a handwritten four"},
        {"negative": "a handwritten nine"},
        {"guidance": 1.0},
        {"steps": 3},
        {"scheduler": "euler_a"},
    ):
        assert np.abs(one(**other) - first).max() > 1, other


def test_it_is_lazy_and_tells_its_progress(bundle: Bundle) -> None:
    told: list[tuple[str, float]] = []

    def tell(what: str, share: float) -> None:
        told.append((what, share))

    images = generate(bundle, ["a", "b", "c"], batch=2, progress=tell, **SMALL)
    assert told == []
    next(images)
    assert told == [
        ("images 1 to 2 of 3, step 1 of 2", 0.25),
        ("images 1 to 2 of 3, step 2 of 2", 0.5),
    ]
    assert len(list(images)) == 2
    assert told[-1] == ("image 3 of 3, step 2 of 2", 1.0)


def test_the_size_is_the_models_own_unless_asked(bundle: Bundle) -> None:
    (one,) = generate(bundle, ["a"], steps=1)
    assert one.image.size == (128, 128)
    assert (one.width, one.height) == (128, 128)


@pytest.mark.parametrize("size", [(8, 8), (8, 136), (72, 40)])
def test_any_multiple_of_eight(bundle: Bundle, size: tuple[int, int]) -> None:
    (one,) = draw(bundle, ["a"], width=size[0], height=size[1], steps=1)
    assert one.image.size == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 100}, "width must be a multiple of 8 pixels, not 100.*96 or 104"),
        ({"height": 7}, "height must be a multiple of 8 pixels, not 7.*nearest: 8 "),
        ({"height": -8}, "height must be a multiple of 8 pixels"),
        ({"steps": 0}, "steps must be 1 or more"),
        ({"count": 0}, "count must be 1 or more"),
        ({"batch": -1}, "batch must be 1 or more"),
        ({"seed": -1}, "the seed must be 0 or more"),
        ({"target": "ort,ort"}, "one at a time"),
    ],
)
def test_what_cannot_be_is_refused(bundle: Bundle, options: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, SpecError)) as caught:
        draw(bundle, ["a"], **options)
    assert re.search(message, str(caught.value), re.DOTALL)
    assert caught.value.exit_code == 2


def test_prompts_must_be_some(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="no prompt"):
        draw(bundle, [])
    with pytest.raises(UsageError, match="list of texts"):
        draw(bundle, "a handwritten seven")


def start(width: int = 32, height: int = 24) -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def test_image_to_image(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "start.png"
    start().save(path)
    options: dict[str, Any] = {"width": None, "height": None, "steps": 10}
    (near,) = draw(bundle, ["a"], image=path, strength=0.2, **options)
    (far,) = draw(bundle, ["a"], image=start(), strength=1.0, **options)
    assert near.image.size == far.image.size == (32, 24)
    assert (near.strength, far.strength) == (0.2, 1.0)
    assert np.abs(pixels([near])[0] - pixels([far])[0]).max() > 1
    told: list[str] = []
    tell = lambda what, share: told.append(what)  # noqa: E731 - one line, used once
    draw(bundle, ["a"], image=start(), strength=0.35, progress=tell, **options)
    assert told[-1] == "image 1 of 1, step 3 of 3"


def test_a_start_image_is_resized_to_the_size_asked_for(bundle: Bundle) -> None:
    (one,) = draw(bundle, ["a"], image=start(50, 30), width=48, height=40, strength=0.9)
    assert one.image.size == (48, 40)
    with pytest.raises(UsageError, match="width must be a multiple of 8 pixels, not 50"):
        draw(bundle, ["a"], image=start(50, 30), width=None, height=None)


@pytest.mark.parametrize(
    ("strength", "message"),
    [(0.0, "strength must be"), (1.5, "strength must be"), (0.3, "nothing to do")],
)
def test_a_strength_that_cannot_be(bundle: Bundle, strength: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        draw(bundle, ["a"], image=start(), strength=strength)


def test_a_start_image_that_is_none(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        draw(bundle, ["a"], image=tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(UsageError, match="no image that pillow reads"):
        draw(bundle, ["a"], image=tmp_path / "text.png")


def test_a_png_says_what_made_it(bundle: Bundle, tmp_path: Path) -> None:
    (one,) = draw(bundle, ["eine Sieben — 七"], negative="Löcher", seed=7, guidance=3.5)
    save_png(one, tmp_path / "one.png")
    read = Image.open(tmp_path / "one.png")
    np.testing.assert_array_equal(np.asarray(read), np.asarray(one.image))
    assert read.text == {
        "prompt": "eine Sieben — 七",
        "negative": "Löcher",
        "seed": "7",
        "steps": "2",
        "guidance": "3.5",
        "scheduler": "DPMSolverMultistepScheduler",
        "size": "24x32",
        "stages": "text_encoder@model, unet@model, vae_decoder@model",
        "bundle": one.bundle,
    }
    (same,) = draw(bundle, ["a"])
    assert same.bundle == one.bundle
    (other,) = draw(bundle, ["a"], image=start())
    assert other.bundle != one.bundle  # the encoder counts too
    assert other.text()["strength"] == "0.8"


def test_a_png_that_cannot_be_written(bundle: Bundle, tmp_path: Path) -> None:
    (one,) = draw(bundle, ["a"])
    with pytest.raises(StorageError):
        save_png(one, tmp_path / "no" / "folder.png")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_scheduler_runs(bundle: Bundle, name: str) -> None:
    (one,) = draw(bundle, ["a"], scheduler=name, steps=4)
    assert one.scheduler == SCHEDULERS[name][0]
    assert np.isfinite(np.asarray(one.image, np.float32)).all()


def test_a_scheduler_whose_package_is_missing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    class Dummy:
        """What diffusers puts in the place of a class that needs scipy where there is none."""

        def __init__(self) -> None:
            raise ImportError("LMSDiscreteScheduler requires the scipy library")

    monkeypatch.setattr(diffusers, "LMSDiscreteScheduler", Dummy)
    with pytest.raises(MissingDependencyError, match="the scheduler lms needs scipy"):
        draw(bundle, ["a"], scheduler="lms")


def test_an_unknown_scheduler(bundle: Bundle) -> None:
    with pytest.raises(UnknownNameError) as caught:
        draw(bundle, ["a"], scheduler="eular")
    assert "did you mean euler" in str(caught.value)


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_a_missing_component(tmp_path: Path, component: str) -> None:
    made = toy.bundle(tmp_path / "bundle", without=(component,))
    with pytest.raises(BundleError) as caught:
        draw(made, ["a"])
    assert f"this bundle has no {component}" in str(caught.value)
    assert f"--component {component}" in str(caught.value)


def test_the_encoder_is_needed_from_an_image_only(tmp_path: Path) -> None:
    made = toy.bundle(tmp_path / "bundle", without=("vae_encoder",))
    assert len(draw(made, ["a"])) == 1
    with pytest.raises(BundleError, match="image-to-image encodes"):
        draw(made, ["a"], image=start())


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("model_index.json", "no readable model_index.json"),
        ("scheduler/scheduler_config.json", "no readable scheduler/scheduler_config.json"),
    ],
)
def test_a_missing_file(tmp_path: Path, lost: str, message: str) -> None:
    made = toy.bundle(tmp_path / "bundle")
    (made.path / lost).unlink()
    with pytest.raises(BundleError, match=message):
        draw(made, ["a"])


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    made = toy.bundle(tmp_path / "bundle")
    (made.path / "tokenizer").rename(tmp_path / "away")
    with pytest.raises(BundleError, match="no tokenizer"):
        draw(made, ["a"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("_class_name", "FluxPipeline", "cannot run a FluxPipeline"),
        ("scheduler", ["diffusers", "NoSuchScheduler"], "has no scheduler NoSuchScheduler"),
        ("scheduler", ["diffusers", "UNet2DConditionModel"], "has no scheduler UNet2D"),
    ],
)
def test_a_pipeline_that_is_another(tmp_path: Path, key: str, value: Any, message: str) -> None:
    made = toy.bundle(tmp_path / "bundle")
    index = json.loads((made.path / "model_index.json").read_text())
    (made.path / "model_index.json").write_text(json.dumps({**index, key: value}))
    with pytest.raises(BundleError, match=message):
        draw(made, ["a"])


def test_which_stage_runs(tmp_path: Path) -> None:
    made = toy.bundle(tmp_path / "bundle")
    target = opener("ort")

    def chosen(stage: str | None = None) -> dict[str, str]:
        found = choose_stages(made, target, stage, image_to_image=False)
        return {name: one.name for name, one in found.items()}

    assert set(chosen().values()) == {"model"}
    toy.restage(made, "unet", "ort_cpu")
    assert chosen()["unet"] == "ort_cpu"
    # What was optimized after it was built is newer than the build.
    toy.restage(made, "unet", "optimized", (Step("clean", "exact"),))
    assert chosen() == {
        "text_encoder": "model",
        "unet": "optimized",
        "vae_decoder": "model",
    }
    digest = made.stage("unet", "optimized").digest
    toy.restage(made, "unet", "ort_cpu", source_stage="optimized", source=digest)
    assert chosen()["unet"] == "ort_cpu"
    assert chosen("optimized")["unet"] == "optimized"
    assert chosen("model")["unet"] == "model"
    # A build of what is no longer there is not run.
    toy.restage(made, "unet", "ort_cpu", source_stage="optimized", source="another digest")
    assert chosen()["unet"] == "optimized"
    with pytest.raises(UnknownNameError) as caught:
        chosen("optimised")
    assert "did you mean optimized" in str(caught.value)


def test_the_pipeline_is_diffusers_own(bundle: Bundle) -> None:
    from diffusers import (
        DDIMScheduler,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionPipeline,
    )

    import sdopt

    pipeline = sdopt.load_pipeline(bundle.path)
    assert type(pipeline) is StableDiffusionPipeline
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    images = pipeline("a", num_inference_steps=2, num_images_per_prompt=2, height=16, width=16)
    assert len(images.images) == 2
    other = load_pipeline(bundle, image_to_image=True, scheduler="ddim", target="ort:threads=1")
    assert type(other) is StableDiffusionImg2ImgPipeline
    assert type(other.scheduler) is DDIMScheduler


def test_the_defaults_are_those_of_the_command_line() -> None:
    import inspect

    from sdopt.cli import generate as command

    ours = inspect.signature(generating.generate).parameters
    theirs = inspect.signature(command.run).parameters
    for name in ("steps", "guidance", "seed", "count", "batch", "strength", "target"):
        assert ours[name].default == theirs[name].default, name
