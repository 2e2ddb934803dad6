"""A single file of the size of Stable Diffusion XL: what finding its weights takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from examples.digits import single_file
from tests.exporters.test_single_file import PUBLIC, sparse

GB = 10**9

CODE = """
import json, sys
from sdopt.exporters import SingleFileSource
from sdopt.exporters.binding import match
from sdopt.exporters.modules import build
from sdopt.exporters.source import DTYPES
source = SingleFileSource(sys.argv[1], components=())
found = {}
for name in source.component_names():
    checkpoint = source._checkpoint(name, None)
    kind = DTYPES[source.dtype_of(name)]
    network = build(source._table()[name], source.config(name), kind)
    keys = match(network.shapes(), network.tied(), checkpoint, "")
    found[name] = len(keys)
    for key in keys.values():
        checkpoint.external(key)
    source.fingerprint(name)
lines = open("/proc/self/status").read().splitlines()
peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
print(json.dumps({"peak": peak, "found": found}))
"""


@pytest.fixture(scope="module")
def seven_gb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """XL's base in half precision: names and shapes as published, the bytes a hole."""
    with torch.device("meta"):
        networks = {
            "unet": UNet2DConditionModel(**PUBLIC["sdxl"]),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(
                    hidden_size=768,
                    intermediate_size=3072,
                    num_hidden_layers=12,
                    num_attention_heads=12,
                )
            ),
            "text_encoder_2": CLIPTextModelWithProjection(
                CLIPTextConfig(
                    hidden_size=1280,
                    intermediate_size=5120,
                    num_hidden_layers=32,
                    num_attention_heads=20,
                    projection_dim=1280,
                    hidden_act="gelu",
                )
            ),
        }
    weights = {part: network.state_dict() for part, network in networks.items()}
    configs = {part: dict(networks[part].config) for part in ("unet", "vae")}
    configs |= {part: networks[part].config.to_dict() for part in ("text_encoder",)}
    configs["text_encoder_2"] = networks["text_encoder_2"].config.to_dict()
    return sparse(
        tmp_path_factory.mktemp("xl") / "xl.safetensors", single_file.original(weights, configs)
    )


def test_xl_is_found_under_1_gb(seven_gb: Path) -> None:
    assert seven_gb.stat().st_size > 6.9 * GB
    ran = subprocess.run(
        [sys.executable, "-c", CODE, str(seven_gb)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert result["found"]["unet"] == 1680
    assert set(result["found"]) == {
        "text_encoder",
        "text_encoder_2",
        "unet",
        "vae_encoder",
        "vae_decoder",
    }
    assert result["peak"] < GB
