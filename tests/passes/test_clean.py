from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from sdopt.fingerprint import fingerprint
from sdopt.passes.clean import Clean
from tests.toolkit import apply, leaves, model_of, ops, run

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def test_shape_arithmetic_on_known_dims_folds_away() -> None:
    model = model_of("""g (float[2,3,4] x) => (float[6,4] y) {
        s = Shape<start=0, end=2>(x)
        n = ReduceProd<keepdims=1>(s)
        four = Constant<value_ints=[4]>()
        shape = Concat<axis=0>(n, four)
        y = Reshape(x, shape)
    }""")
    apply(Clean(), model)
    assert ops(model) == {"Reshape": 1}
    np.testing.assert_array_equal(run(model, {"x": X})[0], X.reshape(6, 4))


def test_live_shapes_stay_and_their_detours_go() -> None:
    model = model_of("""g (float[B,3,4] x) => (float[B,12] y) {
        s = Shape<start=0, end=1>(x)
        scalar = Squeeze(s)
        minus = Constant<value_ints=[-1]>()
        back = Reshape(scalar, minus)
        one = Concat<axis=0>(back)
        twelve = Constant<value_ints=[12]>()
        shape = Concat<axis=0>(one, twelve)
        y = Reshape(x, shape)
    }""")
    apply(Clean(), model)
    assert ops(model) == {"Reshape": 1}  # to [0, 12]: the batch is whatever comes
    for batch in (1, 5):
        x = np.ones((batch, 3, 4), np.float32)
        assert run(model, {"x": x})[0].shape == (batch, 12)


def test_sequences_become_split() -> None:
    model = model_of("""g (float[B,6] x) => (float[B,4] a, float[B,2] b) {
        size = Constant<value_int=4>()
        zero = Constant<value_int=0>()
        one = Constant<value_int=1>()
        parts = SplitToSequence<axis=1, keepdims=1>(x, size)
        a = SequenceAt(parts, zero)
        b = SequenceAt(parts, one)
    }""")
    ctx = apply(Clean(), model)
    assert ops(model) == {"Split": 1}
    assert ctx.rewrites["SplitToSequence+SequenceAt to Split"] == 1
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    a, b = run(model, {"x": x})
    np.testing.assert_array_equal(a, x[:, :4])
    np.testing.assert_array_equal(b, x[:, 4:])


def test_a_sequence_used_otherwise_is_left_and_reported() -> None:
    leaves(
        Clean(),
        model_of(
            """g (float[2,6] x, int64 i) => (float[2,3] a) {
            parts = SplitToSequence<axis=1>(x, size)
            a = SequenceAt(parts, i)
        }""",
            {"size": np.array(3)},
        ),
        "a sequence is used for more than picking its parts",
    )


def test_a_sequence_that_is_an_output_stays_one() -> None:
    model = model_of(
        """g (float[6] x) => (float[3] a, seq(float[3]) parts) {
            parts = SplitToSequence<axis=0>(x, size)
            a = SequenceAt(parts, at)
        }""",
        {"size": np.array(3), "at": np.array(0)},
    )
    leaves(Clean(), model, "a sequence is used for more than picking its parts")


def test_the_length_of_a_sequence_is_left() -> None:
    model = model_of("""g (float[6] x) => (int64 n) {
        parts = SplitToSequence<axis=0>(x)
        n = SequenceLength(parts)
    }""")
    leaves(Clean(), model, "a sequence is used for more than picking its parts")


def test_one_part_picked_twice_keeps_the_type_that_is_known() -> None:
    model = model_of(
        """g (float[4,6] x) => (float[2,6] a) {
            parts = SplitToSequence<axis=0>(x, size)
            a = SequenceAt(parts, one)
            unused = SequenceAt(parts, last)
        }""",
        {"size": np.array(2), "one": np.array(1), "last": np.array(-1)},
    )
    apply(Clean(), model)
    assert ops(model) == {"Split": 1}
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT


def test_a_part_that_is_not_there_is_left_to_the_runtime_to_refuse() -> None:
    model = model_of(
        """g (float[6] x, bool c) => (float[N] y) {
            parts = SplitToSequence<axis=0>(x, size)
            y = If (c) <
                then_branch = t () => (float[N] a) { a = SequenceAt(parts, two) },
                else_branch = e () => (float[N] b) { b = SequenceAt(parts, zero) }
            >
        }""",
        {"size": np.array(3), "two": np.array(2), "zero": np.array(0)},
    )
    leaves(Clean(), model, "a part is asked for that the sequence does not have")


def test_a_dropout_whose_mask_is_an_output_stays() -> None:
    model = model_of("g (float[N] x) => (float[N] y, bool[N] m) { y, m = Dropout(x) }")
    leaves(Clean(), model)


def test_folding_what_overflows_says_nothing() -> None:
    """pytest makes numpy's warning an error, and a user should not see it."""
    model = model_of(
        "g (float[2] x) => (float[2] y) { h = Cast<to=10>(big) f = Cast<to=1>(h) y = Min(x, f) }",
        {"big": np.array([1e6], np.float32)},
    )
    apply(Clean(), model)
    assert ops(model) == {"Min": 1}
    x = np.array([1, -2], np.float32)
    np.testing.assert_array_equal(run(model, {"x": x})[0], x)


def test_no_ops_go_and_the_output_keeps_its_name() -> None:
    model = model_of(
        """g (float[2,3,4] x) => (float[2,3,4] y) {
        a = Identity(x)
        b = Mul(a, one)
        c = Div(b, one)
        d = Transpose<perm=[0,1,2]>(c)
        e = Cast<to=1>(d)
        f = Relu(e)
        y = Identity(f)
    }""",
        {"one": np.array(1, np.float32)},
    )
    apply(Clean(), model)
    assert ops(model) == {"Relu": 1}
    assert model.graph.outputs[0].name == "y"


def test_equal_computations_and_equal_constants_become_one() -> None:
    model = model_of("""g (float[2,3] x) => (float[2,3] y) {
        a = Constant<value_float=2.0>()
        b = Constant<value_float=2.0>()
        p = Mul(x, a)
        q = Mul(x, b)
        y = Add(p, q)
    }""")
    apply(Clean(), model)
    assert ops(model) == {"Add": 1, "Mul": 1}


def test_dead_nodes_and_their_weights_go() -> None:
    model = model_of(
        """g (float[2,3] x) => (float[2,3] y) {
        dead = MatMul(x, w)
        y = Relu(x)
    }""",
        {"w": np.ones((3, 3), np.float32)},
    )
    apply(Clean(), model)
    assert ops(model) == {"Relu": 1}
    assert not model.graph.initializers


def test_equal_weights_in_one_place_of_the_file_are_shared(tmp_path: object) -> None:
    model = model_of("g (float[2,3] x) => (float[2,3] y) { a = Mul(x, v)\n y = Mul(a, w) }")
    for name in ("v", "w"):
        tensor = ir.ExternalTensor(
            "absent.bin", 0, 12, ir.DataType.FLOAT, shape=ir.Shape([3]), name=name, base_dir="."
        )
        old = next(v for n in model.graph for v in n.inputs if v is not None and v.name == name)
        old.const_value, old.type, old.shape = tensor, ir.TensorType(tensor.dtype), tensor.shape
        model.graph.register_initializer(old)
    ctx = apply_without_checker(model)
    assert ctx == {"shared weight": 1}  # and the file, which does not exist, was never read


def apply_without_checker(model: ir.Model) -> dict[str, int]:
    from sdopt.passes.base import PassContext

    ctx = PassContext(model)
    Clean().apply(model, ctx)
    return ctx.rewrites


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        # A Linear's Transpose(W): folding it would rewrite the weight.
        (
            "g (float[B,3] x) => (float[B,4] y) { t = Transpose<perm=[1,0]>(w)\n"
            " y = MatMul(x, t) }",
            {"w": np.ones((4, 3), np.float32)},
        ),
        # exp differs in the last bit between runtimes.
        (
            "g (float[B,3] x) => (float[B,3] y) { e = Exp(w)\n y = Mul(x, e) }",
            {"w": np.array([0.1, 0.2, 0.3], np.float32)},
        ),
        # An Identity between an input and an output gives the output its name.
        ("g (float[2] x) => (float[2] y) { y = Identity(x) }", {}),
        # Multiplying by a [1,1] one would add a dimension to a vector.
        (
            "g (float[3] x) => (float[1,3] y) { y = Mul(x, one) }",
            {"one": np.ones((1, 1), np.float32)},
        ),
        # Adding zero turns -0.0 into 0.0, so it is no no-op to the bit.
        (
            "g (float[3] x) => (float[3] y) { y = Add(x, zero) }",
            {"zero": np.zeros(1, np.float32)},
        ),
        # A slice that leaves something out.
        (
            "g (float[3] x) => (float[2] y) { y = Slice(x, begin, end) }",
            {"begin": np.array([1]), "end": np.array([2**62])},
        ),
        # Integer division by zero is for the runtime to refuse.
        (
            "g (int64[1] x) => (int64[1] y) { d = Div(one, zero)\n y = Add(x, d) }",
            {"one": np.array([1]), "zero": np.array([0])},
        ),
    ],
)
def test_leaves_alone(body: str, weights: dict[str, np.ndarray]) -> None:
    leaves(Clean(), model_of(body, weights))


def test_an_initializer_that_is_an_input_is_no_constant() -> None:
    model = model_of(
        "g (float[2] x, float[2] k) => (float[2] y) { a = Mul(k, k)\n y = Mul(x, a) }"
    )
    k = model.graph.inputs[1]
    k.const_value = ir.tensor(np.ones(2, np.float32), name="k")
    model.graph.register_initializer(k)
    before = fingerprint(model)
    apply(Clean(), model)
    assert fingerprint(model) == before


def test_a_body_of_if_is_cleaned_and_still_sees_outer_values() -> None:
    model = model_of("""g (bool c, float[2] x) => (float[2] y) {
        y = If (c) <
            then_branch = t () => (float[2] a) { i = Identity(x)
                a = Relu(i) },
            else_branch = e () => (float[2] b) { two = Constant<value_float=2.0>()
                b = Mul(x, two) }
        >
    }""")
    apply(Clean(), model)
    assert "Identity" not in ops(model)
    x = np.array([-1, 3], np.float32)
    np.testing.assert_array_equal(run(model, {"c": np.array(True), "x": x})[0], [0, 3])
    np.testing.assert_array_equal(run(model, {"c": np.array(False), "x": x})[0], [-2, 6])
