"""Stable Diffusion 1.5 and a ControlNet as the four ONNX files of the CNSD layout.

    python examples/controlnet/cnsd.py SOURCE CONTROLNET -o FOLDER --size 256x384

SOURCE is a diffusers folder, CONTROLNET the folder of one ControlNet for it. FOLDER gets
``onnx/CLIP.onnx``, ``ControlNet.onnx``, ``ControlledUnet/ControlledUnet.onnx`` and
``Decoder.onnx``: one fixed size, opset 18, the names and types that ControlNet's own code has.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sdopt import api, modelfile
from sdopt.shapes import axis_numbers, parse_sizes

OPSET = 18
CONTROLS = 13
"""Twelve residuals on the way down and, last, the one of the middle block."""


@dataclass(frozen=True)
class Layout:
    """What becomes of a component of a bundle.

    Attributes:
        file: below ``onnx``.
        names: of inputs and outputs, from sdopt's to the layout's, in the order of the inputs;
            other outputs are left out.
        whole: inputs that become ``int32``.
        fixed: inputs that become a constant.
    """

    file: str
    names: Mapping[str, str]
    whole: tuple[str, ...] = ()
    fixed: Mapping[str, float] = field(default_factory=dict)


STEP = {"sample": "x_noisy", "timestep": "timestep", "encoder_hidden_states": "context"}


def controls(down: str, mid: str) -> dict[str, str]:
    """The residuals, by their names in sdopt's graphs."""
    names = [*(f"{down}.{index}" for index in range(CONTROLS - 1)), mid]
    return {name: f"control{index}" for index, name in enumerate(names)}


LAYOUTS = {
    "text_encoder": Layout(
        "CLIP.onnx",
        {"input_ids": "input_ids", "last_hidden_state": "last_hidden_state"},
        whole=("input_ids",),
    ),
    "controlnet": Layout(
        "ControlNet.onnx",
        {
            "sample": "x_noisy",
            "controlnet_cond": "hint",
            **STEP,
            **controls("down_block_res_samples", "mid_block_res_sample"),
        },
        whole=("timestep",),
        fixed={"conditioning_scale": 1.0},
    ),
    "unet": Layout(
        "ControlledUnet/ControlledUnet.onnx",
        {
            **STEP,
            **controls("down_block_additional_residuals", "mid_block_additional_residual"),
            "out_sample": "latent",
        },
        whole=("timestep",),
    ),
    "vae_decoder": Layout("Decoder.onnx", {"latent_sample": "latent", "sample": "images"}),
}


def rename(model: ir.Model, layout: Layout) -> None:
    """Give a graph the layout's inputs and outputs."""
    graph = model.graph
    for value in list(graph.inputs):
        name = str(value.name)
        if name in layout.fixed:
            graph.inputs.remove(value)
            value.const_value = ir.tensor(np.array(layout.fixed[name], np.float32), name=name)
            graph.register_initializer(value)
        elif name in layout.whole:
            take_int32(graph, value)
    order = list(layout.names)
    graph.inputs[:] = sorted(graph.inputs, key=lambda value: order.index(str(value.name)))
    graph.outputs[:] = [value for value in graph.outputs if value.name in layout.names]
    for value in (*graph.inputs, *graph.outputs):
        value.name = layout.names[str(value.name)]


def take_int32(graph: ir.Graph, value: ir.Value) -> None:
    """An input becomes ``int32``; one without an axis gets one, ``[1]``."""
    if value.shape is None or value.dtype is None:
        raise ValueError(f"{value.name} has no type")
    scalar = len(value.shape) == 0
    shape = ir.Shape([1]) if scalar else value.shape
    taken = ir.Value(name=value.name, type=ir.TensorType(ir.DataType.INT32), shape=shape)
    nodes = [ir.node("Cast", [taken], {"to": value.dtype})]
    if scalar:
        nodes.append(ir.node("Squeeze", [nodes[0].outputs[0]]))
    for index, node in enumerate(nodes):
        node.outputs[0].name = f"{value.name}_cast_{index}"
        node.outputs[0].type = value.type
    value.replace_all_uses_with(nodes[-1].outputs[0])
    graph.insert_before(graph[0], nodes)
    graph.inputs[graph.inputs.index(value)] = taken


def main() -> None:
    """Export, rename, fix the size, lower to the opset; one file after another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="a diffusers folder of Stable Diffusion 1.5")
    parser.add_argument("controlnet", help="a ControlNet's folder")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--size", default="256x384", help="HEIGHTxWIDTH in pixels")
    given = parser.parse_args()
    (size,) = parse_sizes(given.size)
    axes = axis_numbers(size.high, 1, {})
    fix = "fix_shapes=" + "+".join(f"{name}@{number}" for name, number in axes.items())
    given.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.output) as scratch:
        bundle = Path(scratch) / "bundle"
        api.export(
            given.source,
            bundle,
            components=[*LAYOUTS],
            dtype="fp32",
            supplied={"controlnet": given.controlnet},
        )
        for component, layout in LAYOUTS.items():
            model = modelfile.load(bundle / component / "model.onnx")
            rename(model, layout)
            # Beside the raw graph, whose weights it shares.
            renamed = bundle / component / "cnsd.onnx"
            modelfile.save(model, renamed)
            file = given.output / "onnx" / layout.file
            file.parent.mkdir(parents=True, exist_ok=True)
            api.optimize_file(renamed, file, f"{fix},clean,lower_opset={OPSET},clean")
            print(file)


if __name__ == "__main__":
    main()
