"""The matrix is whole, its graphs are the ones it names, and the counts are PyTorch's."""

from __future__ import annotations

import lzma

import onnx
import pytest

from tests.surgery import cells, counts, exports, models, weightless
from tests.surgery.cells import Cell

PINNED = [
    Cell("unet", "torchscript", 11, "eager", "static", "fp32"),
    Cell("text_encoder", "torchscript", 14, "sdpa", "dynamic", "fp16"),
    Cell("vae_decoder", "torchscript", 17, "sdpa", "dynamic", "fp32"),
    Cell("text_encoder", "dynamo", 18, "eager", "static", "fp16"),
    Cell("text_encoder", "dynamo", 21, "eager", "static", "fp16"),
    Cell("vae_decoder", "dynamo", 23, "sdpa", "dynamic", "fp32"),
]
"""Exported again here: each opset, both attentions, shapes, types and all models."""


def test_every_cell_is_shipped_or_refused() -> None:
    graphs, refused = cells.manifest()["graphs"], cells.manifest()["refused"]
    assert len(cells.CELLS) == 3 * 48
    assert {*graphs, *refused} == set(map(str, cells.CELLS))
    assert not set(graphs) & set(refused)
    sdpa_before_14 = [c for c in cells.CELLS if c.opset == 11 and c.attention == "sdpa"]
    assert set(refused) == set(map(str, sdpa_before_14))
    assert all("scaled_dot_product_attention" in text for text in refused.values())


def test_graphs_are_the_ones_that_the_manifest_names() -> None:
    assert cells.ARCHIVE.stat().st_size <= 3 << 20
    assert len(lzma.decompress(cells.ARCHIVE.read_bytes())) > 40 * cells.ARCHIVE.stat().st_size
    assert cells.shipped_names() == {f"{cell}.onnx" for cell in cells.shipped()}
    for cell in cells.shipped():
        assert cells.graph_file(cell)


def test_graphs_hold_no_weights_and_no_paths() -> None:
    for cell in cells.shipped():
        data = cells.graph_file(cell)
        assert b"site-packages" not in data
        assert b"/tests/" not in data
        model = onnx.load_from_string(data)
        verbatim, referred = weightless.elements(model)
        assert verbatim <= 2**20
        assert referred >= sum(
            array.size for array in models.parameters(cell.model, "fp32").values()
        )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model", cells.MODELS)
def test_counts_are_those_of_the_modules(model: str, attention: str) -> None:
    assert cells.manifest()["counts"][model] == counts.counted(model, attention)


def test_the_unet_has_the_structure_of_stable_diffusion_1_5() -> None:
    found = cells.manifest()["counts"]["unet"]
    kinds = ("attention", "group_norm", "layer_norm", "geglu")
    assert [found[kind] for kind in kinds] == [32, 61, 48, 16]


@pytest.mark.parametrize("cell", PINNED, ids=str)
def test_torch_exports_the_shipped_graph_today(cell: Cell) -> None:
    today = weightless.strip(exports.export(cell), models.parameters(cell.model, cell.dtype))
    shipped = onnx.load_from_string(cells.graph_file(cell))
    assert weightless.structure(today) == weightless.structure(shipped)


@pytest.mark.parametrize("model", ["text_encoder", "vae_decoder"])
def test_torch_refuses_sdpa_before_opset_14_today(model: str) -> None:
    cell = Cell(model, "torchscript", 11, "sdpa", "static", "fp32")
    with pytest.raises(Exception, match="scaled_dot_product_attention") as caught:
        exports.export(cell)
    text = cells.manifest()["refused"][str(cell)]
    assert text == f"{type(caught.value).__name__}: {str(caught.value).splitlines()[0]}"
