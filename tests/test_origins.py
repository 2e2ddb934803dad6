"""What a stage says of its weights: through passes, saves and loads, whatever they are called."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from sdopt import modelfile, origins, weights
from sdopt.adapters import merging, replaying, requests
from sdopt.errors import BundleError
from sdopt.manifest import RECORD_KEY
from sdopt.origins import Constant, Leaf, Made, Origin
from sdopt.staging import optimize_file
from tests.toolkit import model_of

BIG = (40, 20)
"""The shape of a weight that is written beside the file; 3200 bytes."""
TEXT = """g (float[n,20] x) => (float[n,40] y, float[n,2] z) {
    t = Transpose<perm=[1,0]>(big)
    y = MatMul(x, t)
    z = MatMul(x, small)
}"""


@pytest.fixture
def raw(tmp_path: Path) -> ir.Model:
    """A file with a large and a small weight, loaded."""
    rng = np.random.default_rng(0)
    arrays = {
        "big": rng.standard_normal(BIG).astype(np.float32),
        "small": rng.standard_normal((20, 2)).astype(np.float32),
    }
    modelfile.save(model_of(TEXT, arrays), tmp_path / "raw.onnx")
    return modelfile.load(tmp_path / "raw.onnx")


def tensor(model: ir.Model, name: str) -> ir.TensorProtocol:
    found = model.graph.initializers[name].const_value
    assert found is not None
    return found


def put(model: ir.Model, name: str, made: ir.TensorProtocol) -> None:
    value = model.graph.initializers[name]
    value.const_value, value.dtype, value.shape = made, made.dtype, ir.Shape(made.shape.numpy())


def saved(model: ir.Model, path: Path) -> tuple[ir.Model, dict[str, Origin]]:
    """The model after a save and a load, and the origins that it then knows."""
    modelfile.save(model, path)
    again = modelfile.load(path)
    known = origins.known(again)
    assert known is not None
    return again, dict(known.tables[0])


def test_a_raw_file_is_its_own_origin(raw: ir.Model) -> None:
    known = origins.known(raw)
    assert known is not None
    # A MatMul reads ``small`` as it is: there it lies as [in, out].
    wanted = {"big": Leaf("big", BIG), "small": Leaf("small", (20, 2), inputs_first=True)}
    assert known.tables == [wanted]


def test_what_passes_make_of_weights_is_recorded(raw: ir.Model, tmp_path: Path) -> None:
    big, small = tensor(raw, "big"), tensor(raw, "small")
    half = weights.cast(big, ir.DataType.FLOAT16)
    put(raw, "big", weights.concat([half, weights.full(BIG, 0.0, ir.DataType.FLOAT16)]))
    put(raw, "small", weights.reshaped(small, (2, 20)))
    again, table = saved(raw, tmp_path / "b.onnx")
    cast = Made("cast", (Leaf("big", BIG),), (("saturate", False), ("to", 10)))
    assert table["big"] == Made("concat", (cast, Constant(BIG)), (("axis", 0),))
    first = Leaf("small", (20, 2), inputs_first=True)
    assert table["small"] == Made("reshape", (first,), (("shape", (2, 20)),))
    # A second stage builds on the first: its origins are still the raw weights.
    put(again, "big", weights.reshaped(tensor(again, "big"), (20, 80)))
    _, table = saved(again, tmp_path / "c.onnx")
    inner = Made("concat", (cast, Constant(BIG)), (("axis", 0),))
    assert table["big"] == Made("reshape", (inner,), (("shape", (20, 80)),))


def test_names_do_not_matter(raw: ir.Model, tmp_path: Path) -> None:
    values = list(raw.graph.initializers.values())
    raw.graph.initializers.clear()
    for value, name in zip(values, ("small", "other"), strict=True):
        value.name = name
        raw.graph.initializers[name] = value
    _, table = saved(raw, tmp_path / "b.onnx")
    assert table["small"] == Leaf("big", BIG)
    assert table["other"] == Leaf("small", (20, 2), inputs_first=True)


def test_what_nobody_made_a_recipe_for_is_unknown(raw: ir.Model, tmp_path: Path) -> None:
    big = tensor(raw, "big")
    put(raw, "big", weights.BlockTensor(lambda: weights.read_blocks(big), big.dtype, BIG))
    put(raw, "small", ir.tensor(np.ones((20, 2), np.float32)))
    _, table = saved(raw, tmp_path / "b.onnx")
    assert table["big"] == origins.UNKNOWN
    assert table["small"] == Constant((20, 2))
    assert origins.is_unknown(Made("cast", (table["big"],)))


def test_the_record_is_small_where_nothing_changed(raw: ir.Model, tmp_path: Path) -> None:
    again, _ = saved(raw, tmp_path / "b.onnx")
    text = again.metadata_props[origins.ORIGINS_KEY]
    first = {"weight": "small", "shape": [20, 2], "inputs_first": True}
    assert json.loads(text)["weights"] == {"big": True, "small": first}


def test_a_file_that_no_pass_changed_is_raw(tmp_path: Path, raw: ir.Model) -> None:
    report = optimize_file(tmp_path / "raw.onnx", tmp_path / "same.onnx", "clean")
    assert not any(each.changed for each in report.components[0].passes)
    model = modelfile.load(tmp_path / "same.onnx")
    assert RECORD_KEY in model.metadata_props
    known, wanted = origins.known(model), origins.known(raw)
    assert known is not None
    assert wanted is not None
    assert known.tables == wanted.tables


@pytest.mark.parametrize("text", ["no JSON", '{"schema": 1}', '{"weights": {"big": {"how": 1}}}'])
def test_a_record_that_cannot_be_read(raw: ir.Model, tmp_path: Path, text: str) -> None:
    modelfile.save(raw, tmp_path / "b.onnx")
    modelfile.annotate(tmp_path / "b.onnx", tmp_path / "c.onnx", origins.ORIGINS_KEY, text)
    with pytest.raises(BundleError, match="cannot be read"):
        modelfile.load(tmp_path / "c.onnx")


def test_a_newer_record_says_so(raw: ir.Model, tmp_path: Path) -> None:
    modelfile.save(raw, tmp_path / "b.onnx")
    text = '{"schema": 2, "weights": {}}'
    modelfile.annotate(tmp_path / "b.onnx", tmp_path / "c.onnx", origins.ORIGINS_KEY, text)
    with pytest.raises(BundleError, match="newer sdopt"):
        modelfile.load(tmp_path / "c.onnx")


def test_a_large_weight_is_updated_in_blocks(tmp_path: Path) -> None:
    """256 MiB of weight, cast and joined to another: a few blocks are in memory at once."""
    side = 8192
    folder = tmp_path / "large"
    folder.mkdir()
    with open(folder / "data", "wb") as file:
        file.truncate(4 * side * side)
    big = ir.ExternalTensor(
        "data", 0, 4 * side * side, ir.DataType.FLOAT, shape=ir.Shape((side, side)),
        name="big", base_dir=folder,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    down, up = (rng.standard_normal(s).astype(np.float32) for s in ((2, side), (side, 2)))
    save_file({"big.lora_A.weight": down, "big.lora_B.weight": up}, tmp_path / "a.safetensors")
    (lora,) = requests.read([tmp_path / "a.safetensors"])
    update = merging.Update(lora.adapters[0], 1.0, False, lora.digest)
    leaf = Leaf("big", (side, side))
    origin = Made("concat", (Made("cast", (leaf,)), Constant((8, side))), (("axis", 0),))
    stored = weights.concat([big, weights.full((8, side), 0.0, ir.DataType.FLOAT)])
    made = replaying._update(origin, "big", {"big": [update]}, ir.DataType.FLOAT, "here")
    whole = replaying._sum(stored, made, "big")
    tracemalloc.start()
    try:
        first, count = None, 0
        for block in whole.blocks():
            first = block[: 2 * side].copy() if first is None else first
            count += block.size
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == (side + 8) * side
    assert first is not None
    np.testing.assert_allclose(first.reshape(2, side), up[:2] @ down, rtol=1e-5, atol=1e-5)
    assert peak < 10 * weights.BLOCK_BYTES < stored.nbytes


def test_equal_recipes_are_one_weight(raw: ir.Model) -> None:
    big = tensor(raw, "big")
    one, two = (weights.cast(big, ir.DataType.FLOAT16) for _ in range(2))
    assert weights.identity(one) == weights.identity(two)
    assert weights.identity(weights.reshape(one, (20, 40))) != weights.identity(one)
    unknown = [weights.BlockTensor(one.blocks, one.dtype, BIG) for _ in range(2)]  # type: ignore[attr-defined]
    assert weights.identity(unknown[0]) != weights.identity(unknown[1])


def test_every_linear_word_is_one_of_weights() -> None:
    """What is replayed by a word is what ``sdopt.weights`` writes under it."""
    big = ir.tensor(np.ones((4, 2, 3, 3), np.float32))
    made = [
        weights.cast(big, ir.DataType.FLOAT16),
        weights.concat([big, big]),
        weights.add(big, big),
        weights.reshape(big, (8, 9)),
        weights.channels_last(big),
        weights.transpose(ir.tensor(np.ones((4, 2), np.float32))),
    ]
    words = {one.recipe.how for one in made if isinstance(one, weights.BlockTensor)}
    assert words | {"lora"} == set(replaying._LINEAR)
