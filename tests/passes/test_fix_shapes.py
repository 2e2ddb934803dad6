from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from sdopt.errors import SpecError
from sdopt.passes.clean import Clean
from sdopt.passes.fix_shapes import FixShapes
from sdopt.pipeline import Pipeline
from tests.toolkit import apply, leaves, model_of, ops, run

TEXT = """g (float[batch_size,4,height,width] x) => (float[batch_size,4,N] y) {
    s = Shape<start=0, end=2>(x)
    t = Concat<axis=0>(s, minus)
    y = Reshape(x, t)
}"""
MINUS = {"minus": np.array([-1])}
AXES = FixShapes(("batch_size@2", "height@8", "width@6"))


def shapes(model: ir.Model) -> list[str]:
    return [str(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)]


def test_axes_get_their_numbers_and_clean_folds_what_asked_for_them() -> None:
    model, x = model_of(TEXT, MINUS), np.random.default_rng(0).random((2, 4, 8, 6), np.float32)
    wanted = run(model, {"x": x})
    ctx = apply(AXES, model)
    assert shapes(model) == ["[2,4,8,6]", "[2,4,N]"]
    assert ctx.rewrites == {"axis": 3}
    apply(Clean(), model)
    assert ops(model) == {"Reshape": 1}
    assert np.array_equal(run(model, {"x": x})[0], wanted[0])


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("height*width", 48),
        ("2*((height - 1)//8) + 2", 2),
        ("((height//8))*((width//2))", 3),
        ("-(-height//8) % 8", 1),
        ("height*depth", None),
        ("Max(height, 1)", None),
        ("height//zero", None),
        ("no size!", None),
        ("height/2", None),
    ],
)
def test_arithmetic_in_a_name_is_done_where_all_of_it_is_known(
    name: str, size: int | None
) -> None:
    model = model_of("g (float[N,2] x) => (float[N,2] y) { y = Relu(x) }")
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape([name, 2])
    apply(FixShapes(("height@8", "width@6", "zero@1")), model)
    given = size if size is not None or name != "height//zero" else 8
    assert {str(value.shape[0]) for value in model.graph.outputs if value.shape} == {
        str(given if given is not None else name)
    }


def test_other_names_stay() -> None:
    leaves(FixShapes(("tokens@77",)), model_of(TEXT, MINUS))


@pytest.mark.parametrize(
    "text", ["fix_shapes", "fix_shapes=height", "fix_shapes=height@0", "fix_shapes=a@1+a@2"]
)
def test_what_is_no_axis(text: str) -> None:
    with pytest.raises(SpecError):
        Pipeline.parse(text)
