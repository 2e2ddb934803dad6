from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdopt import recorded
from sdopt.bundle import Bundle
from sdopt.compare import compare, compare_layers
from sdopt.compare.figures import figures, worst
from sdopt.errors import BundleError, UsageError
from sdopt.runtime.recording import record
from tests.runtime import toy
from tests.test_compare import nothing, scaled, stage


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    made = toy.bundle(tmp_path_factory.mktemp("toy") / "bundle")
    stage(made, "unet", "wrong", scaled(1.5))
    stage(made, "unet", "same", nothing)
    record(made, ["a one", "a two"], steps=4, keep=3, width=32, height=16, guidance=2.0)
    return made


def folder(made: Bundle) -> Path:
    return made.path / recorded.FOLDER / "default"


def at(made: Bundle, name: str) -> str:
    return f"{made.path}@{name}"


def test_recorded_inputs_are_what_both_sides_are_fed(bundle: Bundle) -> None:
    found = compare(at(bundle, "wrong"), at(bundle, "model"), recorded=folder(bundle))
    (one,) = found.components
    assert one.samples == 6
    assert one.shapes["sample"] == (2, 4, 2, 4)
    recording = recorded.open_recording(folder(bundle))
    sample = recording.load(recording.of(frozenset(one.shapes))[0])
    from sdopt.targets.ort import Ort

    wanted = [
        Ort().open(bundle.file("unet", name), optimize=False).run(sample)["out_sample"]
        for name in ("wrong", "model")
    ]
    first = figures("out_sample", *wanted)
    assert one.errors[0] == (first.relative_l2,)
    assert one.outputs[0].relative_l2 == max(error for (error,) in one.errors)
    assert len({error for (error,) in one.errors}) > 1, "the samples differ"
    assert "the worst of 6 samples" in found.lines()[2]


@pytest.mark.parametrize("samples", [1, 2, 5, 100])
def test_at_most_so_many(bundle: Bundle, samples: int) -> None:
    found = compare(
        at(bundle, "same"), at(bundle, "model"), recorded=folder(bundle), samples=samples
    )
    assert found.components[0].samples == min(samples, 6)
    assert found.passed


def test_components_that_were_not_recorded_are_said(bundle: Bundle) -> None:
    found = compare(bundle.path, at(bundle, "model"), recorded=folder(bundle))
    assert found.unfed == ("vae_encoder",)
    assert {one.component for one in found.components} == {"text_encoder", "unet", "vae_decoder"}
    with pytest.raises(UsageError, match="nothing was recorded"):
        compare(
            bundle.path, at(bundle, "model"), recorded=folder(bundle), components=["vae_encoder"]
        )


def test_layers_take_the_worst_sample(bundle: Bundle) -> None:
    (found,) = compare_layers(at(bundle, "wrong"), at(bundle, "model"), recorded=folder(bundle))
    assert found.samples == 6
    (whole,) = compare(
        at(bundle, "wrong"), at(bundle, "model"), recorded=folder(bundle)
    ).components
    last = next(one for one in found.layers if one.name == "out_sample")
    assert last.error == whole.outputs[0].relative_l2


def test_no_number_is_the_worst() -> None:
    good = figures("y", np.array([1.0, 2.0]), np.array([1.0, 1.0]))
    bad = figures("y", np.array([1.0, np.nan]), np.array([1.0, 1.0]))
    assert worst([good, bad]) is worst([bad, good]) is bad


def test_what_cannot_be_asked(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sizes of their own"):
        compare(bundle.path, bundle.path, recorded=folder(bundle), sizes={"height": 8})
    with pytest.raises(UsageError, match="1 or more"):
        compare(bundle.path, bundle.path, recorded=folder(bundle), samples=0)
    with pytest.raises(BundleError, match="no recorded samples"):
        compare(bundle.path, bundle.path, recorded=tmp_path)
