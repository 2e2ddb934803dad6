"""What ``flash_attention=trt`` writes, parsed and built by TensorRT-RTX, which needs no GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import pytest

from sdopt.passes.flash_attention import FlashAttention
from tests.passes.attention_graphs import Sizes, bare, block
from tests.toolkit import apply

trt: Any = pytest.importorskip(
    "tensorrt_rtx", reason='needs pip install "sdopt[trt-rtx]", which `make venv` does'
)
SIZES = Sizes(2, 64, 77, 4, 4, 64, 64)


@dataclass
class Built:
    """What became of a graph: its network's layers, and whether a plan came of it."""

    layers: Counter[str]
    errors: list[str]
    works: bool


@pytest.fixture(scope="module")
def builder() -> Any:
    return trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))  # one logger a process


def build(builder: Any, model: ir.Model) -> Built:
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, builder.logger)
    parsed = parser.parse(ir.to_proto(model).SerializeToString())
    errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
    layers = Counter(
        str(network.get_layer(i).type).rpartition(".")[2] for i in range(network.num_layers)
    )
    if not parsed:
        return Built(layers, errors, False)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    return Built(layers, errors, builder.build_serialized_network(network, config) is not None)


GRAPHS = {
    "plain": {},
    "masked": {"mask": "float16[64,77]"},
    "masked by batch": {"mask": "float16[2,1,1,77]"},
    "masked by bool": {"mask": "bool[64,77]"},
    "masked in fp32": {"mask": "float[64,77]"},
    "causal": {"attributes": "<is_causal=1>"},
    "scaled": {"attributes": "<scale=0.7>"},
    "precise softmax": {"attributes": "<softmax_precision=1>"},
}


@pytest.mark.parametrize("name", GRAPHS)
def test_native_attention_layers(builder: Any, name: str) -> None:
    model = block(SIZES, kind="float16", **GRAPHS[name])
    apply(FlashAttention("trt"), model)
    built = build(builder, model)
    assert built.layers["ATTENTION_INPUT"] == built.layers["ATTENTION_OUTPUT"] == 1
    assert built.works


@pytest.mark.parametrize("name", GRAPHS)
def test_the_decomposed_form(builder: Any, name: str) -> None:
    model = block(SIZES, kind="float16", **GRAPHS[name])
    apply(FlashAttention("trt", form="decomposed"), model)
    built = build(builder, model)
    assert built.layers["ATTENTION_INPUT"] == 0
    assert (built.layers["MATRIX_MULTIPLY"], built.layers["SOFTMAX"]) == (2, 1)
    assert built.works


@pytest.mark.parametrize("name", ["masked in fp32", "precise softmax"])
def test_what_it_repairs_does_not_build_without_it(builder: Any, name: str) -> None:
    assert not build(builder, block(SIZES, kind="float16", **GRAPHS[name])).works


@pytest.mark.parametrize(
    ("shape", "kind"), [("2,1,64,512", "float16"), ("2,4,64,64", "float")], ids=["512", "fp32"]
)
def test_beyond_the_limits_only_the_decomposed_form_builds(
    builder: Any, shape: str, kind: str
) -> None:
    model = bare(shape, shape, kind=kind)
    assert not build(builder, model).works
    apply(FlashAttention("trt"), model)
    assert build(builder, model).works
