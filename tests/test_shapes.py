"""--shapes and --batch: what is read, what is refused, what becomes of a graph's axes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdopt.errors import UsageError
from sdopt.shapes import (
    Extent,
    Request,
    Size,
    Sizes,
    axis_numbers,
    parse_batch,
    parse_dim,
    parse_sizes,
)

UNET: dict[str, list[int | str]] = {
    "sample": ["batch_size", 4, "height", "width"],
    "timestep": [],
    "encoder_hidden_states": ["batch_size", "sequence_length", 768],
}


def test_fixed_sizes_are_height_by_width() -> None:
    first, second = parse_sizes("512x768, 72x88")
    assert first == Sizes(*[Size(512, 768)] * 3)
    assert first.fixed
    assert str(second) == "72x88"


def test_a_range_is_best_at_the_usual_size_if_that_is_inside() -> None:
    (inside,) = parse_sizes("256x256..1024x1024", Size(512, 512))
    (outside,) = parse_sizes("768x768..1024x1024", Size(512, 512))
    assert inside.usual == Size(512, 512)
    assert outside.usual == Size(1024, 1024)
    assert str(inside) == "256x256..1024x1024"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("512", "is no size"),
        ("512x", "is no size"),
        ("", "is no size"),
        ("512x512,", "is no size"),
        ("500x512", "the nearest is 496x512"),
        ("0x512", "multiples of 8"),
        ("1024x1024..256x256", "is above"),
        ("512x256..256x512", "is above"),
        ("512x512,512x512", "twice"),
    ],
)
def test_what_is_no_size(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_sizes(text)
    assert reason in str(raised.value)


def test_batches() -> None:
    assert parse_batch("2") == (2, 2)
    assert parse_batch("1..4") == (1, 4)
    for text in ("0", "4..1", "one", "1-4", "1..", ""):
        with pytest.raises(UsageError):
            parse_batch(text)


def test_dims() -> None:
    assert parse_dim("tokens=16..77") == ("tokens", (16, 77))
    for text in ("tokens", "=3", "tokens=a"):
        with pytest.raises(UsageError):
            parse_dim(text)


def test_a_denoiser_runs_both_halves_of_guidance() -> None:
    request = Request(parse_sizes("256x256..1024x1024", Size(512, 512)), (1, 2))
    (profile,) = request.profiles(UNET, doubled=True)
    assert profile["sample"] == [
        Extent(1, 2, 4),
        Extent(4, 4, 4),
        Extent(32, 64, 128),
        Extent(32, 64, 128),
    ]
    assert profile["timestep"] == []
    assert profile["encoder_hidden_states"][1] == Extent(77, 77, 77)


def test_a_vae_encoder_takes_pixels_and_a_decoder_latents() -> None:
    request = Request(parse_sizes("72x88"))
    (encoder,) = request.profiles(
        {"sample": ["batch_size", 3, "sample_height", "sample_width"]}, doubled=False
    )
    (decoder,) = request.profiles(
        {"latent_sample": ["batch_size", 4, "latent_height", "latent_width"]}, doubled=False
    )
    assert [extent.high for extent in encoder["sample"]] == [1, 3, 72, 88]
    assert [extent.high for extent in decoder["latent_sample"]] == [1, 4, 9, 11]


def test_an_axis_that_nothing_is_known_about_is_named() -> None:
    with pytest.raises(UsageError, match="nothing says how large the axis 'boxes' is") as raised:
        Request().profiles({"images": ["boxes", 4]}, doubled=False, where="detector")
    assert "detector: images" in str(raised.value)
    request = Request(dims={"boxes": (1, 16)})
    assert request.profiles({"images": ["boxes"]}, doubled=False) == [
        {"images": [Extent(1, 16, 16)]}
    ]


@given(low=st.integers(1, 64), more=st.integers(0, 64), batch=st.integers(1, 8))
def test_extents_are_ordered(low: int, more: int, batch: int) -> None:
    text = f"{8 * low}x{8 * low}..{8 * (low + more)}x{8 * (low + more)}"
    request = Request(parse_sizes(text, Size(512, 512)), (1, batch))
    for profile in request.profiles(UNET, doubled=True):
        for extents in profile.values():
            assert all(0 < one.low <= one.usual <= one.high for one in extents)


IMAGES: dict[str, list[int | str]] = {"images": ["batch", 3, "height", "width"]}


def test_in_a_graph_of_anyone_height_and_width_are_pixels() -> None:
    request = Request(parse_sizes("322x480..642x640", multiple=1), (1, 4))
    (profile,) = request.profiles(IMAGES, doubled=False, pixels=True)
    assert profile["images"] == [
        Extent(1, 1, 4),
        Extent(3, 3, 3),
        Extent(322, 642, 642),
        Extent(480, 640, 640),
    ]
    (latents,) = request.profiles({"x": ["latent_height"]}, doubled=False, pixels=True)
    assert latents["x"] == [Extent(40, 80, 80)]
    numbers = axis_numbers(Size(640, 480), 2, {"boxes": 8}, pixels=True)
    assert (numbers["height"], numbers["width"], numbers["latent_width"]) == (640, 480, 60)
    assert axis_numbers(Size(640, 480), 2, {})["height"] == 80


def test_a_size_that_nobody_asked_for_decides_nothing_of_a_graph_of_anyone() -> None:
    with pytest.raises(UsageError, match="how large the axis 'height' is") as raised:
        Request(asked=False).profiles(IMAGES, doubled=False, pixels=True, where="model")
    assert "--shapes 640x640" in (raised.value.hint or "")
    request = Request(dims={"height": (320, 640), "width": (64, 64)}, asked=False)
    (profile,) = request.profiles(IMAGES, doubled=False, pixels=True)
    assert profile["images"][2:] == [Extent(320, 640, 640), Extent(64, 64, 64)]
    (native,) = Request(asked=False).profiles(UNET, doubled=True)
    assert native["sample"][2] == Extent(64, 64, 64)
