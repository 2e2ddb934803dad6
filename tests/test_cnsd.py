"""examples/controlnet: its README's commands on a small model, the four files against PyTorch."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextModel

from tests.exporters import families, tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "examples/controlnet/README.md").read_text("utf-8")
LATENT = [1, 4, 32, 48]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pipeline, the ControlNet, and what the commands left."""
    root = tmp_path_factory.mktemp("cnsd")
    tiny.save(root / "sd15", root / "tokenizer")
    families.controlnet(root / "canny", root / "sd15")
    (root / "examples").symlink_to(ROOT / "examples")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    (block,) = re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)
    for line in block.splitlines():
        done = subprocess.run(
            shlex.split(line),
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return root


def session(made: Path, file: str) -> ort.InferenceSession:
    path = made / "cnsd/onnx" / file
    versions = {
        one.domain: one.version for one in onnx.load(path, load_external_data=False).opset_import
    }
    assert versions[""] == 18
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def ports(values: Any) -> dict[str, tuple[str, list[int]]]:
    return {one.name: (one.type, one.shape) for one in values}


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(got: list[np.ndarray], want: list[torch.Tensor]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.shape == tuple(other.shape)
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-3, atol=1e-5)
        assert families.distance(one, other) <= families.FP32


def control_shapes() -> list[list[int]]:
    widths = [8, 8, 8, 8, 16, 16, 16, 16, 16, 16, 16, 16, 16]
    sides = [(32, 48)] * 3 + [(16, 24)] * 3 + [(8, 12)] * 3 + [(4, 6)] * 4
    return [[1, width, *side] for width, side in zip(widths, sides, strict=True)]


CONTROLS = [f"control{index}" for index in range(13)]
STEP = {
    "x_noisy": ("tensor(float)", LATENT),
    "timestep": ("tensor(int32)", [1]),
    "context": ("tensor(float)", [1, 77, 24]),
}


def test_clip(made: Path) -> None:
    found = session(made, "CLIP.onnx")
    assert ports(found.get_inputs()) == {"input_ids": ("tensor(int32)", [1, 77])}
    assert ports(found.get_outputs()) == {"last_hidden_state": ("tensor(float)", [1, 77, 24])}
    ids = torch.randint(0, tiny.VOCABULARY, (1, 77), generator=torch.Generator().manual_seed(1))
    model = CLIPTextModel.from_pretrained(made / "sd15/text_encoder").eval()
    with torch.no_grad():
        want = model(ids).last_hidden_state
    check(found.run(None, {"input_ids": ids.numpy().astype(np.int32)}), [want])


def test_controlnet_and_unet(made: Path) -> None:
    control, unet = (
        session(made, "ControlNet.onnx"),
        session(made, "ControlledUnet/ControlledUnet.onnx"),
    )
    shapes = dict(zip(CONTROLS, control_shapes(), strict=True))
    maps = {name: ("tensor(float)", shape) for name, shape in shapes.items()}
    hinted = {**STEP, "hint": ("tensor(float)", [1, 3, 256, 384])}
    assert ports(control.get_inputs()) == hinted
    assert [one.name for one in control.get_inputs()] == ["x_noisy", "hint", *list(STEP)[1:]]
    assert [one.name for one in unet.get_inputs()] == [*STEP, *CONTROLS]
    assert ports(control.get_outputs()) == maps
    assert ports(unet.get_inputs()) == {**STEP, **maps}
    assert ports(unet.get_outputs()) == {"latent": ("tensor(float)", LATENT)}
    sample, context = random(*LATENT, seed=1), random(1, 77, 24, seed=2)
    hint, time = random(1, 3, 256, 384, seed=3).sigmoid(), torch.tensor([601])
    with torch.no_grad():
        model = ControlNetModel.from_pretrained(made / "canny").eval()
        down, mid = model(sample, time, context, hint, return_dict=False)
        denoiser = UNet2DConditionModel.from_pretrained(made / "sd15/unet").eval()
        want = denoiser(
            sample,
            time,
            context,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        ).sample
    step = {
        "x_noisy": sample.numpy(),
        "timestep": time.numpy().astype(np.int32),
        "context": context.numpy(),
    }
    found = control.run(CONTROLS, {**step, "hint": hint.numpy()})
    check(found, [*down, mid])
    check(unet.run(None, {**step, **dict(zip(CONTROLS, found, strict=True))}), [want])


def test_decoder(made: Path) -> None:
    found = session(made, "Decoder.onnx")
    assert ports(found.get_inputs()) == {"latent": ("tensor(float)", LATENT)}
    assert ports(found.get_outputs()) == {"images": ("tensor(float)", [1, 3, 256, 384])}
    latent = random(*LATENT, seed=4)
    with torch.no_grad():
        want = AutoencoderKL.from_pretrained(made / "sd15/vae").eval().decode(latent).sample
    check(found.run(None, {"latent": latent.numpy()}), [want])


def test_nothing_else_is_left(made: Path) -> None:
    assert [path.name for path in (made / "cnsd").iterdir()] == ["onnx"]
    graphs = sorted(str(p.relative_to(made / "cnsd")) for p in (made / "cnsd").rglob("*.onnx"))
    assert graphs == [
        "onnx/CLIP.onnx",
        "onnx/ControlNet.onnx",
        "onnx/ControlledUnet/ControlledUnet.onnx",
        "onnx/Decoder.onnx",
    ]
