"""24 points of the miniature model on two processes, whose driver is killed in the middle."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from sdopt.sweep.result import Result
from sdopt.sweep.store import FILE, Store
from tests.sweep import miniature

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, dict[str, Any]]:
    return miniature.swept(tmp_path_factory)


def test_every_point_is_there_exactly_once(swept: tuple[Result, dict[str, Any]]) -> None:
    result, _ = swept
    found = miniature.points(result)
    fast = "clean,raise_ops,clean,fuse_qkv,pad_align"
    recipes = [
        f"{fast}{tome}{cast}"
        for tome in ("", ",tome=1", ",tome=2")
        for cast in ("", ",cast_fp16:keep=io")
    ]
    assert set(found) == {
        (recipe, "ort", shape, batch)
        for recipe in recipes
        for shape in ("32x32", "64x64")
        for batch in (1, 2)
    }
    assert len(result.points) == 24
    for one in result.points:
        assert one.state == "done"
        assert one.ms is not None
        assert one.ms > 0
        assert [(x.prompt, x.seed) for x in one.samples] == [(0, 0), (1, 1)]
        assert all(x.score is not None and 0 <= x.score <= 1 for x in one.samples)
        assert (result.work / one.samples[0].path).is_file()
    assert any(one.frontier for one in result.points)
    # Another recipe draws another image; another batch draws the same one.
    images = {key: [digest for *_, digest in one["images"]] for key, one in found.items()}
    assert images[recipes[0], "ort", "64x64", 1] != images[recipes[2], "ort", "64x64", 1]


def test_nothing_was_measured_twice_and_what_was_known_stayed(
    swept: tuple[Result, dict[str, Any]],
) -> None:
    result, held = swept
    before, after = held["rows"], miniature.rows(result.folder)
    assert miniature.KILLED_AFTER <= len(before) < len(after) == 6 + 6 + 24 + 24
    kinds = [row[1] for row in before.values()]
    assert {"score", "time"} <= {*kinds}
    assert {key: after[key] for key in before} == before
    times = miniature.written(result.folder)
    assert set(times) == set(after)
    # Also what was finished and not recorded when the driver was killed is not done again.
    assert {key: times[key] for key in held["files"]} == held["files"]
    lines = [
        json.loads(line)["image"]
        for path in (result.work / "images").glob("*/*/images.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert len(lines) == 24 * 2


def test_shared_prefixes_are_stages_once_and_equal_graphs_are_built_once(
    swept: tuple[Result, dict[str, Any]],
) -> None:
    result, _ = swept
    stages = sorted((result.work / "bundle" / "unet").glob("stage-*.onnx"))
    builds = sorted((result.work / "bundle" / "unet").glob("built-*.onnx"))
    assert (len(stages), len(builds)) == (6, 6)
    with_data = {path.name.rpartition("-")[0] for path in stages[0].parent.glob("*.onnx_data")}
    # tome adds no weights, so the fused projections are written for the shared prefix alone.
    assert 2 <= len(with_data) < 6


def test_timings_of_a_device_do_not_overlap_and_nothing_is_scored_beside(
    swept: tuple[Result, dict[str, Any]],
) -> None:
    result, _ = swept
    store = Store(result.folder / FILE)
    timed = [one for one in store.outcomes().values() if "ms" in one.data]
    store.close()
    spans = sorted((one.data["began"], one.data["ended"]) for one in timed)
    assert len(spans) == 24
    for (_, ended), (began, _) in itertools.pairwise(spans):
        assert ended <= began
    assert not any(one.beside for one in timed)


def test_provenance_is_with_every_number(swept: tuple[Result, dict[str, Any]]) -> None:
    result, _ = swept
    for one in result.points:
        assert one.here["cpu"]
        assert {"sdopt", "onnxruntime", "torch", "diffusers"} <= set(one.here["versions"])
        assert one.here["python"]
        assert len(one.rounds) == 1
        assert set(one.digests) == {"text_encoder", "unet", "vae_decoder"}
        assert f"--shapes {one.shape} --batch {one.batch}" in one.command
