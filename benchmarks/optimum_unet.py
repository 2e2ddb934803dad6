"""The UNet of Stable Diffusion XL by Hugging Face optimum's exporter, in its own environment.

.venv-optimum/bin/python benchmarks/optimum_unet.py CHECKPOINT OUT.onnx     (make optimum)

What ``optimum-cli export onnx`` does for this component: the module is loaded, given the entries
of the configuration that the pipeline's export sets, and handed to optimum's ``export``. In half
precision, since in float32, which its command line insists on without a GPU, the weights and
their copies do not fit into 24 GB; and traced at a latent of 8x8, one image, since it computes
what it traces and half precision is slow on a CPU. Both are in its favour.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    """Read CHECKPOINT/unet and write OUT.onnx with its data beside it."""
    import torch
    from diffusers import UNet2DConditionModel
    from optimum.exporters.onnx import export
    from optimum.exporters.onnx.model_configs import UNetOnnxConfig

    source, output = map(Path, sys.argv[1:])
    unet = UNet2DConditionModel.from_pretrained(source / "unet", torch_dtype=torch.float16).eval()
    projected = 1280
    unet.register_to_config(
        requires_aesthetics_score=False,
        text_encoder_projection_dim=projected,
        export_model_type="unet-2d-condition",
    )
    config = UNetOnnxConfig(unet.config, task="semantic-segmentation", float_dtype="fp16")
    output.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        small = {"batch_size": 1, "height": 8, "width": 8}
        export(unet, config, output, opset=18, dtype="fp16", input_shapes=small)


if __name__ == "__main__":
    main()
