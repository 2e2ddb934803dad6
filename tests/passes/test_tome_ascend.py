"""``tome`` in Ascend's operators against its standard spelling, and what those do not take."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from diffusers import UNet2DConditionModel

from sdopt import graph, spec
from sdopt.errors import SpecError
from sdopt.passes import _ascend_merging as ascend
from sdopt.passes._self_attention import find
from sdopt.passes.cast_fp16 import CastFp16
from sdopt.passes.flash_attention import FlashAttention
from sdopt.passes.tome import Tome
from sdopt.pipeline import Pipeline, RunContext
from tests import ascend_ops
from tests.passes import tome_blocks as blocks
from tests.passes import tome_reference as ref
from tests.toolkit import Arrays, apply, leaves, ops, relative_l2, run

TIGHT, HALF = 5e-6, 5e-3
ASCEND = Tome(1, spelling="ascend")
SIZES = [(2, 8, 8), (1, 7, 9), (3, 6, 10)]


def feed(size: tuple[int, int, int], seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {"sample": rng.standard_normal((size[0], 4, *size[1:])).astype(np.float32)}


def both(size: tuple[int, int, int], seed: int = 0, **form: object) -> tuple[ir.Model, ir.Model]:
    """One block merged in each spelling."""
    standard, special = (blocks.model(size=size, **form) for _ in range(2))  # type: ignore[arg-type]
    assert sum(apply(Tome(1, seed=seed), standard).rewrites.values()) == 1
    assert sum(apply(Tome(1, seed=seed, spelling="ascend"), special).rewrites.values()) == 1
    return standard, special


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [0, 5])
def test_both_spellings_compute_the_same(size: tuple[int, int, int], seed: int) -> None:
    standard, special = both(size, seed)
    (wanted,) = run(standard, feed(size, seed))
    (unmerged,) = run(blocks.model(size=size), feed(size, seed))
    assert relative_l2(unmerged, wanted) > 1e-2
    (found,) = ascend_ops.run(special, feed(size, seed), precise=True)
    assert relative_l2(found, wanted) < TIGHT
    (half,) = ascend_ops.run(special, feed(size, seed))
    assert relative_l2(half, wanted) < HALF


@pytest.mark.parametrize(
    "form", sorted(set(blocks.FORMS) - {"a token count baked into the Reshapes"})
)
def test_every_form_of_the_block(form: str) -> None:
    size = (2, 8, 8)
    standard, special = both(size, **blocks.FORMS[form])
    (wanted,) = run(standard, feed(size))
    (found,) = ascend_ops.run(special, feed(size), precise=True)
    assert relative_l2(found, wanted) < TIGHT


def test_a_token_count_baked_into_the_reshapes() -> None:
    size = (2, 10, 9)
    standard, special = both(size, tokens="baked")
    (wanted,) = run(standard, feed(size))
    (found,) = ascend_ops.run(special, feed(size), precise=True)
    assert relative_l2(found, wanted) < TIGHT


def test_another_seed_gives_other_destinations_and_the_same_seed_the_same_bytes() -> None:
    size = (2, 8, 8)
    files = [ir.to_proto(both(size, seed)[1]).SerializeToString() for seed in (3, 3, 4)]
    assert files[0] == files[1] != files[2]
    standard, special = both(size, 3)[0], both(size, 4)[1]
    (wanted,) = run(standard, feed(size))
    (found,) = ascend_ops.run(special, feed(size), precise=True)
    assert relative_l2(found, wanted) > 1e-2


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("size", [(2, 2), (8, 8), (9, 8), (8, 9), (13, 23)])
def test_the_partition_is_that_of_the_standard_spelling(size: tuple[int, int], seed: int) -> None:
    part = ref.run_partition(*size, seed=seed)
    sources, destinations = ascend.split_tokens(*size, seed)
    assert sources.tolist() == sorted(part["sources"])
    assert destinations.tolist() == sorted(part["destinations"])


def test_names_wiring_and_shapes() -> None:
    batch, height, width = size = (2, 8, 8)
    model = blocks.model(size=size)
    apply(ASCEND, model)
    b, a, c = 16, height * width - 16, blocks.WIDTH
    merged = height * width // 2
    kinds = {node.op_type: node for node in model.graph}
    find_max, merge, restore = (kinds[n] for n in ("FindMax", "TomeMerged", "TomeUnmerged"))
    topk = kinds["TopK"]
    for node in (find_max, merge, restore):
        assert node.domain == ""
        assert not node.attributes

    def told(node: ir.Node) -> list[tuple[str, tuple[object, ...]]]:
        values = [*node.inputs, *node.outputs]
        return [(v.dtype.name, tuple(v.shape)) for v in values if v is not None and v.dtype]

    half = "FLOAT16"
    assert told(find_max) == [(half, (batch, a, b)), (half, (batch, a)), ("INT64", (batch, a))]
    assert told(merge) == [
        (half, (batch, a, c)),
        (half, (batch, b, c)),
        ("INT64", (batch, a)),
        ("INT64", (batch, a)),
        (half, (batch, a - merged, c)),
        (half, (batch, 8, b, c)),
        ("FLOAT", (batch, 8, b)),
    ]
    assert told(restore) == [
        (half, (batch, a - merged + b, c)),
        ("INT64", (batch, a)),
        ("INT64", (batch, b)),
        ("INT64", (batch, a)),
        ("INT64", (batch, a)),
        (half, (batch, a + b, c)),
    ]
    assert topk.inputs[0] is find_max.outputs[0]
    assert merge.inputs[2] is restore.inputs[3] is topk.outputs[1]
    assert merge.inputs[3] is restore.inputs[4] is find_max.outputs[1]
    attributes = {name: attr.value for name, attr in topk.attributes.items()}
    assert attributes == {"axis": -1, "largest": 1}
    shapes = {
        name: tuple(value.shape or ())
        for name, value in model.graph.initializers.items()
        if name.startswith("tome/") and "const" not in name
    }
    assert shapes == {
        "tome/Gather_index_a": (a,),
        "tome/Gather_index_b": (b,),
        "tome/index_a": (batch, a),
        "tome/index_b": (batch, b),
        "tome/Topk_k": (1,),
    }
    assert graph.constant(model.graph.initializers["tome/Topk_k"]) == [a]


def test_the_older_name() -> None:
    size = (2, 8, 8)
    model = blocks.model(size=size)
    apply(Tome(1, spelling="ascend", generation="cann7"), model)
    assert ops(model)["TomeUnmerge"] == 1
    assert "TomeUnmerged" not in ops(model)
    (wanted,) = run(both(size)[0], feed(size))
    (found,) = ascend_ops.run(model, feed(size), precise=True)
    assert relative_l2(found, wanted) < TIGHT


def test_merged_before_or_after_the_cast_to_half_precision() -> None:
    size = (2, 8, 8)
    (wanted,) = run(both(size)[0], feed(size))
    for passes in ([ASCEND, CastFp16()], [CastFp16(), ASCEND]):
        model = blocks.model(size=size)
        skips = [skip for one in passes for skip in apply(one, model).skips]
        assert not [skip for skip in skips if "Tome" in skip.reason or "FindMax" in skip.reason]
        half = {name: array.astype(np.float16) for name, array in feed(size).items()}
        (found,) = ascend_ops.run(model, half)
        assert found.dtype == np.float16
        assert relative_l2(found, wanted) < HALF


def test_the_attention_inside_is_known_to_be_shorter() -> None:
    size = (2, 8, 12)
    model = blocks.model(size=size)
    (before,) = run(both(size)[0], feed(size))
    text = "tome=1:spelling=ascend,flash_attention=duo"
    lower = Pipeline.parse(text).run(model, RunContext())[1]
    assert lower.rewrites == {"attention": 1}
    kernel = next(node for node in model.graph if node.op_type == "FlashAttentionTik")
    assert kernel.outputs[0].shape == ir.Shape([2, blocks.HEADS, 8 * 12 // 2, 40])
    (found,) = ascend_ops.run(model, feed(size), precise=True)
    assert relative_l2(found, before) < TIGHT


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (blocks.model(), "its batch, height and width are not fixed"),
        (blocks.model(size=(65, 4, 4)), "its batch size is 65"),
        (blocks.model(size=(1, 128, 128)), "it has 12288 sources"),
        (blocks.model(size=(1, 1, 8)), "thinner than a 2x2 cell"),
        (blocks.model(size=(1, 8, 8), kind="BFLOAT16"), "its type is bfloat16"),
        (blocks.model(size=(1, 8, 8), keys="context"), "come from another input"),
    ],
)
def test_leaves_alone(model: ir.Model, reason: str) -> None:
    leaves(ASCEND, model, reason)


def test_leaves_alone_channels_that_are_no_multiple_of_sixteen() -> None:
    model = blocks.model(size=(1, 8, 8))
    (site,) = find(model)[0]
    site.tokens.shape = ir.Shape([1, 64, 24])
    leaves(ASCEND, model, "its channels are 24")


@pytest.mark.parametrize(
    "text",
    ["tome=5:spelling=ascend", "tome=5:spelling=ascend:generation=cann7", "tome=2:seed=1"],
)
def test_options_go_round(text: str) -> None:
    assert str(spec.bind(Tome, spec.parse(text)[0])) == text


@pytest.mark.parametrize(
    "text",
    [
        "tome=5:spelling=ascend:ratio=0.25",
        "tome=5:generation=cann7",
        "tome=5:spelling=latin",
    ],
)
def test_wrong_options(text: str) -> None:
    with pytest.raises(SpecError):
        spec.bind(Tome, spec.parse(text)[0])


@functools.cache
def _sdxl() -> bytes:
    """A UNet with SDXL's structure: no attention at the highest resolution, two blocks deep."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16,
            cross_attention_dim=24,
            attention_head_dim=(2, 2, 4),
            block_out_channels=(8, 16, 32),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 1),
            use_linear_projection=True,
        ).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.13's exporter warns about itself
        program = torch.onnx.export(
            unet,
            (torch.randn(2, 4, 16, 16), torch.tensor(5.0), torch.randn(2, 7, 24)),
            kwargs={"return_dict": False},
            dynamo=True,
            opset_version=23,
            optimize=False,
            verbose=False,
            input_names=["sample", "timestep", "encoder_hidden_states"],
            output_names=["out_sample"],
        )
    assert program is not None
    program.model.ir_version = 10
    return ir.to_proto(program.model).SerializeToString()


def sdxl() -> ir.Model:
    return ir.from_proto(onnx.load_from_string(_sdxl()))


def test_all_ten_of_sdxl_are_found_one_level_below_the_highest() -> None:
    standard, special = sdxl(), sdxl()
    rng = np.random.default_rng(0)
    given = {
        "sample": rng.standard_normal((2, 4, 16, 16)).astype(np.float32),
        "timestep": np.array(5, np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 7, 24)).astype(np.float32),
    }
    for one, model in ((Tome(10), standard), (Tome(10, spelling="ascend"), special)):
        levels = [site.level for site in find(model)[0]]
        assert (levels.count(1), levels.count(2)) == (10, 6)
        ctx = apply(one, model)
        assert list(ctx.rewrites.values()) == [10]
        assert not ctx.notes
        reasons = [skip.reason for skip in ctx.skips]
        assert reasons.count("its resolution is 1/2 of the highest") == 6
    assert ops(special)["TomeMerged"] == 10
    apply(FlashAttention("duo"), special)
    assert ops(special)["FlashAttentionTik"] == 32
    (wanted,) = run(standard, given)
    (found,) = ascend_ops.run(special, given, precise=True)
    assert relative_l2(found, wanted) < TIGHT
