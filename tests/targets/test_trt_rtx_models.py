"""Whole models as TensorRT-RTX engines, built here: the digits, and one with SD1.5's heads."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdopt import api
from sdopt.report import ComponentReport
from tests.exporters import tiny
from tests.exporters.made import copy_of_digits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ComponentReport]:
    """What ``build`` says of every component, for two cards, with two profiles."""
    report = api.build(
        copy_of_digits(tmp_path_factory),
        "trt_rtx:dtype=fp16:sm=86+89",
        shapes="256x256..1024x1024,128x128",
        batch=(1, 2),
    )
    return {one.component: one for one in report.components}


def test_the_digits_are_built_for_two_cards_and_two_profiles(
    digits: dict[str, ComponentReport],
) -> None:
    assert set(digits) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    for one in digits.values():
        plan = Path(one.file).with_name(one.artifact["file"])
        assert plan.stat().st_size == one.artifact["size"] > 1_000_000
    profiles = {name: one.artifact["facts"]["profiles"] for name, one in digits.items()}
    # The text encoder has no height or width: its two profiles are one.
    assert {name: len(found) for name, found in profiles.items()} == {
        "text_encoder": 1,
        "unet": 2,
        "vae_decoder": 2,
        "vae_encoder": 2,
    }
    wide, small = (one["sample"] for one in profiles["unet"])
    assert wide == [[1, 2, 4], [4, 4, 4], [32, 128, 128], [32, 128, 128]]
    assert small == [[1, 2, 4], [4, 4, 4], [16, 16, 16], [16, 16, 16]]
    assert profiles["vae_encoder"][0]["sample"][2] == [256, 1024, 1024]


def test_attentions_are_fused_where_there_is_a_kernel(digits: dict[str, ComponentReport]) -> None:
    """Heads of 16 and more; the digits' first level has heads of 8, and there is none for them."""
    fused = {
        name: (one.artifact["facts"]["attentions_fused"], one.artifact["facts"]["attentions"])
        for name, one in digits.items()
    }
    assert fused == {
        "text_encoder": (3, 3),
        "unet": (22, 32),
        "vae_decoder": (1, 1),
        "vae_encoder": (1, 1),
    }


def test_a_unet_with_the_structure_and_heads_of_sd15_has_32_of_32_fused(tmp_path: Path) -> None:
    """Heads of 32, 64 and 128, about SD1.5's 40, 80 and 160."""
    tiny.save(tmp_path / "source", tmp_path / "tokenizer", widths=(64, 128, 256, 256))
    api.export(tmp_path / "source", tmp_path / "bundle", components=["unet"], dtype="fp16")
    report = api.build(tmp_path / "bundle", "trt_rtx:sm=89", shapes="512x512")
    (unet,) = report.components
    assert unet.artifact["facts"]["attentions"] == 32
    assert unet.artifact["facts"]["attentions_fused"] == 32
