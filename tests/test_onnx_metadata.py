from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdopt import modelfile, onnx_metadata
from sdopt.errors import BundleError
from tests.toolkit import model_of

BODY = "g (float[2] x) => (float[2] y) { y = Neg(x) }"


def written(path: Path, **entries: str) -> Path:
    model = model_of(BODY)
    model.metadata_props.update(entries)
    ir.save(model, path)
    return path


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=300), max_size=5))
def test_entries_are_those_that_onnx_reads(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, str]
) -> None:
    path = written(tmp_path_factory.mktemp("m") / "m.onnx", **entries)
    wanted = {one.key: one.value for one in onnx.load(path).metadata_props}
    assert onnx_metadata.entries(path) == wanted


def test_entries_behind_a_graph_that_is_merged_in(tmp_path: Path) -> None:
    """As ``modelfile.annotate`` writes them: a second message behind the first."""
    path = written(tmp_path / "m.onnx", first="1")
    more = onnx.ModelProto()
    more.metadata_props.add(key="sdopt.record", value="2")
    path.write_bytes(path.read_bytes() + more.SerializeToString())
    assert onnx_metadata.entries(path) == {"first": "1", "sdopt.record": "2"}
    assert modelfile.metadata(path) == {"first": "1", "sdopt.record": "2"}


def test_a_graph_of_ours_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = written(tmp_path / "ours.onnx", **{"sdopt.record": "x"})
    other = written(tmp_path / "other.onnx", author="me")

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("decoded")

    monkeypatch.setattr(onnx, "load", refuse)
    assert modelfile.metadata(ours) == {"sdopt.record": "x"}
    with pytest.raises(BundleError, match="not an ONNX file"):
        modelfile.metadata(other)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("m") / "m.onnx"
    path.write_bytes(data)
    try:
        onnx_metadata.entries(path)
    except ValueError:
        assert onnx_metadata.ours(path) is None


@pytest.mark.parametrize("keep", range(1, 60, 7))
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, keep: int) -> None:
    path = written(tmp_path / "m.onnx", **{"sdopt.record": "x" * 40})
    path.write_bytes(path.read_bytes()[:-keep])
    with pytest.raises(BundleError):
        modelfile.metadata(path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such ONNX file"):
        modelfile.metadata(tmp_path / "nowhere.onnx")
    (tmp_path / "empty.onnx").touch()
    assert onnx_metadata.ours(tmp_path / "empty.onnx") is None
