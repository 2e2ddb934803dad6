"""What fuzzing found: the smallest input of each find, and what must be said of it now."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sdopt import api, artifacts, modelfile, reading, recorded
from sdopt.adapters import files, requests
from sdopt.bundle import Bundle
from sdopt.errors import BundleError, SourceError, SpecError, UsageError, WeightsError
from sdopt.exporters import DiffusersSource, SingleFileSource
from sdopt.manifest import Manifest
from sdopt.merging import Merge
from sdopt.pipeline import Pipeline
from tests.adversarial import text
from tests.fuzz import seeds
from tests.fuzz.harnesses import HARNESSES
from tests.fuzz.sandbox import EscapedError, Sandbox, sandbox

DEEP = "[" * 50_000 + "]" * 50_000
LONG = "9" * 5000


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with sandbox() as made:
        yield made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    seeds.bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def saved(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def small() -> onnx.ModelProto:
    """``y = Reshape(x, w)``."""
    body = "g (float[N] x) => (float[M] y) { y = Reshape(x, w) }"
    return text(body, {"w": np.array([-1])})


# The watch itself sees what it is for.


def test_a_write_outside_is_seen(box: Sandbox) -> None:
    work = box.fresh()
    with pytest.raises(EscapedError, match="escaped"):
        box.call(0, (work.parent / "escaped").write_text, "")
    (work.parent / "escaped").unlink()


def test_a_read_of_what_lies_outside_is_seen(box: Sandbox) -> None:
    work = box.fresh()
    with pytest.raises(EscapedError, match=r"secret\.bin"):
        box.call(0, (work.parent / "outside" / "secret.bin").read_bytes)


def test_a_large_allocation_is_seen(box: Sandbox) -> None:
    with pytest.raises(AssertionError, match="bytes were allocated"):
        box.call(0, np.ones, 1 << 27, np.uint8)


def test_an_error_that_is_not_ours_is_no_refusal(box: Sandbox) -> None:
    with pytest.raises(KeyError):
        box.call(0, {}.__getitem__, "x")


# Files outside.


def test_a_component_of_a_forged_manifest_is_packed_nowhere_else(root: Path) -> None:
    path = root / "manifest.json"
    table = json.loads(path.read_text())
    table["components"]["../../evil"] = table["components"].pop("unet")
    path.write_text(json.dumps(table))
    with pytest.raises(BundleError, match="cannot be read"):
        api.pack(root, root.parent / "a" / "b")
    assert not (root.parent / "evil").exists()


def test_a_folder_that_links_out_of_the_bundle_is_not_written_to(root: Path) -> None:
    outside = root.parent / "outside"
    (root / "unet").rename(outside)
    before = sorted(outside.iterdir())
    (root / "unet").symlink_to(outside)
    with pytest.raises(BundleError, match="link out of the bundle"):
        api.optimize(root, "clean", stage="more")
    assert sorted(outside.iterdir()) == before


def test_a_recorded_sample_that_is_a_link_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    home = tmp_path / "recorded"
    home.mkdir()
    (home / "a.npz").symlink_to(tmp_path / "secret")
    one = recorded.Sample("a.npz", recorded.digest_of(b"x"), "unet", {}, "", 0)
    with pytest.raises(BundleError, match="link to another file"):
        recorded.Recording(home, "k", {}, {}, (one,)).load(one)


# JSON of other kinds.


@pytest.mark.parametrize(
    "content",
    [DEEP, '{"a": ' + DEEP + "}", "[]", "null", '{"schema": ' + LONG + "}", "\udcff", '{"a"'],
    ids=["deep", "deep in a table", "list", "null", "digits", "no utf-8", "cut"],
)
def test_json_that_is_no_table_is_refused(content: str, root: Path) -> None:
    data = content.encode("utf-8", "surrogateescape")
    with pytest.raises(ValueError, match=r"\w"):
        reading.table(data)
    for name in ("manifest.json", "unet/config.json"):
        before = (root / name).read_bytes()
        (root / name).write_bytes(data)
        with pytest.raises(BundleError):
            Bundle.open(root).config("unet")
        (root / name).write_bytes(before)
    (root / "a").write_bytes(b"x")
    artifacts.record_path(root / "a").write_bytes(data)
    assert artifacts.recorded(root / "a") is None


@pytest.mark.parametrize(
    ("component", "entry"),
    [
        ("unet", {"folder": 1, "role": "x"}),
        ("unet", {"folder": "unet", "role": None}),
        ("unet", {"folder": "un\0et", "role": "x"}),
        ("unet", {"folder": "u" * 5000, "role": "x"}),
        ("unet", {"folder": "unet", "role": "x", "prefix": "p" * 5000}),
        ("a/b", {"folder": "unet", "role": "x"}),
        ("..", {"folder": "unet", "role": "x"}),
        ("unet", ["unet"]),
    ],
)
def test_a_manifest_of_other_types_is_refused(component: str, entry: Any) -> None:
    table = {"origin": "", "family": "", "components": {component: entry}}
    with pytest.raises(BundleError, match="cannot be read"):
        Manifest.loads(json.dumps(table), "here")


def test_a_prefix_is_no_pattern(root: Path) -> None:
    (root / "unet" / "model.onnx").rename(root / "unet" / "[a]**model.onnx")
    table = json.loads((root / "manifest.json").read_text())
    table["components"]["unet"]["prefix"] = "[a]**"
    (root / "manifest.json").write_text(json.dumps(table))
    assert Bundle.open(root).stages("unet") == ("model",)


def test_a_table_is_refused_where_a_list_is_due(box: Sandbox) -> None:
    one = HARNESSES["folder"]
    for data in one.seeds():
        table = json.loads(data[1:])
        for key in table:
            for wrong in ({}, [], None, 1, "x", [[1]], {"a": {"b": None}}):
                one.run(box, data[:1] + json.dumps({**table, key: wrong}).encode())


# ONNX.


def without_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 0


def of_a_type_that_is_none(model: onnx.ModelProto) -> None:
    attr = model.graph.node[0].attribute.add(name="t", type=onnx.AttributeProto.TENSOR)
    attr.t.data_type = 9999


def of_texts_elsewhere(model: onnx.ModelProto) -> None:
    at_a_place("w.bin")(model)
    model.graph.initializer[0].data_type = TensorProto.STRING


def of_many_axes(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [1] * 3000


def of_a_negative_size(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [-1]


def huge(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [10**15]


def fewer_texts(model: onnx.ModelProto) -> None:
    kind = TensorProto.STRING
    model.graph.initializer.append(TensorProto(name="s", data_type=kind, dims=[10**15]))


def fewer_of_four_bits(model: onnx.ModelProto) -> None:
    kind = TensorProto.INT4
    model.graph.initializer.append(TensorProto(name="s", data_type=kind, dims=[9], int32_data=[1]))


def at_a_place(location: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return change


def an_attribute_without_a_type(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.add(name="allowzero")


@pytest.mark.parametrize(
    "change",
    [
        without_type, of_texts_elsewhere, of_a_type_that_is_none, of_many_axes, of_a_negative_size, huge, fewer_texts, fewer_of_four_bits,
        at_a_place("w\0"), at_a_place("w" * 5000), at_a_place("/dev/zero"), at_a_place("../x"),
        at_a_place("w.bin/"),
        an_attribute_without_a_type,
    ],
)  # fmt: skip
def test_a_tensor_that_is_none_is_refused(
    change: Callable[[onnx.ModelProto], None], tmp_path: Path, box: Sandbox
) -> None:
    model = small()
    change(model)
    (tmp_path / "w.bin").write_bytes(bytes(8))
    path = saved(tmp_path / "a.onnx", model)
    with pytest.raises((BundleError, WeightsError)):
        modelfile.load(path)
    assert box.call(100, modelfile.load, path) is None


@pytest.mark.parametrize("name", [b"Reshape", b"x", b"y", b"w", b"ai.there"])
def test_names_that_are_no_utf8_are_refused(name: bytes, tmp_path: Path) -> None:
    model = small()
    model.opset_import.add(domain="ai.there", version=1)
    data = model.SerializeToString()
    path = tmp_path / "a.onnx"
    path.write_bytes(
        data.replace(bytes([len(name)]) + name, bytes([len(name)]) + b"\xff" * len(name))
    )
    with pytest.raises(BundleError, match="UTF-8"):
        modelfile.load(path)


def test_a_path_that_is_too_long_is_no_onnx_file() -> None:
    with pytest.raises(BundleError, match="not an ONNX file"):
        modelfile.load(Path("x" * 5000))


def test_no_pass_is_blamed_for_a_graph_that_is_not_valid(tmp_path: Path) -> None:
    model = small()
    del model.graph.node[0].input[1]
    path = saved(tmp_path / "a.onnx", model)
    with pytest.raises(BundleError, match="not valid ONNX") as caught:
        api.optimize_file(path, tmp_path / "b.onnx", "clean,raise_ops")
    assert "checker" in str(caught.value)
    assert not (tmp_path / "b.onnx").exists()


@pytest.mark.parametrize(
    "body",
    [
        "y = Sub(a, b) ",  # two types
        "t = Sub(a, a)\n y = Transpose<perm=[0,1,3,2]>(t)",  # more axes than there are
        "y = Gather<axis=3>(c, a)",
    ],
)
def test_operands_that_do_not_fit_are_left_as_they_are(body: str, tmp_path: Path) -> None:
    given = {"a": np.array([1, 2]), "b": np.array([1, 2], np.uint8), "c": np.array(1)}
    model = text(f"g (float[N] x) => (int64[K] z) {{ {body}\n z = Identity(y) }}", given)
    path = saved(tmp_path / "a.onnx", model)
    for passes in ("clean", "raise_ops", "@fast,flash_attention=ort", "quick_gelu"):
        api.optimize_file(path, tmp_path / "b.onnx", passes)


def test_a_shape_of_10_to_the_15_axes_is_not_written_down(box: Sandbox) -> None:
    path = box.fresh() / "a.onnx"
    model = text("g (float[N] x, int64[1000000000000000] s) => (float[M] y) { y = Reshape(x, s) }")
    saved(path, model)
    report = box.call(
        path.stat().st_size, api.optimize_file, path, path.with_name("b.onnx"), "clean,raise_ops"
    )
    assert report is not None


def test_what_could_grow_without_limit_is_not_folded(box: Sandbox) -> None:
    path = box.fresh() / "a.onnx"
    body = """g (float[N] x) => (float[K] y, int64[L] z, float[M] e, int64[R] r) {
        y = ConstantOfShape(huge)
        r = Range(zero, much, one)
        z = Tile(huge, huge)
        e = Expand(x, huge)
    }"""
    given = {
        "huge": np.array([10**15]),
        "zero": np.array(0),
        "much": np.array(10**15),
        "one": np.array(1),
    }
    saved(path, text(body, given))
    report = box.call(
        path.stat().st_size, api.optimize_file, path, path.with_name("b.onnx"), "@fast"
    )
    assert report is not None


def test_a_long_chain_is_read(box: Sandbox) -> None:
    path = box.fresh() / "a.onnx"
    nodes = [helper.make_node("Identity", [f"v{i}"], [f"v{i + 1}"]) for i in range(10_000)]
    ports = [helper.make_tensor_value_info(n, 1, ["N"]) for n in ("v0", "v10000")]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:])
    saved(path, helper.make_model(graph, ir_version=10))
    assert box.call(path.stat().st_size, api.inspect, path) is not None


@pytest.mark.parametrize("levels", [2, 28])
def test_bodies_in_bodies_are_read(levels: int, box: Sandbox) -> None:
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["leaf"])], "g", [], [])
    body.output.add(name="leaf").type.tensor_type.elem_type = 1
    for level in range(levels):
        node = helper.make_node("If", ["flag"], [f"o{level}"])
        for branch in ("then_branch", "else_branch") if level < 3 else ("then_branch",):
            node.attribute.add(name=branch, type=onnx.AttributeProto.GRAPH).g.CopyFrom(body)
        body = helper.make_graph([node], f"g{level}", [], [])
        body.output.add(name=f"o{level}").type.tensor_type.elem_type = 1
    body.input.append(helper.make_tensor_value_info("x", 1, ["N"]))
    body.input.append(helper.make_tensor_value_info("flag", 9, []))
    path = saved(box.fresh() / "a.onnx", helper.make_model(body, ir_version=10))
    assert box.call(path.stat().st_size, api.inspect, path) is not None
    box.call(path.stat().st_size, api.optimize_file, path, path.with_name("b.onnx"), "@fast")


# Weights, adapters, samples.


@pytest.mark.parametrize("shape", [[10**400], [0, 10**400], [1 << 63, 0], [1] * 40, [True], [-1]])
def test_shapes_that_no_tensor_has_are_refused(shape: list[int], tmp_path: Path) -> None:
    table = {"w": {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [0, 1]}}
    header = json.dumps(table).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(WeightsError, match="not a usable weights file"):
        files.read(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": "x"}, {"lora_alpha": 10**400}, {"alpha_pattern": {"(": 1}},
        {"alpha_pattern": [1]}, {"alpha_pattern": {"w.*": None, ".*": []}},
    ],
)  # fmt: skip
def test_an_alpha_that_is_none_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    shapes = {"unet.w_q.lora_A.weight": (2, 8), "unet.w_q.lora_B.weight": (8, 2)}
    path.write_bytes(seeds.tensors(shapes, lora_adapter_metadata=json.dumps(settings)))
    if settings.get("alpha_pattern", {}) == {"w.*": None, ".*": []}:
        assert files.read(path)[0].ratio == 1.0
        return
    with pytest.raises(WeightsError, match="alpha"):
        files.read(path)


@pytest.mark.parametrize("gone", [0, 1, 2, 5, 6, 7, 8, 11, 12, 13])
def test_a_checkpoint_without_one_of_its_tensors_is_refused_or_taken(
    gone: int, box: Sandbox
) -> None:
    data = seeds.checkpoints()[0]
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    names = [name for name in table if name != "__metadata__"]
    shapes = {n: tuple(table[n]["shape"]) for n in names if n != names[gone % len(names)]}
    path = box.fresh() / "a.safetensors"
    path.write_bytes(seeds.tensors(shapes))
    box.call(path.stat().st_size, _shared, path)
    path.write_bytes(seeds.tensors({**shapes, names[gone % len(names)]: ()}))
    box.call(path.stat().st_size, _shared, path)


def _shared(path: Path) -> object:
    return SingleFileSource(path).shared_files()


def test_a_number_of_layers_with_a_gap_makes_no_list_of_10_to_the_9(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    unet = "model.diffusion_model."
    shapes = {
        f"{unet}input_blocks.0.0.weight": (8, 4, 3, 3),
        f"{unet}input_blocks.999999999.0.x": (1,),
    }
    path.write_bytes(seeds.tensors(shapes))
    with pytest.raises(SourceError, match="gap"):
        SingleFileSource(path)


def zipped(member: bytes, **how: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **how) as archive:
        archive.writestr("x.npy", member)
    return stream.getvalue()


def npy(shape: tuple[int, ...], data: bytes = b"") -> bytes:
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + data


@pytest.mark.parametrize(
    "data",
    [
        zipped(npy((10**15,))),
        zipped(npy((1 << 25,), bytes(1 << 27)), compression=zipfile.ZIP_DEFLATED),
        zipped(npy((2,), b"\0")),
        zipped(b""),
        b"",
        b"PK",
    ],
    ids=["claims 4 PB", "inflates", "cut", "no array", "empty", "no zip"],
)
def test_a_sample_allocates_no_more_than_it_holds(data: bytes, box: Sandbox) -> None:
    work = box.fresh()
    (work / "a.npz").write_bytes(data)
    one = recorded.Sample("a.npz", recorded.digest_of(data), "u", {"x": ("float32", (2,))}, "", 0)
    made = recorded.Recording(work, "k", {}, {}, (one,))
    assert box.call(len(data), made.load, one) is None
    with pytest.raises(BundleError, match="cannot be read"):
        made.load(one)


# What users write.


@pytest.mark.parametrize("path", ["x" * 5000, "~nobody-of-that-name/x", "a\0b"])
def test_a_path_that_no_file_has_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match="no path"):
        requests.read([path])
    with pytest.raises(UsageError, match="no path"):
        Merge.parse([f"{path}:1"], in_place=False)
    with pytest.raises(UsageError, match="no path"):
        recorded.open_recording(path)


def test_a_recipe_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.recipe"
    path.write_bytes(b"clean\xff")
    with pytest.raises(SpecError, match="recipe cannot be read"):
        Pipeline.parse(str(path))
    with pytest.raises(SpecError, match="recipe cannot be read"):
        Pipeline.parse("a\0.recipe")


def test_many_options_take_no_quadratic_time(box: Sandbox) -> None:
    words = "clean" + "".join(f":o{i}=1" for i in range(20_000))
    box.call(len(words), Pipeline.parse, words)


def test_a_folder_with_a_null_in_a_shard_name_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "unet"
    home.mkdir()
    (home / "config.json").write_text(json.dumps(seeds.UNET))
    table = {"weight_map": {"w": "a\0.safetensors"}}
    (home / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(table))
    with pytest.raises(WeightsError, match="no file beside it"):
        DiffusersSource(tmp_path).fingerprint("unet")


def test_a_weight_is_read_to_its_end(tmp_path: Path) -> None:
    """The other side of it all: a valid file stays one."""
    path = saved(tmp_path / "a.onnx", small())
    held = modelfile.load(path).graph.initializers["w"].const_value
    assert held is not None
    assert held.numpy().tolist() == numpy_helper.to_array(small().graph.initializer[0]).tolist()
