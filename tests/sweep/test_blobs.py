from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdopt.errors import BundleError, StorageError
from sdopt.sweep.blobs import PIECE, Blob, Cache, Digests, in_order, pieces
from sdopt.sweep.place import Place


def blob(data: bytes, path: str = "bundle/a.onnx_data") -> Blob:
    return Blob(path, hashlib.sha256(data).hexdigest(), len(data))


def test_a_file_travels_in_pieces_and_is_whole_at_its_place(tmp_path: Path) -> None:
    data = bytes(range(256)) * (2 * PIECE // 256) + b"the end"
    (tmp_path / "source").write_bytes(data)
    sent = list(pieces(tmp_path / "source"))
    assert [len(one) for one in sent] == [PIECE, PIECE, 7]
    place, cache = Place(tmp_path / "place"), Cache(tmp_path / "blobs")
    cache.place([blob(data), blob(data, "bundle/b.onnx_data")], place, lambda one: sent)
    for name in ("a", "b"):
        assert (place.bundle / f"{name}.onnx_data").read_bytes() == data


def test_other_bytes_than_announced_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    place, cache = Place(tmp_path / "place"), Cache(tmp_path / "blobs")
    with pytest.raises(StorageError, match="other bytes") as error:
        cache.place([blob(b"right")], place, lambda one: [b"wrong"])
    assert error.value.where == "bundle/a.onnx_data"
    assert not (place.root / "bundle").exists()
    assert [path.suffix for path in (tmp_path / "blobs").iterdir()] == [".lock"]
    cache.place([blob(b"right")], place, lambda one: [b"ri", b"ght"])
    assert (place.bundle / "a.onnx_data").read_bytes() == b"right"


def test_one_fetches_and_the_others_wait(tmp_path: Path) -> None:
    begun: list[str] = []

    def slow(one: Blob) -> Iterator[bytes]:
        begun.append(one.digest)
        time.sleep(0.2)
        yield b"data"

    def work(number: int) -> None:
        Cache(tmp_path / "blobs").place([blob(b"data")], Place(tmp_path / str(number)), slow)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    assert len(begun) == 1
    for number in range(3):
        assert (tmp_path / str(number) / "bundle/a.onnx_data").read_bytes() == b"data"


def test_what_was_made_here_is_not_fetched(tmp_path: Path) -> None:
    place, cache = Place(tmp_path / "place"), Cache(tmp_path / "blobs")
    (tmp_path / "made").write_bytes(b"mine")
    cache.add(blob(b"mine"), tmp_path / "made")
    cache.place([blob(b"mine")], place, lambda one: pytest.fail("it was fetched"))
    assert (place.bundle / "a.onnx_data").read_bytes() == b"mine"


def test_a_file_is_read_again_only_when_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"one")
    digests = Digests(tmp_path)
    first = digests.blob("a")
    assert first == blob(b"one", "a")
    with monkeypatch.context() as patch:
        patch.setattr("sdopt.sweep.blobs.digest_of", lambda file: pytest.fail("it was read"))
        assert digests.blob("a") == first
    (tmp_path / "a").write_bytes(b"other")
    assert digests.blob("a") == blob(b"other", "a")
    with pytest.raises(BundleError, match="missing"):
        digests.blob("b")


def test_graphs_come_behind_the_data_that_they_use() -> None:
    paths = ["u/model.onnx", "manifest.json", "u/model-12.onnx_data", "u/model.onnx"]
    assert in_order(paths) == ["manifest.json", "u/model-12.onnx_data", "u/model.onnx"]
