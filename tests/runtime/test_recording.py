"""What ``record`` keeps is what the components were given, and what is there stays whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sdopt import api, datafile, recorded
from sdopt.bundle import Bundle
from sdopt.cli.app import app
from sdopt.errors import BundleError, SdoptError, StorageError, UsageError
from sdopt.runtime.recording import Recorder, Tape, record
from sdopt.runtime.session import opener
from tests.runtime import toy

PROMPTS = ["a handwritten seven", "a handwritten three"]
SMALL: dict[str, Any] = {"steps": 5, "keep": 3, "width": 32, "height": 24}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return toy.bundle(tmp_path / "bundle")


def test_samples_are_spread_over_the_steps_and_say_what_they_are(bundle: Bundle) -> None:
    made = record(bundle, PROMPTS, seed=7, **SMALL)
    assert made.folder == bundle.path / "recorded" / "default"
    assert made.counts() == {"text_encoder": 3, "unet": 6, "vae_decoder": 2}
    unet = [one for one in made.samples if one.component == "unet"]
    assert [one.step for one in unet] == [0, 2, 4] * 2
    assert [one.seed for one in unet] == [7] * 3 + [8] * 3
    assert [one.prompt for one in unet] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    times = [one.timestep for one in unet[:3]]
    assert times == sorted(times, reverse=True)
    assert unet[0].inputs == {
        "sample": ("float32", (2, 4, 3, 4)),
        "timestep": ("float32", ()),
        "encoder_hidden_states": ("float32", (2, 77, 8)),
    }
    assert made.origins["unet"].digest == bundle.stage("unet", "model").digest
    assert recorded.open_recording(made.folder) == made
    assert recorded.open_recording(made.folder / "index.json").samples == made.samples
    decoded = made.of(frozenset({"latent_sample"}))
    assert [one.component for one in decoded] == ["vae_decoder"] * 2
    assert made.of(frozenset({"sample"})) == ()


def test_what_is_recorded_is_what_the_run_fed(bundle: Bundle) -> None:
    """The VAE is fed the last latents, the UNet at step 0 the noise of the seed, twice."""
    torch = pytest.importorskip("torch")
    made = record(bundle, PROMPTS[:1], seed=3, scheduler="ddim", **SMALL)
    first = next(one for one in made.samples if one.component == "unet")
    arrays = made.load(first)
    noise = torch.randn((1, 4, 3, 4), generator=torch.Generator().manual_seed(3)).numpy()
    np.testing.assert_array_equal(arrays["sample"], np.concatenate([noise, noise]))
    session = opener("ort").open(bundle.file("text_encoder", "model"))
    texts = [made.load(one) for one in made.samples if one.component == "text_encoder"]
    embedded = [session.run(one)["last_hidden_state"] for one in texts]  # the prompt comes first
    np.testing.assert_allclose(
        arrays["encoder_hidden_states"], np.concatenate(embedded[::-1]), rtol=1e-6
    )


def test_a_scheduler_that_asks_twice_counts_steps_and_not_calls(bundle: Bundle) -> None:
    made = record(bundle, PROMPTS[:1], scheduler="heun", **SMALL)
    assert [one.step for one in made.samples if one.component == "unet"] == [0, 2, 4]


@pytest.mark.parametrize(
    ("steps", "keep", "chosen"),
    [(10, 1, [0]), (10, 2, [0, 9]), (5, 5, [0, 1, 2, 3, 4]), (3, 8, [0, 1, 2]), (1, 4, [0])],
)
def test_which_steps_are_kept(tmp_path: Path, steps: int, keep: int, chosen: list[int]) -> None:
    writer = recorded.Writer(tmp_path)
    tape = Tape(writer, steps, keep)
    tape.begin("a", 0)
    for step in range(steps):
        tape.heard("unet", {"timestep": np.array(1000.0 - step)})
    assert [one.step for one in writer.commit("k", {}, {}).samples] == chosen


def test_the_recorder_passes_everything_through(bundle: Bundle, tmp_path: Path) -> None:
    session = opener("ort").open(bundle.file("vae_decoder", "model"))
    writer = recorded.Writer(tmp_path / "r")
    recorder = Recorder(session, "vae_decoder", Tape(writer, 1, 1))
    assert recorder.inputs is session.inputs
    assert recorder.outputs is session.outputs
    feeds = {"latent_sample": np.random.default_rng(0).standard_normal((1, 4, 2, 3), np.float32)}
    for name, one in recorder.run(feeds).items():
        np.testing.assert_array_equal(one, session.run(feeds)[name])
    (sample,) = writer.commit("k", {}, {}).samples
    assert sample.inputs == {"latent_sample": ("float32", (1, 4, 2, 3))}


def test_the_same_again_is_not_done_and_another_replaces_it(bundle: Bundle) -> None:
    first = record(bundle, PROMPTS, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert record(bundle, PROMPTS, **SMALL) == first
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == before
    digest = recorded.index_digest(first.folder)
    second = record(bundle, PROMPTS, **{**SMALL, "seed": 5})
    assert recorded.index_digest(first.folder) != digest
    files = {one.file for one in second.samples} | {"index.json"}
    assert {path.name for path in second.folder.iterdir()} == files
    toy.restage(bundle, "unet", "optimized")
    assert record(bundle, PROMPTS, **{**SMALL, "seed": 5}).key != second.key


def test_a_recording_that_fails_leaves_the_one_before_whole(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = record(bundle, PROMPTS, **SMALL)
    write, left = datafile.write_bytes, [4]

    def full(path: Path, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise StorageError("the disk is full")
        write(path, data)

    monkeypatch.setattr(datafile, "write_bytes", full)
    with pytest.raises(StorageError):
        record(bundle, PROMPTS, **{**SMALL, "seed": 5})
    monkeypatch.undo()
    again = recorded.open_recording(first.folder)
    assert again == first
    assert all(again.load(one) for one in again.samples)
    record(bundle, PROMPTS, **{**SMALL, "seed": 5})  # what the failed one left is gone after this
    files = {one.file for one in recorded.open_recording(first.folder).samples}
    assert {path.name for path in first.folder.glob("*.npz")} == files


def test_what_cannot_be_is_refused(bundle: Bundle) -> None:
    for options in ({"keep": 0}, {"steps": 0}, {"width": 33}):
        with pytest.raises(UsageError):
            record(bundle, PROMPTS, **{**SMALL, **options})
    with pytest.raises(UsageError, match="no prompt"):
        record(bundle, [], **SMALL)
    with bundle.lock(), pytest.raises(BundleError, match="another sdopt"):
        record(Bundle.open(bundle.path), PROMPTS, **SMALL)


def changed(index: Path, change: Mapping[str, Any]) -> None:
    data = json.loads(index.read_text())
    index.write_text(json.dumps({**data, **change}))


def test_recordings_that_cannot_be_read(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no recorded samples here") as caught:
        recorded.open_recording(tmp_path / "none")
    assert "sdopt record" in (caught.value.hint or "")
    made = record(bundle, PROMPTS, **SMALL)
    sample = made.samples[0]
    path = made.folder / sample.file
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(BundleError, match="cannot be read"):
        made.load(sample)
    path.unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        made.load(sample)
    index = made.folder / "index.json"
    text = index.read_text()
    forged = json.loads(text)["samples"]
    forged[0]["file"] = "../secret.npz"
    changes: list[tuple[dict[str, Any], str]] = [
        ({"schema": 99}, "newer sdopt"),
        ({"samples": [{}]}, "no index"),
        ({"samples": forged}, "no index"),
    ]
    for change, message in changes:
        changed(index, change)
        with pytest.raises(BundleError, match=message):
            recorded.open_recording(made.folder)
        index.write_text(text)
    index.write_text("not json")
    with pytest.raises(SdoptError):
        recorded.open_recording(made.folder)


def test_the_verb(bundle: Bundle, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n\n")
    small = ["--steps", "3", "--keep", "2", "--width", "32", "--height", "24"]
    command = ["record", str(bundle.path), "--prompts", str(prompts), *small]
    ran = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out")])
    assert ran.exit_code == 0, ran.output
    assert ran.stdout.strip() == str(tmp_path / "out")
    assert "record: 3 of text_encoder, 4 of unet, 2 of vae_decoder" in ran.stderr
    assert len(recorded.open_recording(tmp_path / "out").samples) == 9
    assert api.record(bundle.path, PROMPTS, **SMALL).counts()["unet"] == 6
