"""The UNet of Stable Diffusion XL by Hugging Face optimum's exporter, in its own environment.

.venv-optimum/bin/python benchmarks/optimum_unet.py CHECKPOINT OUT.onnx     (make optimum)

What ``optimum-cli export onnx`` does for this component on a CPU: the module is loaded in float32,
given the entries of the configuration that the pipeline's export sets, and handed to optimum's
``export``. It takes about 40 GB of memory.
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
    unet = UNet2DConditionModel.from_pretrained(source / "unet").eval()
    unet.register_to_config(
        requires_aesthetics_score=False,
        text_encoder_projection_dim=1280,
        export_model_type="unet-2d-condition",
    )
    config = UNetOnnxConfig(unet.config, task="semantic-segmentation")
    output.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        export(unet, config, output, opset=18)


if __name__ == "__main__":
    main()
