from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import weights
from sdopt.errors import SourceError, WeightsError
from sdopt.exporters.checkpoint import Checkpoint

Table = dict[str, Any]


def table(**shapes: list[int]) -> Table:
    """A header for fp32 tensors of these shapes, one after the other."""
    entries: Table = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    return entries


def write(path: Path, header: Table | bytes, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def floats(count: int) -> bytes:
    return np.arange(count, dtype=np.float32).tobytes()


def test_single_file(tmp_path: Path) -> None:
    write(
        tmp_path / "model.safetensors",
        {"__metadata__": {"format": "pt"}, **table(a=[2, 3], b=[])},
        floats(7),
    )
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.entries) == {"a", "b"}
    assert checkpoint.dtype == ir.DataType.FLOAT
    tensor = checkpoint.external("a")
    np.testing.assert_array_equal(tensor.numpy(), np.arange(6, dtype=np.float32).reshape(2, 3))
    assert checkpoint.external("b").numpy() == 6.0


def test_sorted_out_of_header_order(tmp_path: Path) -> None:
    header = table(a=[2], b=[3])
    write(tmp_path / "model.safetensors", {"b": header["b"], "a": header["a"]}, floats(5))
    np.testing.assert_array_equal(
        Checkpoint.open(tmp_path).external("b").numpy(), np.array([2, 3, 4], np.float32)
    )


def test_real_files_of_the_reference_library(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    arrays = {f"t{i}": np.random.default_rng(i).random((i, 3)).astype("f2") for i in range(5)}
    save_file(arrays, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.dtype == ir.DataType.FLOAT16
    for name, array in arrays.items():
        np.testing.assert_array_equal(checkpoint.external(name).numpy(), array)


@pytest.mark.parametrize("index", ["model.safetensors.index.json"])
def test_shards(tmp_path: Path, index: str) -> None:
    _shards(tmp_path, index, "")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.variant is None
    assert checkpoint.external("b").numpy().tolist() == [0, 1, 2]
    assert len(checkpoint.fingerprint()) == 64


@pytest.mark.parametrize(
    "index", ["model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"]
)
def test_shards_of_a_variant(tmp_path: Path, index: str) -> None:
    _shards(tmp_path, index, ".fp16")
    assert Checkpoint.open(tmp_path).variant == "fp16"
    assert set(Checkpoint.open(tmp_path, variant="fp16").entries) == {"a", "b"}


def _shards(folder: Path, index: str, variant: str) -> None:
    names = [f"model{variant}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    write(folder / names[0], table(a=[2]), floats(2))
    write(folder / names[1], table(b=[3]), floats(3))
    mapping = {"metadata": {}, "weight_map": {"a": names[0], "b": names[1]}}
    (folder / index).write_text(json.dumps(mapping))


def test_variants(tmp_path: Path) -> None:
    write(tmp_path / "model.fp16.safetensors", table(a=[1]), floats(1))
    assert Checkpoint.open(tmp_path).variant == "fp16"
    write(tmp_path / "model.safetensors", table(a=[2]), floats(2))
    assert Checkpoint.open(tmp_path).entries["a"].shape == (2,)
    assert Checkpoint.open(tmp_path, variant="fp16").entries["a"].shape == (1,)
    with pytest.raises(SourceError, match="no bf16 weights"):
        Checkpoint.open(tmp_path, variant="bf16")


def test_two_variants_and_none_asked_for(tmp_path: Path) -> None:
    for variant in ("fp16", "non_ema"):
        write(tmp_path / f"model.{variant}.safetensors", table(a=[1]), floats(1))
    with pytest.raises(SourceError, match="no plain weights") as caught:
        Checkpoint.open(tmp_path)
    assert "fp16, non_ema" in str(caught.value)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "x.ckpt", "pytorch_model.bin"])
def test_pickles_are_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02")
    with pytest.raises(SourceError, match="pickled") as caught:
        Checkpoint.open(tmp_path)
    assert "safe_serialization=True" in str(caught.value)
    assert "code" in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no weights here"):
        Checkpoint.open(tmp_path)
    with pytest.raises(SourceError, match="no weights here"):
        Checkpoint.open(tmp_path / "absent")


def _edit(**changes: Any) -> Callable[[Table], Table]:
    def edit(header: Table) -> Table:
        return {**header, "b": {**header["b"], **changes}}

    return edit


HOSTILE: dict[str, tuple[Callable[[Table], Table | bytes], str]] = {
    "overlap": (_edit(data_offsets=[4, 16]), "overlaps"),
    "hole": (_edit(data_offsets=[12, 24]), "leaves a hole"),
    "past the end": (_edit(shape=[4], data_offsets=[8, 24]), "missing"),
    "short": (_edit(shape=[2], data_offsets=[8, 16]), "too many"),
    "backwards": (_edit(data_offsets=[20, 8]), "bad shape or offsets"),
    "length": (_edit(shape=[7]), "needs 28"),
    "negative": (_edit(shape=[-3]), "bad shape"),
    "float dim": (_edit(shape=[3.0]), "bad shape"),
    "huge dim": (_edit(shape=[2**62, 2**62]), "needs"),
    "dtype": (_edit(dtype="Q4_K"), "dtype Q4_K"),
    "no dtype": (_edit(dtype=None), "lacks a dtype"),
    "text offsets": (_edit(data_offsets=["8", "20"]), "lacks"),
    "one offset": (_edit(data_offsets=[8]), "lacks"),
    "no table": (lambda header: {**header, "b": 3}, "lacks"),
    "garbage": (lambda header: b"{\x00garbage", "JSON cannot be read"),
    "no utf-8": (lambda header: b'{"\xff\xfe": 1}', "JSON cannot be read"),
    "a list": (lambda header: b"[1, 2]", "no table"),
    "deep": (lambda header: b"[" * 100_000, "JSON cannot be read"),
    "twice": (
        lambda header: json.dumps(header).replace('"b"', '"a"').encode(),
        "names a twice",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers(tmp_path: Path, kind: str) -> None:
    change, words = HOSTILE[kind]
    path = tmp_path / "model.safetensors"
    write(path, change(table(a=[2], b=[3])), floats(5))
    with pytest.raises(WeightsError) as caught:
        Checkpoint.open(tmp_path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, table(a=[2], b=[3]), floats(5))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError):
            Checkpoint.open(tmp_path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(WeightsError, match="not a usable"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 1000])
def test_huge_header_length(tmp_path: Path, length: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" * 10)
    with pytest.raises(WeightsError, match="usable") as caught:
        Checkpoint.open(tmp_path)
    assert str(length) in str(caught.value)


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"a": "../secret.safetensors"}, "no file beside it"),
        ({"a": "/etc/passwd"}, "no file beside it"),
        ({"a": ".."}, "no file beside it"),
        ({"a": ""}, "no file beside it"),
        ({"a": 3}, "no file beside it"),
        ({"a": "sub/one.safetensors"}, "no file beside it"),
        ({"a": "gone.safetensors"}, "missing"),
        ({"c": "one.safetensors"}, "holds c, which it does not"),
        ({"a": "one.safetensors", "b": "two.safetensors"}, "hold the tensor a"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_hostile_indexes(tmp_path: Path, mapping: object, words: str) -> None:
    folder = tmp_path / "component"
    folder.mkdir()
    write(tmp_path / "secret.safetensors", table(a=[1]), floats(1))
    write(folder / "one.safetensors", table(a=[2]), floats(2))
    write(folder / "two.safetensors", table(a=[2], b=[3]), floats(5))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
    with pytest.raises(WeightsError) as caught:
        Checkpoint.open(folder)
    assert words in str(caught.value)


def test_index_of_garbage(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(b"\x80garbage")
    with pytest.raises(WeightsError, match="usable"):
        Checkpoint.open(tmp_path)


def test_links_are_followed_to_the_real_file(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1" / "unet"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write(blobs / "abc", table(a=[3]), floats(3))
    (snapshot / "model.safetensors").symlink_to("../../../blobs/abc")
    tensor = Checkpoint.open(snapshot).external("a")
    weights.check_location(tensor)
    assert tensor.location == "abc"
    assert tensor.numpy().tolist() == [0, 1, 2]


def test_dtype_is_that_of_most_elements(tmp_path: Path) -> None:
    header = {
        "ids": {"dtype": "I64", "shape": [4], "data_offsets": [0, 32]},
        "half": {"dtype": "F16", "shape": [8], "data_offsets": [32, 48]},
        "norm": {"dtype": "F32", "shape": [2], "data_offsets": [48, 56]},
    }
    write(tmp_path / "model.safetensors", header, bytes(56))
    assert Checkpoint.open(tmp_path).dtype == ir.DataType.FLOAT16


def test_no_float_weights(tmp_path: Path) -> None:
    header = {"ids": {"dtype": "I64", "shape": [4], "data_offsets": [0, 32]}}
    write(tmp_path / "model.safetensors", header, bytes(32))
    with pytest.raises(SourceError, match="no float weights"):
        _ = Checkpoint.open(tmp_path).dtype


@pytest.mark.parametrize("place", [0, 500])
def test_fingerprint_sees_changed_weights(tmp_path: Path, place: int) -> None:
    write(tmp_path / "model.safetensors", table(a=[1000]), floats(1000))
    before = Checkpoint.open(tmp_path).fingerprint()
    assert Checkpoint.open(tmp_path).fingerprint() == before
    values = np.arange(1000, dtype=np.float32)
    values[place] = -1
    write(tmp_path / "model.safetensors", table(a=[1000]), values.tobytes())
    assert Checkpoint.open(tmp_path).fingerprint() != before


def test_nothing_large_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, table(a=[1 << 30], b=[3 << 30]), b"")
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + (16 << 30))
    started = time.perf_counter()
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.fingerprint()
    assert checkpoint.external("b").nbytes == 12 << 30
    assert time.perf_counter() - started < 2
