"""pad_align and tome at sizes that nobody chose: other latents, depths, ratios, counts."""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdopt.passes.pad_align import PadAlign
from sdopt.passes.tome import Tome
from tests.passes import tome_blocks as blocks
from tests.passes import tome_reference as ref
from tests.toolkit import apply, model_of, run

few = settings(max_examples=15, deadline=None, derandomize=True, database=None)
sides = st.integers(1, 40)


def unet(levels: int, align: bool) -> ir.Model:
    """Halvings and doublings with a skip each; ``align`` resizes to the skip's own size."""
    lines = []
    for level in range(levels):
        above = f"d{level}" if level else "x"
        lines += [
            f"s{level} = Conv<pads=[1,1,1,1]>({above}, k)",
            f"d{level + 1} = Conv<pads=[1,1,1,1], strides=[2,2]>(s{level}, k)",
        ]
    value, nearest = (
        f"d{levels}",
        ('mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"'),
    )
    for level in reversed(range(levels)):
        if align:
            lines += [
                f"f{level} = Shape<start=0, end=2>({value})",
                f"g{level} = Shape<start=2>(s{level})",
                f"z{level} = Concat<axis=0>(f{level}, g{level})",
                f"u{level} = Resize<{nearest}>({value}, , , z{level})",
            ]
        else:
            lines.append(f"u{level} = Resize<{nearest}>({value}, , twice)")
        lines += [
            f"c{level} = Conv<pads=[1,1,1,1]>(u{level}, k)",
            f"j{level} = Concat<axis=1>(c{level}, s{level})",
            f"m{level} = Conv(j{level}, half)",
        ]
        value = f"m{level}"
    body = "\n".join([*lines, f"y = Identity({value})"])
    rng = np.random.default_rng(0)
    weights = {
        "k": (rng.standard_normal((2, 2, 3, 3)) / 4).astype(np.float32),
        "half": (rng.standard_normal((2, 4, 1, 1)) / 2).astype(np.float32),
        "twice": np.array([1, 1, 2, 2], np.float32),
    }
    used = weights if not align else {name: weights[name] for name in ("k", "half")}
    return model_of(f"g (float[B,2,H,W] x) => (float[B,2,P,Q] y) {{ {body} }}", used, opset=18)


@few
@given(
    levels=st.integers(1, 4),
    size=st.tuples(st.integers(1, 2), sides, sides),
    mode=st.sampled_from(["resize", "crop"]),
)
def test_pad_align_gives_the_skips_size_at_every_depth(
    levels: int, size: tuple[int, int, int], mode: str
) -> None:
    batch, height, width = size
    x = np.random.default_rng(1).standard_normal((batch, 2, height, width)).astype(np.float32)
    model = unet(levels, align=False)
    assert apply(PadAlign(mode), model).rewrites == {"upsampler": levels}  # type: ignore[arg-type]
    (after,) = run(model, {"x": x})
    (wanted,) = run(unet(levels, align=True), {"x": x})
    assert after.shape == x.shape
    np.testing.assert_array_equal(after, wanted)
    if height % 2**levels == width % 2**levels == 0:
        np.testing.assert_array_equal(after, run(unet(levels, align=False), {"x": x})[0])


def test_there_are_sizes_that_need_it() -> None:
    with pytest.raises(Exception, match="Non concat axis dimensions must match"):
        run(unet(2, align=False), {"x": np.zeros((1, 2, 6, 5), np.float32)})


@few
@given(
    height=st.integers(2, 33),
    width=st.integers(2, 33),
    ratio=st.floats(0.05, 0.75),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_partition_holds_every_token_once(
    height: int, width: int, ratio: float, seed: int
) -> None:
    part = ref.run_partition(height, width, ratio, seed)
    cells, tokens = (height // 2) * (width // 2), height * width
    sources, destinations = part["sources"], part["destinations"]
    assert len(destinations) == cells
    assert sorted([*sources, *destinations]) == list(range(tokens))
    assert part["kept"] == len(sources) - min(int(tokens * ratio), len(sources))


@functools.cache
def merged(ratio: float) -> tuple[ir.Model, ir.Model]:
    plain, model = blocks.model(pointwise=True), blocks.model(pointwise=True)
    assert apply(Tome(1, ratio), model).rewrites == {"self_attention": 1}
    return plain, model


@few
@given(
    batch=st.integers(1, 3),
    height=st.integers(2, 20),
    width=st.integers(2, 20),
    ratio=st.sampled_from([0.1, 0.5, 0.75]),
)
def test_tome_keeps_the_map_of_equal_tokens(
    batch: int, height: int, width: int, ratio: float
) -> None:
    """Where all tokens are one, their mean is that one: merging changes nothing but rounding."""
    token = np.random.default_rng(2).standard_normal((batch, 4, 1, 1)).astype(np.float32)
    feed = {"sample": np.broadcast_to(token, (batch, 4, height, width)).copy()}
    plain, model = merged(ratio)
    (wanted,), (after,) = run(plain, feed), run(model, feed)
    assert after.shape == wanted.shape
    np.testing.assert_allclose(after, wanted, rtol=0, atol=2e-5)


def test_tome_changes_a_map_of_unequal_tokens() -> None:
    plain, model = merged(0.5)
    (wanted,), (after,) = (run(one, blocks.feed(1, 8, 8)) for one in (plain, model))
    assert np.abs(after - wanted).max() > 1e-2
