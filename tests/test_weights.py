from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import datafile, modelfile, weights
from sdopt.errors import BundleError, StorageError, WeightsError


def external(
    path: Path, offset: int, shape: tuple[int, ...], name: str = "w"
) -> ir.ExternalTensor:
    size = 4 * int(np.prod(shape))
    return ir.ExternalTensor(
        path.name,
        offset,
        size,
        ir.DataType.FLOAT,
        shape=ir.Shape(shape),
        name=name,
        base_dir=path.parent,
    )


@pytest.fixture
def numbers(tmp_path: Path) -> tuple[Path, np.ndarray]:
    data = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    path = tmp_path / "source.bin"
    path.write_bytes(b"header--" + data.tobytes())
    return path, data


def test_blocks_are_the_tensor_in_order(numbers: tuple[Path, np.ndarray]) -> None:
    path, data = numbers
    blocks = list(weights.read_blocks(external(path, 8, (64, 48)), block_bytes=1000))
    assert max(block.nbytes for block in blocks) <= 1000
    np.testing.assert_array_equal(np.concatenate(blocks), data.reshape(-1))


@pytest.mark.parametrize("axis", [0, 1])
def test_concat_equals_numpy(numbers: tuple[Path, np.ndarray], axis: int) -> None:
    path, data = numbers
    top, low = external(path, 8, (32, 48)), external(path, 8 + 32 * 48 * 4, (32, 48))
    found = weights.concat([top, low], axis).numpy()
    np.testing.assert_array_equal(found, np.concatenate([data[:32], data[32:]], axis))


def test_transpose_equals_numpy(
    numbers: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = numbers
    tensor = external(path, 8, (64, 48))
    monkeypatch.setattr(weights, "BLOCK_BYTES", 64 * 4 * 5)  # five columns, six rows at a time
    found = weights.transpose(tensor)
    assert [block.size for block in found.blocks()] == [64 * 5] * 9 + [64 * 3]
    np.testing.assert_array_equal(found.numpy(), data.T)
    assert weights.identity(found) == weights.identity(weights.transpose(tensor))


def test_cast_saturates_only_when_asked(tmp_path: Path) -> None:
    tensor = ir.tensor(np.array([1.0, -np.inf, 1e6], np.float32))
    half = ir.DataType.FLOAT16
    np.testing.assert_array_equal(weights.cast(tensor, half).numpy(), [1, -np.inf, np.inf])
    saturated = weights.cast(tensor, half, saturate=True).numpy()
    np.testing.assert_array_equal(saturated, [1, -65504, 65504])


def test_written_bytes_are_the_tensors_and_the_name_is_their_digest(
    numbers: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    path, data = numbers
    out = tmp_path / "out"
    out.mkdir()
    copied = external(path, 8, (64, 48), "copied")
    computed = weights.cast(external(path, 8, (64, 48), "computed"), ir.DataType.FLOAT16)
    first, _ = datafile.write([copied, computed], out, "stage")
    np.testing.assert_array_equal(first[0].numpy(), data)
    np.testing.assert_array_equal(first[1].numpy(), data.astype(np.float16))
    again, _ = datafile.write([copied, computed], out, "stage")
    assert again[0].location == first[0].location
    changed = weights.full((64, 48), 1.0, ir.DataType.FLOAT, "computed")
    other, _ = datafile.write([copied, changed], out, "stage")
    assert other[0].location != first[0].location


def test_holes_are_copied_as_holes(tmp_path: Path) -> None:
    path = tmp_path / "sparse.bin"
    size = 256 << 20
    with open(path, "wb") as file:
        file.truncate(size)
        file.seek(size // 2)
        file.write(b"\x01" * 4096)
    out = tmp_path / "out"
    out.mkdir()
    (found,), _ = datafile.write([external(path, 0, (size // 4,))], out, "stage")
    copy = Path(found.path)
    assert copy.stat().st_size == size
    assert copy.stat().st_blocks * 512 < 1 << 20
    with open(copy, "rb") as file:
        file.seek(size // 2)
        assert file.read(4096) == b"\x01" * 4096


@pytest.mark.parametrize(
    ("location", "offset", "message"),
    [
        ("../source.bin", 8, "outside the model's folder"),
        ("/etc/hostname", 0, "outside the model's folder"),
        ("absent.bin", 0, "is missing"),
        ("source.bin", 1 << 30, "past the end"),
        ("link.bin", 0, "outside the model's folder"),
    ],
)
def test_ranges_that_cannot_be_trusted_are_refused(
    tmp_path: Path, location: str, offset: int, message: str
) -> None:
    (tmp_path / "source.bin").write_bytes(b"\0" * 64)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "source.bin").write_bytes(b"\0" * 64)
    (folder / "link.bin").symlink_to(tmp_path / "source.bin")
    shape = ir.Shape([2])
    tensor = ir.ExternalTensor(
        location, offset, 8, ir.DataType.FLOAT, shape=shape, name="w", base_dir=folder
    )
    with pytest.raises(WeightsError, match=message) as caught:
        weights.check_location(tensor)
    assert caught.value.hint


def test_a_full_disk_leaves_nothing_behind(
    numbers: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    """Run where the kernel itself refuses to write beyond a file size, as a full disk does."""
    out = tmp_path / "out"
    out.mkdir()
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "import onnx_ir as ir\n"
        "from sdopt import datafile, weights\n"
        "from sdopt.errors import StorageError\n"
        "try: datafile.write([weights.full((1 << 16,), 1.0, ir.DataType.FLOAT, 'w')],"
        " Path(sys.argv[1]), 's')\n"
        "except StorageError as error: print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, out], capture_output=True, text=True)
    assert "could not write weights" in ran.stdout
    assert "free some space" in ran.stdout
    assert list(out.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(StorageError, match="could not write weights"):
        datafile.write([ir.tensor(np.zeros(4, np.float32), name="w")], absent, "s")


def test_what_is_no_onnx_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x0a\xff\xff\xff not a model")
    with pytest.raises(BundleError, match="not an ONNX file"):
        modelfile.load(path)
    with pytest.raises(BundleError, match="no such ONNX file"):
        modelfile.load(tmp_path / "absent.onnx")


def test_rechunk_keeps_every_element() -> None:
    blocks = [np.arange(n) for n in (3, 0, 7, 1, 20)]
    chunks = list(weights.rechunk(blocks, 4))
    assert [chunk.size for chunk in chunks] == [4] * 7 + [3]
    np.testing.assert_array_equal(np.concatenate(chunks), np.concatenate(blocks))
