"""A denoiser as each target lowers it computes what the canonical graph does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from sdopt import api, modelfile
from sdopt.targets.ort import Ort
from sdopt.tolerance import FP32_REASSOCIATED, HALF
from tests import building_bundle
from tests.microsoft_ops import standard
from tests.passes.denoiser import feeds
from tests.toolkit import Arrays, relative_l2, run


def inputs(batch: int, size: tuple[int, int]) -> Arrays:
    return feeds(np.float32, batch, size) | {"timestep": np.full(batch, 7, np.float32)}


def typed(model: ir.Model, arrays: Arrays) -> Arrays:
    """The arrays in the types that the graph declares: a timestep stays in float32."""
    kinds = {value.name: value.dtype for value in model.graph.inputs}
    return {name: one.astype(kinds[name].numpy()) for name, one in arrays.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", ["", "fp16"])
@pytest.mark.parametrize("target", ["trt", "trt_rtx", "ort", "ort:provider=cuda", "onnx"])
def test_a_lowered_denoiser_computes_the_same(tmp_path: Path, target: str, dtype: str) -> None:
    building_bundle.make(tmp_path)
    text = f"{target}:dtype={dtype}" if dtype else target
    sizes = {"shapes": "64x64", "dims": {"sequence_length": (5, 5)}}
    (report,) = api.build(tmp_path, text, emit_only=True, **sizes).components  # type: ignore[arg-type]
    lowered = _inlined(modelfile.load(Path(report.file)))
    counted = standard(lowered)
    assert (counted > 0) == (target == "ort:provider=cuda")
    canonical = Ort().open(tmp_path / "unet" / "model.onnx", optimize=False)
    kind = np.float16 if dtype else np.float32
    for batch, size in ((2, (8, 8)), (1, (6, 10))):
        wanted = canonical.run(inputs(batch, size))["out_sample"]
        found = run(lowered, typed(lowered, inputs(batch, size)))[0]
        assert found.dtype == kind
        limit = HALF["float16"] if dtype else FP32_REASSOCIATED
        assert relative_l2(found.astype(np.float32), wanted) <= limit


def _inlined(model: ir.Model) -> ir.Model:
    """The model with its weights inside, so that it needs no folder."""
    for value in modelfile.initializers(model):
        tensor = value.const_value
        if tensor is not None:
            value.const_value = ir.Tensor(
                np.array(tensor.numpy()), dtype=tensor.dtype, name=value.name
            )
    return model
