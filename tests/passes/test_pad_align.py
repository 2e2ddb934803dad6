"""``pad_align``'s upsamplers in graphs of a few nodes: what they become, what is left alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import graph, spec
from sdopt.errors import SpecError
from sdopt.passes.base import Numerics
from sdopt.passes.pad_align import PadAlign
from tests.passes.pad_graphs import (
    ASYMMETRIC,
    JOIN,
    SKIP_CONV,
    UPSAMPLE,
    align,
    build,
    left_alone,
    lines,
    run,
    unet,
)


def test_resize_takes_the_skips_size() -> None:
    model = unet()
    with pytest.raises(Exception, match="Non concat axis dimensions must match"):
        run(model, 7, 5)
    assert align(model).rewrites == {"upsampler": 1}
    assert lines(model) == [
        "skip = Conv(latent, k3)",
        "down = Conv(skip, k3)",
        "Shape_out = Shape(skip)",
        "Slice_out = Slice(Shape_out, [2], [4])",
        "Shape_out_1 = Shape(down)",
        "Slice_out_1 = Slice(Shape_out_1, [0], [2])",
        "Concat_out = Concat(Slice_out_1, Slice_out)",
        "Resize_out = Resize(down, , , Concat_out)",
        "conv = Conv(Resize_out, k3)",
        "out = Concat(conv, skip)",
    ]
    assert run(model, 7, 5).shape == (1, 4, 7, 5)


def test_crop_slices_a_doubling() -> None:
    model = unet()
    assert align(model, "crop").rewrites == {"upsampler": 1}
    assert lines(model)[2:7] == [
        "Shape_out = Shape(skip)",
        "Slice_out = Slice(Shape_out, [2], [4])",
        "Resize_out = Resize(down, , [1.0,1.0,2.0,2.0])",
        "Slice_out_1 = Slice(Resize_out, [0,0], Slice_out, [2,3])",
        "conv = Conv(Slice_out_1, k3)",
    ]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (7, 5), (8, 8), (9, 4), (31, 17)])
def test_crop_slices_what_takes_the_skips_size_already(height: int, width: int) -> None:
    resized = unet()
    align(resized)
    cropped = resized.clone()
    assert align(cropped, "crop").rewrites == {"upsampler": 1}
    assert [line for line in lines(cropped) if "= Resize" in line] == [
        "Resize_out_1 = Resize(down, , [1.0,1.0,2.0,2.0])"
    ]
    np.testing.assert_array_equal(run(cropped, height, width), run(resized, height, width))
    assert align(cropped, "crop").rewrites == {}


def test_pad_pads_the_input_and_crops_the_output() -> None:
    model = unet()
    assert align(model, "pad").rewrites == {"padded input": 1, "cropped output": 1, "upsampler": 1}
    assert lines(model)[:8] == [
        "Shape_out = Shape(latent)",
        "Slice_out = Slice(Shape_out, [2], [4])",
        "Mod_out = Mod(Slice_out, [2,2])",
        "Sub_out = Sub([2,2], Mod_out)",
        "Mod_out_1 = Mod(Sub_out, [2,2])",
        "Concat_out = Concat([0,0,0,0,0,0], Mod_out_1)",
        "Pad_out = Pad(latent, Concat_out)",
        "skip = Conv(Pad_out, k3)",
    ]
    assert lines(model)[-1] == "out = Slice(out_padded, [0,0], Slice_out, [2,3])"
    assert run(model, 7, 5).shape == (1, 4, 7, 5)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (7, 5), (8, 8), (9, 4), (31, 17)])
def test_resized_and_cropped_pick_the_same_pixels(height: int, width: int) -> None:
    resized, cropped = unet(), unet()
    align(resized)
    align(cropped, "crop")
    wanted = run(cropped, height, width)
    np.testing.assert_array_equal(run(resized, height, width), wanted)
    if height % 2 == width % 2 == 0:
        np.testing.assert_array_equal(run(unet(), height, width), wanted)


@pytest.mark.parametrize("opset", [11, 12, 13, 15, 19])
@pytest.mark.parametrize("mode", ["resize", "crop"])
def test_every_opset_with_sizes(opset: int, mode: str) -> None:
    model = unet(none="scales" if opset < 13 else '""', opset=opset)
    if opset < 13:
        # Resize 11 and 12 must be given a roi; nearest does not read it.
        node = next(node for node in model.graph if node.op_type == "Resize")
        roi = graph.add_initializer(model.graph, ir.tensor(np.zeros(8, np.float32)), "roi")
        node.replace_input_with(1, roi)
    align(model, mode)
    assert run(model, 7, 5).shape == (1, 4, 7, 5)


def test_opset_10_can_only_crop() -> None:
    text = SKIP_CONV + "up = Resize <mode='nearest'> (down, scales)" + JOIN
    (reason,) = left_alone(build(text, opset=10))
    assert "pad_align=crop" in reason
    model = build(text, opset=10)
    align(model, "crop")
    assert run(model, 7, 5).shape == (1, 4, 7, 5)


def test_half_precision_keeps_its_type() -> None:
    for mode in ("resize", "crop", "pad"):
        model = unet(dtype="float16")
        align(model, mode)
        out = run(model, 7, 5, np.float16)
        assert out.dtype == np.float16
        assert out.shape == (1, 4, 7, 5)


def test_nearest_with_half_pixel_centres_doubles_alike_and_is_aligned() -> None:
    modes = "coordinate_transformation_mode='half_pixel', nearest_mode='round_prefer_floor'"
    model = unet(modes)
    align(model)
    np.testing.assert_array_equal(run(model, 8, 6), run(unet(modes), 8, 6))
    cropped = unet()
    align(cropped, "crop")
    np.testing.assert_array_equal(run(model, 7, 5), run(cropped, 7, 5))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (unet(ASYMMETRIC, sides="8, 8"), "fixed in this graph"),
        (unet(ASYMMETRIC, scales="1, 1, 3, 3"), "scales by"),
        (unet(ASYMMETRIC, scales="1, 1, 1, 2"), "scales by"),
        (
            unet("coordinate_transformation_mode='half_pixel', nearest_mode='floor'"),
            "does not simply repeat pixels",
        ),
        (unet("nearest_mode='ceil', " + ASYMMETRIC.split(",")[0]), "does not simply repeat"),
        (build(SKIP_CONV + "up = Resize <mode='linear'> (down, , scales)" + JOIN), "linear"),
        (
            build(SKIP_CONV + "up = Upsample <mode='nearest'> (down, scales)" + JOIN, opset=9),
            "opset 11 or newer",
        ),
        (
            build(
                SKIP_CONV
                + "twice = Mul(scales, scales) live = ReduceMax<keepdims=0>(latent)"
                + " s = Mul(twice, live)"
                + UPSAMPLE.format(modes=ASYMMETRIC, none="").replace("scales", "s")
                + JOIN
            ),
            "computed when the graph runs",
        ),
    ],
    ids=["static", "by 3", "width only", "shifted", "ceil", "linear", "upsample", "dynamic"],
)
def test_an_upsampler_that_meets_a_skip_but_is_left_says_why(model: ir.Model, reason: str) -> None:
    for mode in ("resize", "crop", "pad"):
        (found,) = left_alone(model, mode)
        assert reason in found


@pytest.mark.parametrize(
    "joined",
    [
        "out = Conv <kernel_shape=[3,3], pads=[1,1,1,1]> (up, k3)",
        "out = Concat <axis=2> (up, up)",
        "c = Conv <kernel_shape=[3,3]> (up, k3) out = Concat <axis=1> (c, skip)",
        "c = Conv <kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2]> (up, k3)"
        " out = Concat <axis=1> (c, down)",
        "c = Relu(up) out = Concat <axis=1> (up, c)",
    ],
    ids=["no skip, as in a VAE", "other axis", "valid Conv", "stride 2", "meets itself"],
)
def test_an_upsampler_without_a_skip_is_no_business_of_this_pass(joined: str) -> None:
    for mode in ("resize", "crop", "pad"):
        assert left_alone(unet(joined=joined)) == []
        assert left_alone(unet(joined=joined), mode) == []


def test_padding_wants_one_image() -> None:
    model = unet()
    extra = ir.Value(name="residual", type=ir.TensorType(ir.DataType.FLOAT))
    extra.shape = ir.Shape(["b", 2, "rh", "rw"])
    model.graph.inputs.append(extra)
    (reason,) = left_alone(model, "pad")
    assert "single image input" in reason


def test_symbols_that_hold_no_longer_are_forgotten() -> None:
    model = unet()
    up = next(node for node in model.graph if node.op_type == "Resize").outputs[0]
    up.shape = ir.Shape(["b", 2, "2*((h-1)//2)+2", "w"])
    align(model)
    new = next(node for node in model.graph if node.op_type == "Resize").outputs[0]
    assert str(new.shape) == "[b,2,None,w]"


def test_options_are_read_and_printed() -> None:
    assert str(PadAlign()) == "pad_align"
    for text in ("pad_align=crop", "pad_align:mode=crop"):
        (item,) = spec.parse(text)
        assert spec.bind(PadAlign, item) == PadAlign("crop")
    (item,) = spec.parse(str(PadAlign("pad")))
    assert spec.bind(PadAlign, item) == PadAlign("pad")
    (item,) = spec.parse("pad_align=stretch")
    with pytest.raises(SpecError, match="mode must be"):
        spec.bind(PadAlign, item)
    exactness = [PadAlign(mode).exactness() for mode in ("resize", "crop", "pad")]
    assert exactness == [Numerics.EXACT, Numerics.EXACT, Numerics.LOSSY]
