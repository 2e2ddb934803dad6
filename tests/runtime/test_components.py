"""The adapters in the place of diffusers' models, which then have no way to tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image

from sdopt.errors import BundleError, UsageError
from sdopt.runtime.components import TextEncoder, Unet, Vae
from sdopt.session import Port
from tests.exporters import tiny

FLOAT = np.dtype(np.float32)


class TorchSession:
    """A PyTorch module as a session, so that adapters are compared with what they stand for."""

    def __init__(
        self, inputs: dict[str, Port], outputs: list[str], call: Callable[..., Any]
    ) -> None:
        self.inputs = inputs
        self.outputs = {name: Port(FLOAT, ("?",)) for name in outputs}
        self._call = call

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            found = self._call(**{k: torch.from_numpy(np.array(v)) for k, v in feeds.items()})
        return {name: one.numpy() for name, one in zip(self.outputs, found, strict=True)}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StableDiffusionPipeline]:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save(folder / "pipeline", folder / "tokenizer")
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "pipeline", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stand_ins(reference: StableDiffusionPipeline) -> dict[str, Any]:
    """The adapters over the reference's own modules."""
    unet, vae, text = reference.unet, reference.vae, reference.text_encoder
    latent = Port(FLOAT, ("b", 4, "h", "w"))
    return {
        "text_encoder": TextEncoder(
            TorchSession(
                {"input_ids": Port(np.dtype(np.int64), ("b", "s"))},
                ["last_hidden_state", "pooler_output"],
                lambda input_ids: text(input_ids)[:2],
            ),
            text.config.to_dict(),
        ),
        "unet": Unet(
            TorchSession(
                {
                    "sample": latent,
                    "timestep": Port(FLOAT, ()),
                    "encoder_hidden_states": Port(FLOAT, ("b", "s", 24)),
                },
                ["out_sample"],
                lambda **feeds: unet(**feeds, return_dict=False),
            ),
            dict(unet.config),
        ),
        "vae": Vae(
            TorchSession(
                {"latent_sample": latent},
                ["sample"],
                lambda latent_sample: vae.decode(latent_sample, return_dict=False),
            ),
            TorchSession(
                {"sample": Port(FLOAT, ("b", 3, "h", "w"))},
                ["latent_parameters"],
                lambda sample: [vae.encode(sample).latent_dist.parameters],
            ),
            dict(vae.config),
        ),
    }


def ours(reference: StableDiffusionPipeline, cls: type = StableDiffusionPipeline) -> Any:
    pipeline = cls(
        **stand_ins(reference),
        tokenizer=reference.tokenizer,
        scheduler=reference.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_text_to_image_is_the_reference_bit_for_bit(
    reference: StableDiffusionPipeline, guidance: float
) -> None:
    def draw(pipeline: Any) -> np.ndarray:
        images: np.ndarray = pipeline(
            ["ab q", "c"],
            negative_prompt=["", "d"],
            num_inference_steps=3,
            guidance_scale=guidance,
            height=72,
            width=40,
            generator=seeds(3, 4),
            output_type="np",
        ).images
        return images

    wanted = draw(reference)
    assert wanted.shape == (2, 72, 40, 3)
    assert wanted.std() > 0.01
    np.testing.assert_array_equal(draw(ours(reference)), wanted)


def test_image_to_image_is_the_reference_bit_for_bit(reference: StableDiffusionPipeline) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    start = Image.fromarray(pixels)
    theirs = StableDiffusionImg2ImgPipeline(**reference.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)

    def draw(pipeline: Any) -> np.ndarray:
        images: np.ndarray = pipeline(
            ["ab", "c"],
            image=[start, start],
            strength=0.6,
            num_inference_steps=5,
            generator=seeds(1, 2),
            output_type="np",
        ).images
        return images

    wanted = draw(theirs)
    assert wanted.shape == (2, 64, 48, 3)
    np.testing.assert_array_equal(draw(ours(reference, StableDiffusionImg2ImgPipeline)), wanted)


def test_what_models_answer_without_return_dict(reference: StableDiffusionPipeline) -> None:
    parts = stand_ins(reference)
    latent = torch.randn(1, 4, 8, 8)
    assert parts["vae"].decode(latent).sample.shape == (1, 3, 64, 64)
    assert parts["vae"].decode(latent, return_dict=False)[0].shape == (1, 3, 64, 64)
    image = torch.randn(1, 3, 64, 64)
    assert parts["vae"].encode(image).latent_dist.sample().shape == (1, 4, 8, 8)
    assert parts["vae"].encode(image, return_dict=False)[0].mean.shape == (1, 4, 8, 8)
    text = torch.zeros(1, 24, dtype=torch.int64)
    assert parts["text_encoder"](text)[0].shape == (1, 24, 24)
    step = parts["unet"](latent, 5, parts["text_encoder"](text)[0])
    assert step.sample.shape == latent.shape


def unet_that_takes(timestep: Port) -> tuple[Unet, list[np.ndarray]]:
    seen: list[np.ndarray] = []

    class Recording:
        inputs: Mapping[str, Port] = {
            "sample": Port(FLOAT, ("b", 4, "h", "w")),
            "timestep": timestep,
            "encoder_hidden_states": Port(FLOAT, ("b", "s", 8)),
        }
        outputs: Mapping[str, Port] = {"out_sample": Port(FLOAT, ("b", 4, "h", "w"))}

        def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            seen.append(feeds["timestep"])
            return {"out_sample": feeds["sample"]}

    return Unet(Recording(), {}), seen


@pytest.mark.parametrize(
    ("port", "given", "fed"),
    [
        (Port(FLOAT, ()), torch.tensor(7), np.array(7.0)),
        (Port(FLOAT, ("b",)), torch.tensor(7.25), np.array([7.25, 7.25])),
        (Port(np.dtype(np.int64), ()), 7, np.array(7)),
        (Port(np.dtype(np.int64), ("b",)), torch.tensor([7.0]), np.array([7, 7])),
    ],
)
def test_a_timestep_in_the_rank_and_kind_of_the_graph(
    port: Port, given: torch.Tensor | int, fed: np.ndarray
) -> None:
    unet, seen = unet_that_takes(port)
    unet(torch.zeros(2, 4, 8, 8), given, torch.zeros(2, 3, 8))
    np.testing.assert_array_equal(seen[0], fed)
    assert seen[0].shape == fed.shape
    assert seen[0].dtype.kind == fed.dtype.kind


def test_a_graph_of_whole_timesteps_refuses_others() -> None:
    unet, _ = unet_that_takes(Port(np.dtype(np.int64), ()))
    with pytest.raises(UsageError, match="between the trained timesteps"):
        unet(torch.zeros(1, 4, 8, 8), torch.tensor(7.5), torch.zeros(1, 3, 8))


def test_what_a_graph_does_not_have_is_refused(reference: StableDiffusionPipeline) -> None:
    pipeline = ours(reference)
    with pytest.raises(UsageError, match="output_hidden_states"):
        pipeline("a", clip_skip=1, num_inference_steps=1)
    with pytest.raises(UsageError, match="cross_attention_kwargs"):
        pipeline("a", cross_attention_kwargs={"mask": 1}, num_inference_steps=1)


def test_a_vae_without_its_encoder_says_how_to_get_it(reference: StableDiffusionPipeline) -> None:
    decoder = stand_ins(reference)["vae"]._decoder
    with pytest.raises(UsageError, match="image_to_image=True"):
        Vae(decoder, None, {}).encode(torch.zeros(1, 3, 8, 8))


def test_a_graph_with_other_inputs_is_refused(reference: StableDiffusionPipeline) -> None:
    decoder = stand_ins(reference)["vae"]._decoder
    with pytest.raises(BundleError, match="latent_sample"):
        TextEncoder(decoder, {})(torch.zeros(1, 3, dtype=torch.int64))


def test_older_configurations_get_the_defaults() -> None:
    unet, _ = unet_that_takes(Port(FLOAT, ()))
    assert unet.config.time_cond_proj_dim is None
    assert unet.config.in_channels == 4
