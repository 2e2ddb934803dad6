"""Checkpoints far larger than the memory of a machine, as holes: what is held, what is copied."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import make_checkpoint
from benchmarks.architectures import ARCHITECTURES, Part

GB = 10**9
LIMIT = GB
"""Of resident memory, in bytes."""

HUGE = {
    "vocab_size": 1_900_000,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 2_000_000,
    "num_layers": 1,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
"""A T5 of one layer, each of whose four large weights takes 16 GB in half precision."""


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six files with an index, four of them of 16 GB, which take no space."""
    folder = tmp_path_factory.mktemp("huge") / "text_encoder_3"
    folder.mkdir()
    part = Part("transformers", "T5EncoderModel", HUGE)
    config, shapes = make_checkpoint._describe(part)
    (folder / "config.json").write_text(json.dumps(config))
    make_checkpoint._write_weights(folder, "model", shapes, make_checkpoint.DTYPES["fp16"], None)
    files = list(folder.glob("*.safetensors"))
    assert len(files) == 6
    assert sum(file.stat().st_size for file in files) > 64 * GB
    assert sum(file.stat().st_blocks * 512 for file in files) < 1e6
    return folder


def peak_of(call: str, *arguments: str | Path) -> tuple[int, Any]:
    """Resident bytes at most, and the report, of ``api.CALL(arguments)`` in its own process."""
    code = (
        "import json, sys\n"
        "from sdopt import api\n"
        f"report = api.{call}\n"
        "lines = open('/proc/self/status').read().splitlines()\n"
        "peak = next(int(l.split()[1]) for l in lines if l.startswith('VmHWM')) * 1024\n"
        "one = report.components[0]\n"
        "print(json.dumps([peak, one.bytes_written, one.nodes]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    peak, written, nodes = json.loads(done.stdout)
    return peak, (written, nodes)


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def test_64_gb_are_exported_optimized_and_packed_under_1_gb(huge: Path, tmp_path: Path) -> None:
    bundle, packed = tmp_path / "bundle", tmp_path / "packed"
    peak, (written, _) = peak_of("export(*sys.argv[1:])", huge, bundle)
    assert peak < LIMIT
    assert written > 64 * GB
    assert on_disk(bundle) < 20e6  # the copy keeps the holes

    peak, (written, _) = peak_of("optimize(*sys.argv[1:])", bundle, "clean,fuse_qkv")
    assert peak < LIMIT
    qkv = 3 * 4096 * 4096 * 2
    assert qkv <= written < qkv + 1e6  # q, k and v, and nothing of the large ones

    peak, (written, _) = peak_of("pack(*sys.argv[1:])", bundle, packed)
    assert peak < LIMIT
    assert on_disk(packed) < on_disk(bundle) + 20e6


def test_64_gb_are_exported_in_place(huge: Path) -> None:
    peak, (written, nodes) = peak_of("export(sys.argv[1], in_place=True)", huge)
    assert peak < LIMIT
    assert (written, nodes > 50) == (0, True)


@pytest.mark.parametrize(
    ("architecture", "component", "billions"),
    [
        ("sd15", "unet", 0.860),
        ("sd21", "unet", 0.866),
        ("sdxl", "unet", 2.567),
        ("sd35-large", "transformer", 8.057),
        ("sd35-large", "text_encoder_3", 4.762),
    ],
)
def test_the_architectures_have_the_published_sizes(
    architecture: str, component: str, billions: float
) -> None:
    """Parameters in billions, as the model cards and papers count them."""
    _, shapes = make_checkpoint._describe(ARCHITECTURES[architecture].parts[component])
    count = sum(
        math.prod(shape) for name, shape in shapes.items() if name != "pos_embed.pos_embed"
    )
    assert count / 1e9 == pytest.approx(billions, abs=0.0006)
