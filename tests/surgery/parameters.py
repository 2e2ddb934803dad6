"""The models' parameters: not shipped, but drawn again from their name, shape and type.

Their statistics are those of trained models: variances are kept, norms scale by about one, and
one convolution is as quiet as some of SD1.5's are, so that its group norm's epsilon counts.
"""

from __future__ import annotations

import zlib

import numpy as np

QUIET = "down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.time_emb_proj"
"""What makes the activations whose standard deviation is about 0.01."""


def parameter(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The values of the parameter ``name`` of a model, the same wherever they are asked for."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    drawn = rng.standard_normal(shape, np.float32)
    module, _, kind = name.rpartition(".")
    own = module.rpartition(".")[2]
    if "norm" in own:
        drawn = 1 + 0.1 * drawn if kind == "weight" else 0.1 * drawn
    elif kind == "bias":
        drawn *= 0.05
    elif not own.endswith("embedding"):
        drawn /= np.sqrt(np.prod(shape[1:]))
    if module.endswith(QUIET):
        drawn *= 0.01
    return drawn.astype(dtype)
