"""A tiny model of open_clip itself with random weights, and what it makes of images and tokens.

Run as a program, in a process of its own: open_clip wants torchvision for image transforms and
other towers, and ftfy for its tokenizer. Here neither is called, so empty modules stand for them.

    python open_clip_reference.py FOLDER QUICK_GELU
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch

CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {
        "image_size": 24,
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 592, "width": 24, "heads": 3, "layers": 2},
}


def stand_in(name: str, **names: Any) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(names)
    sys.modules[name] = module


class Nothing:
    """For a class of torchvision that is only named."""

    BICUBIC = BILINEAR = NEAREST = "nothing"


def main() -> None:
    names = (
        "Normalize Compose RandomResizedCrop InterpolationMode ToTensor Resize CenterCrop "
        "ColorJitter Grayscale"
    )
    stand_in("ftfy")
    stand_in("torchvision")
    stand_in("torchvision.ops")
    stand_in("torchvision.ops.misc", FrozenBatchNorm2d=torch.nn.Identity)
    stand_in("torchvision.transforms.functional")
    functional = sys.modules["torchvision.transforms.functional"]
    transforms = dict.fromkeys(names.split(), Nothing)
    stand_in("torchvision.transforms", functional=functional, **transforms)
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # type: ignore[attr-defined]
    from open_clip.model import CLIP

    folder, quick = Path(sys.argv[1]), sys.argv[2] == "quick"
    torch.manual_seed(3)
    config = {**CONFIG, **({"quick_gelu": True} if quick else {})}
    model = CLIP(**config).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    given = torch.load(folder / "given.pt", weights_only=True)
    with torch.inference_mode():
        found = {
            "image": model.encode_image(given["pixels"], normalize=True),
            "text": model.encode_text(given["ids"], normalize=True),
        }
    torch.save(found, folder / "found.pt")
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(text)


if __name__ == "__main__":
    main()
