"""Runs a bundle with Hugging Face optimum's pipeline and holds the image against PyTorch's.

    python examples/optimum/check.py BUNDLE examples/digits

It wants an environment of its own (``make optimum`` makes it): optimum-onnx 0.1 needs
transformers below 4.58.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from optimum.onnxruntime import ORTDiffusionPipeline

PROMPT = "a handwritten seven"
SETTINGS = {"num_inference_steps": 10, "guidance_scale": 2.0, "height": 128, "width": 128}


def main() -> None:
    """Exit with 1 unless both images are the same to a grey level."""
    bundle, folder = sys.argv[1:]
    images = []
    for pipeline in (
        ORTDiffusionPipeline.from_pretrained(bundle),
        StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32),
    ):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        made = pipeline(PROMPT, generator=generator, **SETTINGS).images[0]
        images.append(np.asarray(made, np.float64))
    distance = float(np.abs(images[0] - images[1]).mean())
    spread = float(images[1].std())
    print(f"optimum's pipeline on {bundle}: mean distance {distance:.4f} grey levels of 255")
    if not (distance < 1 and spread > 10):
        sys.exit(1)


if __name__ == "__main__":
    main()
