"""The tools that sdopt is measured beside, each as its own documentation calls it.

python -m benchmarks.tools baseline UNET_FOLDER OUT.onnx     what the others are given
python -m benchmarks.tools ort|onnxsim|float16 IN.onnx OUT.onnx
python -m benchmarks.tools describe OUT.onnx [--unopened]    what came out, one line
python -m benchmarks.tools zeros FILE BYTES                  how fast this disk is written
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

OPSET = 18
"""The opset that torch's exporter writes by default, and that every one of the tools knows."""

SHOWN = (
    "Attention",
    "MultiHeadAttention",
    "GroupNorm",
    "SkipGroupNorm",
    "GroupNormalization",
    "Transpose",
)
"""Operators that tell what a tool fused, or could not."""


def baseline(source: str, output: str) -> None:
    """The U-Net by torch's dynamo exporter at opset 18, all dims dynamic, weights in fp32.

    Traced under fake tensors like sdopt's, because real weights would need 4 GB here; torch's own
    graph optimisation runs afterwards, on the graph whose weights are in place. The file is
    ``OUT.onnx`` with one ``OUT.onnx_data``, as torch would have written it.
    """
    import onnx_ir as ir
    import onnxscript.optimizer
    import torch
    from diffusers import UNet2DConditionModel
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Step(torch.nn.Module):
        def __init__(self, unet: torch.nn.Module) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
            return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]

    folder = Path(source)
    config = UNet2DConditionModel.load_config(str(folder))
    dynamic = torch.export.Dim.DYNAMIC
    with FakeTensorMode():
        unet = UNet2DConditionModel.from_config(config).eval()
        width = unet.config["cross_attention_dim"]
        inputs = (torch.randn(2, 4, 16, 24), torch.tensor(5.0), torch.randn(2, 77, width))
        program = torch.onnx.export(
            Step(unet),
            inputs,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            input_names=["sample", "timestep", "encoder_hidden_states"],
            output_names=["out_sample"],
            dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic}, {}, {0: dynamic, 1: dynamic}),
        )
    assert program is not None
    model = program.model
    weights = _ranges(folder / "diffusion_pytorch_model.safetensors")
    for name, value in model.graph.initializers.items():
        if name.removeprefix("unet.") in weights:
            value.const_value = weights[name.removeprefix("unet.")]
    onnxscript.optimizer.optimize_ir(model, input_size_limit=1024, output_size_limit=1024)
    model.ir_version = 10
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path, external_data=f"{path.name}_data")


def _ranges(file: Path) -> dict[str, Any]:
    """The weights of a safetensors file as external tensors; nothing is read."""
    import onnx_ir as ir

    kinds = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16}
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        table = json.loads(stream.read(length))
    table.pop("__metadata__", None)
    return {
        name: ir.ExternalTensor(
            file.name,
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
            kinds[entry["dtype"]],
            shape=ir.Shape(entry["shape"]),
            name=name,
            base_dir=file.parent.resolve(),
        )
        for name, entry in table.items()
    }


def ort(source: str, output: str) -> None:
    """The transformers optimizer of onnxruntime and its fp16, as its optimize_pipeline.py does."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    model = optimize_model(
        source,
        model_type="unet",
        num_heads=0,
        hidden_size=0,
        opt_level=0,
        optimization_options=FusionOptions("unet"),
        use_gpu=True,
    )
    model.convert_float_to_float16(keep_io_types=False, op_block_list=["RandomNormalLike"])
    model.save_model_to_file(output, use_external_data_format=True)


def onnxsim(source: str, output: str) -> None:
    """The function simplify of onnxsim, saved the way it recommends for models past 2 GiB."""
    import onnxsim as simplifier

    _, ok = simplifier.simplify(source, output_path=output)
    if not ok:
        sys.exit("onnxsim says that the simplified model is not the same")


def float16(source: str, output: str) -> None:
    """The fp16 conversion of onnxconverter-common, the variant that takes a path."""
    import onnx
    from onnxconverter_common.float16 import convert_float_to_float16_model_path

    model = convert_float_to_float16_model_path(source)
    onnx.save(model, output, save_as_external_data=True, location=f"{Path(output).name}_data")


def zeros(path: str, size: str) -> None:
    """Write that many zero bytes in blocks of 64 MiB, on the disk when it returns."""
    block, left = bytes(64 << 20), int(size)
    with open(path, "wb", buffering=0) as file:
        while left:
            left -= file.write(block[:left])
        os.fsync(file.fileno())


def describe(path: str, unopened: str = "") -> None:
    """Print as JSON: nodes, counts of what matters, bytes of weights, and ORT's refusal if any.

    With ``--unopened`` ONNX Runtime is not asked: it reads all the weights, of which a sparse
    checkpoint has none.
    """
    import onnx
    from onnx import helper

    graph = onnx.load(path, load_external_data=False).graph
    counts = Counter(node.op_type for node in graph.node)
    sizes: Counter[str] = Counter()
    for weight in graph.initializer:
        kind = helper.tensor_dtype_to_np_dtype(weight.data_type)
        sizes[kind.name] += math.prod(weight.dims) * kind.itemsize
    summary = {
        "nodes": len(graph.node),
        "ops": {name: counts[name] for name in SHOWN if counts[name]},
        "weight_bytes": dict(sizes),
        "refused": None if unopened else _refusal(path),
    }
    print(json.dumps(summary))


def _refusal(path: str) -> str | None:
    """Why onnxruntime does not load the file, or None if it does."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Without this, every weight would be copied into the kernels' layout: gigabytes for nothing.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.log_severity_level = 3
    try:
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # whatever it says is the result
        return str(error).splitlines()[0]
    return None


TOOLS = {
    "baseline": baseline,
    "ort": ort,
    "onnxsim": onnxsim,
    "float16": float16,
    "describe": describe,
    "zeros": zeros,
}


def main() -> None:
    """Run one tool; what it prints itself goes to stderr."""
    name, *arguments = sys.argv[1:]
    with (
        contextlib.nullcontext() if name == "describe" else contextlib.redirect_stdout(sys.stderr)
    ):
        TOOLS[name](*arguments)


if __name__ == "__main__":
    main()
