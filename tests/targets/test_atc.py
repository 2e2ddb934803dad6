"""atc: what is lowered passes its dialect and computes the same; the compiler is a script here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from sdopt import api, artifacts, graph, modelfile, registry
from sdopt.errors import (
    BuildError,
    MissingDependencyError,
    SdoptError,
    SpecError,
    StorageError,
    UsageError,
)
from sdopt.passes.base import Role
from sdopt.pipeline import Pipeline, RunContext
from sdopt.shapes import Request, parse_sizes
from sdopt.targets import _atc_dialect
from sdopt.targets._atc_session import OmSession
from sdopt.targets.atc import Atc
from sdopt.targets.base import Order
from sdopt.tolerance import FP32_REASSOCIATED
from tests import ascend_ops
from tests.exporters.made import copy_of_digits
from tests.toolkit import Arrays, model_of, relative_l2, run

ROLES = {
    "text_encoder": Role.TEXT_ENCODER,
    "unet": Role.DENOISER,
    "vae_encoder": Role.VAE_ENCODER,
    "vae_decoder": Role.VAE_DECODER,
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model as a bundle in fp32, optimized."""
    return copy_of_digits(tmp_path_factory)


def sized(text: str, shapes: str = "64x64", batch: tuple[int, int] = (1, 1)) -> Atc:
    target = registry.make("targets", text)
    assert isinstance(target, Atc)
    return target.sized(Request(parse_sizes(shapes), batch))


def lowered(target: Atc, bundle: Path, name: str) -> ir.Model:
    """A component through the target's passes and its checker, and onnx's."""
    model = modelfile.load(bundle / name / "optimized.onnx")
    pipeline = Pipeline.parse(target.lowering(ROLES[name])).for_role(ROLES[name])
    pipeline.run(model, RunContext(name, ROLES[name]))
    target.check_legal(model)
    modelfile.check(model, graph.vendor_ops(model))
    assert graph.opset(model) == target.opset
    assert model.ir_version <= 8
    return model


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def feeds(name: str, batch: int = 1, height: int = 64, width: int = 64) -> Arrays:
    h, w = height // 8, width // 8
    return {
        "text_encoder": {"input_ids": np.arange(77 * batch).reshape(batch, 77) % 40},
        "unet": {
            "sample": floats(batch, 4, h, w),
            "timestep": np.array([421], np.int32),
            "encoder_hidden_states": floats(batch, 77, 96),
        },
        "vae_encoder": {"sample": floats(batch, 3, height, width)},
        "vae_decoder": {"latent_sample": floats(batch, 4, h, w)},
    }[name]


def by_ort(path: Path, values: Arrays) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return np.asarray(ort.InferenceSession(str(path), options).run(None, dict(values))[0])


def canonical(bundle: Path, name: str, values: Arrays) -> np.ndarray:
    given = dict(values)
    if name == "unet":
        given["timestep"] = np.array(421, np.float32)
    return by_ort(bundle / name / "optimized.onnx", given)


@pytest.mark.parametrize("opset", [11, 14, 17])
@pytest.mark.parametrize("name", ROLES)
def test_every_graph_of_the_miniature_model_lowers_and_computes_the_same(
    digits: Path, tmp_path: Path, name: str, opset: int
) -> None:
    model = lowered(sized(f"atc:soc=Ascend310P3:opset={opset}"), digits, name)
    modelfile.save(model, tmp_path / "m.onnx")
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
    values = feeds(name, 2 if name == "unet" else 1)
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.shape.is_static()
        assert list(value.shape.numpy()) == list(values[value.name or ""].shape)
    found = by_ort(tmp_path / "m.onnx", values)
    assert relative_l2(found, canonical(digits, name, values)) < FP32_REASSOCIATED


@pytest.mark.parametrize("name", ROLES)
def test_gears_stay_dynamic_and_compute_the_same_at_each(
    digits: Path, tmp_path: Path, name: str
) -> None:
    model = lowered(sized("atc:soc=Ascend310P3", "64x64,64x72", (1, 2)), digits, name)
    modelfile.save(model, tmp_path / "m.onnx")
    for batch, width in ((1, 64), (2, 72)):
        values = feeds(name, batch, width=width)
        found = by_ort(tmp_path / "m.onnx", values)
        assert relative_l2(found, canonical(digits, name, values)) < FP32_REASSOCIATED
    dynamic = {
        str(d.value) for v in model.graph.inputs for d in v.shape or () if hasattr(d, "value")
    }
    assert not {d for d in dynamic if "height" in d}, "both sizes are 64 high"
    assert dynamic


def test_mindie_kernels_compute_the_same_in_the_reference_evaluator(digits: Path) -> None:
    target = sized("atc:soc=Ascend310P3:attention=duo:gelu=kernel")
    model = lowered(target, digits, "unet")
    counts = graph.op_counts(model)
    assert counts["FlashAttentionTik"] == 32
    assert counts["SliceTransGeluMul"] > 0
    quick = modelfile.load(digits / "unet" / "optimized.onnx")
    Pipeline.parse("quick_gelu").run(quick, RunContext())
    wanted = run(_inlined(quick), feeds("unet", 2) | {"timestep": np.array(421, np.float32)})
    found = ascend_ops.run(_inlined(model), feeds("unet", 2), precise=True)
    assert relative_l2(found[0], wanted[0]) < FP32_REASSOCIATED


def test_merged_tokens_are_those_of_the_standard_spelling(digits: Path) -> None:
    model = lowered(sized("atc:soc=Ascend310P3:tome=5"), digits, "unet")
    assert graph.op_counts(model)["TomeMerged"] == 5
    standard = modelfile.load(digits / "unet" / "optimized.onnx")
    Pipeline.parse("tome=5").run(standard, RunContext("unet", Role.DENOISER))
    given = feeds("unet", 2) | {"timestep": np.array(421, np.float32)}
    (wanted,) = run(_inlined(standard), given)
    (found,) = ascend_ops.run(_inlined(model), feeds("unet", 2), precise=True)
    (apart,) = run(_inlined(modelfile.load(digits / "unet" / "optimized.onnx")), given)
    assert relative_l2(found, wanted) < FP32_REASSOCIATED
    assert relative_l2(apart, wanted) > 100 * FP32_REASSOCIATED, "merging changes nothing here"


def _inlined(model: ir.Model) -> ir.Model:
    for value in modelfile.initializers(model):
        if value.const_value is not None and not isinstance(value.const_value, ir.Tensor):
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    return model


@pytest.mark.parametrize("name", ROLES)
def test_all_of_ascend_in_half_precision_passes_the_checker(digits: Path, name: str) -> None:
    target = sized("atc:soc=Ascend310P3:dtype=fp16:attention=duo:tome=5:gelu=kernel", "128x128")
    model = lowered(target, digits, name)
    counts = graph.op_counts(model)
    if name == "unet":
        assert counts["TomeMerged"] == counts["TomeUnmerged"] == 5
        assert counts["FlashAttentionTik"] == 32
    if name.startswith("vae"):
        assert counts["FlashAttentionTik"] == 1
    kept = {str(value.dtype) for value in (*model.graph.inputs, *model.graph.outputs)}
    assert kept <= {"FLOAT", "INT32", "INT64"}


def test_a2_takes_what_its_kernel_has_and_leaves_the_rest_decomposed(digits: Path) -> None:
    target = sized("atc:soc=Ascend910B3:attention=a2", "512x512")
    counts = graph.op_counts(lowered(target, digits, "unet"))
    assert "Attention" not in counts
    assert counts["Softmax"] + counts.get("UnpadFlashAttentionMix", 0) == 32


def test_int8_layers_are_ascends(digits: Path) -> None:
    model = model_of(
        """g (float[2,3,8] x) => (float[2,3,6] y) {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            w = DequantizeLinear<axis=1>(W, ws)
            y = MatMul(d, w)
        }""",
        {
            "s": np.array(0.03, np.float32),
            "z": np.array(0, np.int8),
            "W": np.arange(48, dtype=np.int8).reshape(8, 6),
            "ws": np.full(6, 0.01, np.float32),
        },
    )
    target = sized("atc:soc=Ascend310P3:dtype=int8")
    with pytest.raises(BuildError, match="ATC registers no QuantizeLinear"):
        _check_as(target, model, "clean,lower_opset=17")
    _check_as(target, model, target.lowering(Role.MODEL))
    assert {"AscendQuant", "AscendDequant"} <= graph.op_counts(model).keys()
    with pytest.raises(BuildError, match="nothing in unet is in int8"):
        target.commands([order(digits / "unet" / "model.onnx")])


def _check_as(target: Atc, model: ir.Model, passes: str) -> None:
    tried = model.clone() if "lower_ascend" not in passes else model
    Pipeline.parse(passes).run(tried, RunContext())
    target.check_legal(tried)


# Twenty and more graphs that ATC would refuse, each for a reason of its own.

X = "g (float[2,4,8,40] x) => (float[A,B,C,D] y)"
H = "g (float16[2,4,8,40] x) => (float16[A,B,C,D] y)"
TOKENS = "g (float16[2,6,32] x) => (float16[A,B,C] y)"
ILLEGAL: list[tuple[str, str, int, str]] = [
    ("a newer opset", f"{X} {{ y = Relu(x) }}", 19, "up to opset 18"),
    ("an older opset", f"{X} {{ y = Relu(x) }}", 10, "from opset 11 on"),
    ("com.microsoft", f"{X} {{ y = com.microsoft.FastGelu(x) }}", 17, "domain 'com.microsoft'"),
    ("a domain of npu", f"{X} {{ y = npu.NPUGeluV2(x) }}", 17, "domain 'npu'"),
    ("GroupNormalization", f"{X} {{ y = GroupNormalization(x, x, x) }}", 17, "not among"),
    ("Gelu", f"{X} {{ y = Gelu(x) }}", 17, "not among"),
    ("Attention", f"{X} {{ y = Attention(x, x, x) }}", 17, "not among"),
    ("RMSNormalization", f"{X} {{ y = RMSNormalization(x, x) }}", 17, "not among"),
    ("RotaryEmbedding", f"{X} {{ y = RotaryEmbedding(x, x, x) }}", 17, "not among"),
    ("a kernel of nobody", f"{X} {{ y = FlashAttention(x, x, x) }}", 17, "not among"),
    ("QuantizeLinear", f"{X} {{ y = QuantizeLinear(x, x) }}", 17, "no QuantizeLinear"),
    ("DequantizeLinear", f"{X} {{ y = DequantizeLinear(x, x) }}", 17, "no QuantizeLinear"),
    ("LayerNormalization at 16", f"{X} {{ y = LayerNormalization(x, x) }}", 16, "opset 17 to 18"),
    ("HardSwish at 13", f"{X} {{ y = HardSwish(x) }}", 13, "opset 14 to 18"),
    ("Trilu at 13", f"{X} {{ y = Trilu(x) }}", 13, "opset 14 to 18"),
    ("CastLike at 14", f"{X} {{ y = CastLike(x, x) }}", 14, "opset 15 to 18"),
    ("Mish at 17", f"{X} {{ y = Mish(x) }}", 17, "opset 18 to 18"),
    (
        "Split in two at 17",
        f"{X} {{ y, z = Split<num_outputs=2>(x) }}",
        17,
        "no attribute num_out",
    ),
    ("allowzero at 13", f"{X} {{ y = Reshape<allowzero=1>(x, x) }}", 13, "no attribute allowzero"),
    ("axes of a mean at 17", f"{X} {{ y = ReduceMean(x, x) }}", 17, "takes 1 inputs"),
    ("axes of a Squeeze at 12", f"{X} {{ y = Squeeze(x, x) }}", 12, "takes 1 inputs"),
    ("bfloat16", f"{X} {{ y = Cast<to=16>(x) }}", 17, "makes bfloat16"),
    ("float8", f"{X} {{ y = Cast<to=17>(x) }}", 17, "makes float8e4m3fn"),
    ("attention in fp32", f"{X} {{ y = FlashAttentionTik(x, x, x) }}", 17, "takes float16"),
    ("two operands", f"{H} {{ y = FlashAttentionTik(x, x) }}", 17, "takes 3 inputs"),
    ("a scale", f"{H} {{ y = FlashAttentionTik<scale=1.0>(x, x, x) }}", 17, "attribute scale"),
    (
        "a head of 36",
        f"{H.replace('40', '36')} {{ y = FlashAttentionTik(x, x, x) }}",
        17,
        "head size 36",
    ),
    (
        "a dynamic length",
        f"{H.replace('8', 'S')} {{ y = FlashAttentionTik(x, x, x) }}",
        17,
        "not fixed",
    ),
    ("three axes", f"{TOKENS} {{ y = UnpadFlashAttentionMix(x, x, x) }}", 17, "has 3 axes"),
    ("one result of FindMax", f"{TOKENS} {{ y = FindMax(x) }}", 17, "gives 2 outputs"),
    ("no offset", f"{X} {{ y = AscendQuant<scale=2.0>(x) }}", 17, "lacks the attribute offset"),
    ("a float scale", f"{X} {{ i = Cast<to=6>(x) y = AscendDequant(i, x) }}", 17, "takes float16"),
    (
        "an input of a bad name",
        'g (float[2] "a:b") => (float[2] y) { y = Relu("a:b") }',
        17,
        "--input_shape is written with",
    ),
    ("an input of bfloat16", "g (bfloat16[2] x) => (bfloat16[2] x) { }", 17, "it is bfloat16"),
]


@pytest.mark.parametrize(
    ("text", "opset", "reason"), [row[1:] for row in ILLEGAL], ids=[row[0] for row in ILLEGAL]
)
def test_a_planted_illegal_graph_is_refused(text: str, opset: int, reason: str) -> None:
    plain = text.replace('"a:b"', "ab")
    model = model_of(plain, opset=opset)
    model.ir_version = 8
    for value in model.graph.inputs:
        value.name = "a:b" if value.name == "ab" else value.name
    _type(model)
    for node in model.graph:
        node.metadata_props[graph.MODULE_KEY] = "down_blocks.0.it"
    with pytest.raises(BuildError, match=re.escape(reason)) as caught:
        sized("atc:soc=Ascend310P3").check_legal(model)
    if "cannot take" in caught.value.message and "input" not in caught.value.message:
        assert "down_blocks.0.it" in str(caught.value)
    assert caught.value.hint


def _type(model: ir.Model) -> None:
    """The types of intermediate values, which ONNX's text does not have."""
    for node in model.graph:
        for value in node.outputs:
            if node.op_type == "Cast" and not value.dtype:
                value.type = ir.TensorType(ir.DataType(graph.attribute(node, "to")))
            elif node.op_type == "Cast":
                value.dtype = ir.DataType(graph.attribute(node, "to"))


def test_a_newer_file_format_is_refused() -> None:
    model = model_of(f"{X} {{ y = Relu(x) }}", opset=17)
    model.ir_version = 9
    with pytest.raises(BuildError, match="up to IR version 8"):
        sized("atc:soc=Ascend310P3").check_legal(model)


def test_the_table_is_of_operators_that_onnx_has() -> None:
    for name, (low, high) in _atc_dialect.REGISTERED.items():
        onnx.defs.get_schema(name, low)
        assert low <= high
    assert not any(onnx.defs.has(name) for name in _atc_dialect.KERNELS)


# What is asked for.


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("atc:soc=ascend310P3", "no chip of Ascend"),
        ("atc:soc=Ascend310P3/x", "no chip of Ascend"),
        ("atc:soc=310P3", "no chip of Ascend"),
        ("atc:opset=18", "opset must be 11 to 17"),
        ("atc:opset=10", "opset must be 11 to 17"),
        ("atc:tome=-1", "0 or more"),
        ("atc:dtype=bf16", "cannot be in bf16"),
        ("atc:dtype=fp8", "cannot be in fp8"),
        ("atc:dtype=fp64", "fp64"),
        ("atc:soc=Ascend910B3:attention=duo", "is for Ascend310P, not for Ascend910B3"),
        ("atc:soc=Ascend310P3:attention=a2", "is for Ascend910B, not for Ascend310P3"),
        ("atc:precision=fp8", "fp8"),
    ],
)
def test_options_that_cannot_be(text: str, reason: str) -> None:
    with pytest.raises((SpecError, UsageError), match=reason):
        registry.make("targets", text)


@pytest.mark.parametrize(
    ("text", "shapes", "batch", "reason"),
    [
        ("atc", "64x64", (1, 1), "which chip"),
        ("atc:soc=Ascend310P3", "64x64..128x128", (1, 1), "one by one"),
        ("atc:soc=Ascend310P3", "64x64", (1, 101), "101 gears"),
        ("atc:soc=Ascend310P3:tome=5", "64x64,128x128", (1, 1), "indices of tokens are per size"),
        ("atc:soc=Ascend310P3:tome=5", "64x64", (1, 2), "indices of tokens are per size"),
        ("atc:soc=Ascend310P3:attention=duo", "64x64,64x72", (1, 1), "compiled for one size"),
        ("atc:soc=Ascend310P3:gelu=kernel", "64x64,64x72", (1, 1), "compiled for one size"),
        ("atc:soc=Ascend310P3", "64x64,64x64", (1, 1), "there twice"),
        ("atc:soc=Ascend310P3", "65x64", (1, 1), "multiples of 8"),
        ("atc:soc=Ascend310P3", "big", (1, 1), "no size"),
    ],
)
def test_sizes_that_cannot_be(text: str, shapes: str, batch: tuple[int, int], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        sized(text, shapes, batch)


def test_an_unknown_chip_is_a_note_and_no_error() -> None:
    assert sized("atc:soc=Ascend310P3").notes() == []
    assert sized("atc:soc=Ascend910_9391").notes() == []
    (note,) = sized("atc:soc=Ascend999X_1").notes()
    assert "Ascend999X_1 is not among the chips known here" in note


@pytest.mark.parametrize(
    "text",
    ["atc:soc=Ascend310P3:attention=duo:tome=4", "atc:soc=Ascend910B4-1:parallel=true"],
)
def test_the_text_of_a_target_parses_back_to_it(text: str) -> None:
    target = registry.make("targets", text)
    assert str(target) == text
    made = target.sized(Request(parse_sizes("64x64"), (1, 1), {"tokens": (16, 16)}))
    assert registry.make("targets", str(made)) == made
    assert "tokens@16" in made.lowering(Role.DENOISER)


def order(path: Path, role: Role = Role.DENOISER, name: str = "unet") -> Order:
    return Order(name, role, path, [], (), (1, 1), lambda what, share: None)


def lines(bundle: Path, folder: Path, target: Atc) -> dict[str, str]:
    found = {}
    for name, role in ROLES.items():
        path = folder / name / f"{target.stage_name()}.onnx"
        path.parent.mkdir(exist_ok=True)
        modelfile.save(lowered(target, bundle, name), path)
        (found[name],) = target.commands([order(path, role, name)])
    return found


def test_the_command_of_each_component_for_one_size(digits: Path, tmp_path: Path) -> None:
    found = lines(digits, tmp_path, sized("atc:soc=Ascend310P3", "64x72"))
    assert found == {
        "text_encoder": "atc --framework=5 --model=text_encoder/atc.onnx "
        "--output=text_encoder/atc --soc_version=Ascend310P3 --input_format=ND "
        '--input_shape="input_ids:1,77" --log=error',
        "unet": "atc --framework=5 --model=unet/atc.onnx --output=unet/atc "
        "--soc_version=Ascend310P3 --input_format=NCHW "
        '--input_shape="sample:2,4,8,9;timestep:1;encoder_hidden_states:2,77,96" '
        '--optypelist_for_implmode="Gelu,Sigmoid" --op_select_implmode=high_performance '
        "--log=error",
        "vae_encoder": "atc --framework=5 --model=vae_encoder/atc.onnx --output=vae_encoder/atc "
        "--soc_version=Ascend310P3 --input_format=NCHW "
        '--input_shape="sample:1,3,64,72" --log=error',
        "vae_decoder": "atc --framework=5 --model=vae_decoder/atc.onnx --output=vae_decoder/atc "
        "--soc_version=Ascend310P3 --input_format=NCHW "
        '--input_shape="latent_sample:1,4,8,9" --log=error',
    }


def test_gears_of_sizes_and_batches(digits: Path, tmp_path: Path) -> None:
    target = sized("atc:soc=Ascend910B3:dtype=fp32:parallel=true", "64x64,72x64", (1, 2))
    found = lines(digits, tmp_path, target)
    assert '--input_shape="input_ids:-1,77" --dynamic_batch_size="1,2"' in found["text_encoder"]
    assert (
        '--input_format=ND --input_shape="sample:-1,4,-1,8;timestep:1;'
        'encoder_hidden_states:-1,77,96" --dynamic_dims="1,8,1;2,8,2;1,9,1;2,9,2"'
    ) in found["unet"]
    assert '"latent_sample:-1,4,-1,8" --dynamic_dims="1,8;2,8;1,9;2,9"' in found["vae_decoder"]
    assert '"sample:-1,3,-1,64" --dynamic_dims="1,64;2,64;1,72;2,72"' in found["vae_encoder"]
    assert all("--precision_mode_v2=origin" in line for line in found.values())
    assert all("atc_fp32_parallel" in line for line in found.values())


def test_parallel_models_take_half_of_the_batch(digits: Path) -> None:
    target = sized("atc:soc=Ascend310P3:parallel=true")
    shape = lowered(target, digits, "unet").graph.inputs[0].shape
    assert shape is not None
    assert shape[0] == 1


def test_an_axis_that_nothing_says_the_size_of(tmp_path: Path) -> None:
    model = model_of("g (float[B,tokens] x) => (float[B,tokens] y) { y = Relu(x) }", opset=17)
    modelfile.save(model, tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="how large the axis 'B' is"):
        sized("atc:soc=Ascend310P3").commands([order(tmp_path / "m.onnx")])


def test_a_graph_with_companions_is_refused(digits: Path, tmp_path: Path) -> None:
    model = modelfile.load(digits / "unet" / "optimized.onnx")
    Pipeline.parse("hoist").run(model, RunContext("unet", Role.DENOISER))
    modelfile.save(model, tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="has companions"):
        sized("atc:soc=Ascend310P3").commands([order(tmp_path / "m.onnx")])


def test_emit_only_writes_graphs_commands_and_what_to_copy(digits: Path) -> None:
    spec = "atc:soc=Ascend310P3:attention=duo:dtype=fp16"
    report = api.build(digits, spec, components=["unet"], shapes="64x64", emit_only=True)
    script = (digits / "build-atc_fp16.sh").read_text()
    page = (digits / "build-atc_fp16.md").read_text()
    assert "atc --framework=5 --model=unet/atc_fp16.onnx" in script
    subprocess.run(["sh", "-n", str(digits / "build-atc_fp16.sh")], check=True)
    for name in re.findall(r"^    (\S+)$", page, re.M):
        assert (digits / name).is_file(), name
    assert "FlashAttentionTik" in page
    assert "neither ATC nor an NPU has seen them" in page
    assert not report.components[0].artifact
    assert not list((digits / "unet").glob("*.om"))


def test_external_data_has_no_key_that_atc_misreads(digits: Path, tmp_path: Path) -> None:
    modelfile.save(lowered(sized("atc:soc=Ascend310P3"), digits, "unet"), tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    keys = {entry.key for one in proto.graph.initializer for entry in one.external_data}
    assert keys == {"location", "offset", "length"}
    assert not [path for path in (one.domain for one in proto.opset_import) if path]


def test_the_report_of_a_build_notes_an_unknown_chip(digits: Path) -> None:
    report = api.build(
        digits,
        "atc:soc=Ascend999X",
        components=["text_encoder"],
        emit_only=True,
        dry_run=True,
    )
    assert any("Ascend999X is not among the chips" in note for note in report.notes)


# The compiler, as a script that does what it is told to.

Fake = Callable[[str], Path]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Puts an ``atc`` on the PATH; its body finds the value of --output in ``$out``."""

    def put(body: str) -> Path:
        folder = tmp_path / "cann"
        folder.mkdir(exist_ok=True)
        script = folder / "atc"
        script.write_text(
            "#!/bin/sh\n"
            'for word in "$@"; do case "$word" in --output=*) out="${word#--output=}";;'
            ' --model=*) model="${word#--model=}";; esac; done\n' + body
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return folder

    return put


@pytest.fixture
def bundle(digits: Path, tmp_path: Path) -> Path:
    """A copy that a test may build in."""
    return Path(shutil.copytree(digits, tmp_path / "bundle"))


def build(bundle: Path, **options: object) -> dict[str, object]:
    report = api.build(
        bundle,
        "atc:soc=Ascend310P3",
        components=["text_encoder"],
        shapes="64x64",
        **options,  # type: ignore[arg-type]
    )
    assert report.components[0].artifact
    return report.components[0].artifact


def test_a_build_streams_the_log_and_keeps_the_model(bundle: Path, fake: Fake) -> None:
    folder = fake(
        'echo "ATC start working now"\necho "[WARNING] slow"\n'
        'echo "$@" > "$(dirname "$0")/words"\ncat "$model" > "${out}_linux_x86_64.om"\n'
    )
    said: list[str] = []
    first = build(bundle, progress=lambda what, share: said.append(what))
    made = bundle / "text_encoder" / "atc.om"
    assert made.read_bytes() == (bundle / "text_encoder" / "atc.onnx").read_bytes()
    assert any("ATC start working now" in line for line in said)
    assert first["facts"]["warnings"] == ["[WARNING] slow"]  # type: ignore[index]
    words = (folder / "words").read_text().split()
    assert "--input_shape=input_ids:1,77" in words
    assert not any('"' in word for word in words)
    assert build(bundle)["up_to_date"]
    graph_before = made.with_suffix(".onnx").read_bytes()
    assert build(bundle, force=True)["digest"] == first["digest"]
    assert made.with_suffix(".onnx").read_bytes() == graph_before


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            'echo fine\necho "E10001: Value [x] for parameter [soc_version] is invalid"\n'
            'echo "ATC run failed, Please check the detail log"\nexit 1\n',
            ["exit code 1", "E10001: Value [x]", "ATC run failed"],
        ),
        ('echo part > "$out.om"\nkill -9 $$\n', ["signal 9"]),
        ('echo part > "$out.om"\necho "[ERROR] disk"\nexit 3\n', ["exit code 3", "[ERROR] disk"]),
        ("exit 0\n", ["without a model", "printed nothing"]),
        ('touch "$out.om" "${out}_linux_x86_64.om"\n', ["2 models"]),
    ],
    ids=["an error", "a kill", "half a model", "nothing", "two models"],
)
def test_a_compiler_that_fails_leaves_what_was_there(
    bundle: Path, fake: Fake, body: str, words: list[str]
) -> None:
    made = bundle / "text_encoder" / "atc.om"
    for before in (None, b"an earlier model"):
        if before is not None:
            made.write_bytes(before)
        fake(body)
        with pytest.raises(BuildError) as caught:
            build(bundle, force=True)
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert "--emit-only" in str(caught.value)
        assert (made.read_bytes() if made.exists() else None) == before
        assert not [p for p in made.parent.iterdir() if p.name.startswith(".atc.om")]


def _is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state.split()[2] != "Z"


def test_an_interrupt_ends_the_compiler_and_what_it_started(
    bundle: Path, fake: Fake, tmp_path: Path
) -> None:
    fake('echo part > "$out.om"\nsleep 60 &\necho "started $!"\nwait\n')
    started: list[int] = []

    def interrupt(what: str, share: float) -> None:
        if found := re.search(r"started (\d+)", what):
            started.append(int(found[1]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(bundle, progress=interrupt)
    deadline = time.monotonic() + 20
    while _is_running(started[0]):  # a signal takes a moment to end a process
        assert time.monotonic() < deadline, "what the compiler started outlives it"
        time.sleep(0.05)
    assert not list((bundle / "text_encoder").glob("**/*.om"))
    assert not [p for p in (bundle / "text_encoder").iterdir() if p.name.startswith(".")]


def test_a_missing_compiler_says_what_to_do(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match="no atc on the PATH") as caught:
        build(bundle)
    assert "--emit-only" in str(caught.value)
    assert Atc(soc="Ascend310P3").compiler() == {}


def test_a_compiler_that_cannot_be_started(bundle: Path, fake: Fake) -> None:
    script = fake("exit 0\n") / "atc"
    script.write_text("#!/no/such/interpreter\n")
    with pytest.raises(BuildError, match="cannot be started"):
        build(bundle)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "unet").write_text("a file")
    scratch = artifacts.writing(tmp_path / "unet" / "atc.om")
    with pytest.raises(StorageError, match="could not write") as caught, scratch:
        pytest.fail("there is no folder to write to")
    assert str(tmp_path / "unet") in str(caught.value)


def test_a_path_that_atc_does_not_take(digits: Path, fake: Fake, tmp_path: Path) -> None:
    fake('cat "$model" > "$out.om"\n')
    path = tmp_path / "a folder"
    path.mkdir()
    modelfile.save(lowered(sized("atc:soc=Ascend310P3"), digits, "vae_decoder"), path / "m.onnx")
    with pytest.raises(UsageError, match="letters, digits"):
        sized("atc:soc=Ascend310P3").compile(
            order(path / "m.onnx", Role.VAE_DECODER), tmp_path / "made.om"
        )


# The runner.


class Adder:
    """A device whose model adds its inputs."""

    def inputs(self) -> list[tuple[str, str, tuple[int, ...]]]:
        return [("a", "float16", (2, -1)), ("b", "int32", (1,))]

    def outputs(self) -> list[tuple[str, str, tuple[int, ...]]]:
        return [("c", "float32", (2, -1))]

    def infer(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        assert [str(array.dtype) for array in arrays] == ["float16", "int32"]
        return [arrays[0].astype(np.float32) + arrays[1]]


def test_a_device_is_an_adapter_of_three_methods(tmp_path: Path) -> None:
    session = OmSession(tmp_path / "m.om", Adder())
    out = session.run({"b": np.array([3], np.int32), "a": np.ones((2, 5), np.float32)})
    assert (out["c"] == 4).all()
    assert session.inputs["a"].dims == (2, "a_1")
    with pytest.raises(UsageError, match="the graph takes a, b"):
        session.run({"a": np.ones((2, 5), np.float32)})


def test_an_om_needs_an_npu_and_a_lowered_graph_is_no_om(tmp_path: Path) -> None:
    target = Atc(soc="Ascend310P3")
    with pytest.raises(MissingDependencyError, match="on Ascend's NPUs only"):
        target.open(tmp_path / "unet.om")
    with pytest.raises(SdoptError, match="cannot be opened as an ONNX file"):
        target.open(tmp_path / "unet.onnx")
