"""The low-rank factors in an adapter file, in the spellings of kohya, diffusers and PEFT."""

from __future__ import annotations

import enum
import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdopt import reading
from sdopt.errors import WeightsError
from sdopt.safetensors_header import Entry, read_header


class Part(enum.Enum):
    """The component of a pipeline that a key is for."""

    DENOISER = "denoiser"
    TEXT_ENCODER = "text encoder"
    TEXT_ENCODER_2 = "second text encoder"


_PREFIXES = (
    ("lora_unet_", Part.DENOISER),
    ("lora_te1_", Part.TEXT_ENCODER),
    ("lora_te2_", Part.TEXT_ENCODER_2),
    ("lora_te_", Part.TEXT_ENCODER),
    ("unet.", Part.DENOISER),
    ("text_encoder.", Part.TEXT_ENCODER),
    ("text_encoder_2.", Part.TEXT_ENCODER_2),
)
"""How kohya (underscores throughout) and diffusers say the component."""

_PEFT = "base_model.model."
_TEXT = "text_model."
_KEY = re.compile(
    r"(?P<path>.+?)(?:"
    # diffusers before 0.22: ...attn1.processor.to_q_lora.down.weight
    r"(?:\.processor)?\.(?P<projection>to_(?:q|k|v|out))_lora\.(?P<old>down|up)\.weight"
    # diffusers 0.22: ...to_q.lora.down.weight; text encoders: q_proj.lora_linear_layer.up.weight
    r"|\.lora(?:_linear_layer)?\.(?P<layer>down|up)\.weight"
    # kohya's and PEFT's, which may name the adapter: ...to_q.lora_A.default.weight
    r"|\.lora_(?P<new>down|up|mid|A|B)(?:\.\w+)?\.weight"
    r"|\.(?P<alpha>alpha))"
)
_ROLES = {"A": "down", "B": "up"}
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_SHOWN = 3


@dataclass(frozen=True)
class Adapter:
    """The factors for one weight: ``W + scale * ratio * up @ down``.

    Attributes:
        key: the start of its keys in the file, for messages.
        path: the module path; with underscores for dots where the file is kohya's.
        down: ``[rank, in]`` or ``[rank, in, kh, kw]``.
        up: ``[out, rank]`` or ``[out, rank, 1, 1]``.
        mid: ``[rank, rank, kh, kw]`` between the two, where ``down`` is 1x1 (LoCon).
        alpha: the scalar that is divided by the rank, if the file holds it.
        ratio: that quotient where the file has no ``alpha``.
    """

    key: str
    part: Part
    path: str
    down: Entry
    up: Entry
    mid: Entry | None = None
    alpha: Entry | None = None
    ratio: float = 1.0

    @property
    def rank(self) -> int:
        """The number of rows of ``down``."""
        return self.down.shape[0] if self.down.shape else 0


def digest_of(path: Path) -> str:
    """A digest of an adapter file's bytes.

    Raises:
        WeightsError: no such file, or one that cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise WeightsError(
            "the adapter file cannot be read",
            where=str(path),
            why=error.strerror or str(error),
            hint="an adapter is a safetensors file, its path relative to where you are",
        ) from error


def read(path: Path) -> list[Adapter]:
    """The adapters of a safetensors file, from its header alone.

    Raises:
        WeightsError: not a safetensors file, or keys that are of no known kind of adapter.
    """
    entries, header = read_header(path)
    found: dict[str, dict[str, Entry]] = defaultdict(dict)
    places: dict[str, tuple[Part, str]] = {}
    strange: list[str] = []
    for name, entry in entries.items():
        match = _KEY.fullmatch(name)
        if match is None:
            strange.append(name)
            continue
        part, module = _place(match["path"])
        if old := match["projection"]:
            leaf = {"to_out": "to_out.0"}.get(old, old)
            module += f".{leaf if part is Part.DENOISER else _OLD_TEXT[old]}"
        key = match["path"] + (f".{old}" if old else "")
        places[key] = (part, module)
        word = match["old"] or match["layer"] or match["new"] or match["alpha"]
        found[key][_ROLES.get(word, word)] = entry
    strange += [key for key, one in found.items() if not {"down", "up"} <= set(one)]
    if strange or not found:
        more = f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else ""
        raise WeightsError(
            "the file holds tensors of no adapter that can be merged"
            if strange
            else "the file holds no adapter",
            where=str(path),
            why=", ".join(strange[:_SHOWN]) + more if strange else "it has no tensors",
            hint="LoRA and LoCon are merged (down, up, mid, alpha); LoHa, LoKr and DoRA are not",
        )
    settings = _settings(path, header)
    adapters = []
    for key, one in found.items():
        part, module = places[key]
        made = Adapter(key, part, module, one["down"], one["up"], one.get("mid"), one.get("alpha"))
        ratio = _ratio(settings, made, path)
        adapters.append(Adapter(**{**made.__dict__, "ratio": ratio}))
    return adapters


def flat(path: str) -> str:
    """A module path as kohya writes it, without the prefix that transformers 5 dropped."""
    return path.replace(".", "_").removeprefix(_TEXT.replace(".", "_"))


def _place(path: str) -> tuple[Part, str]:
    """The component that a key is for, and the module path in it."""
    path = path.removeprefix(_PEFT)
    for prefix, part in _PREFIXES:
        if path.startswith(prefix):
            return part, path.removeprefix(prefix)
    return (Part.TEXT_ENCODER if path.startswith(_TEXT) else Part.DENOISER), path


def _settings(path: Path, header: bytes) -> Mapping[str, Any]:
    """PEFT's configuration, from the header (diffusers 0.35 on) or the file that PEFT writes."""
    metadata = reading.table(header).get("__metadata__")
    inside = metadata.get("lora_adapter_metadata") if isinstance(metadata, dict) else None
    beside = path.parent / "adapter_config.json"
    try:
        if isinstance(inside, str):
            return reading.table(inside)
        elif path.name == "adapter_model.safetensors" and beside.is_file():
            return reading.table(beside.read_bytes())
    except (OSError, ValueError) as error:
        raise WeightsError(
            "the adapter's configuration is not JSON",
            where=str(path),
            why=str(error),
            hint="download or copy the file again",
        ) from error
    return {}


def _ratio(settings: Mapping[str, Any], one: Adapter, path: Path) -> float:
    """Alpha by rank as PEFT's configuration says it; 1 if it says nothing."""
    prefix = {Part.DENOISER: "unet.", Part.TEXT_ENCODER: "text_encoder."}.get(
        one.part, "text_encoder_2."
    )

    def setting(name: str) -> Any:
        return settings.get(prefix + name, settings.get(name))

    if setting("use_dora"):
        raise WeightsError("DoRA adapters cannot be merged", where=str(path))
    alpha, rank = setting("lora_alpha"), max(1, one.rank)
    patterns = setting("alpha_pattern") or {}
    try:
        for pattern, value in patterns.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", one.path):
                alpha = value
                break
        wide = 1.0 if alpha is None else float(alpha)
    except (AttributeError, OverflowError, TypeError, ValueError, re.error) as error:
        raise WeightsError(
            "the adapter's configuration has an alpha that is none",
            where=str(path),
            why=str(error),
            hint="lora_alpha is a number, alpha_pattern a table of numbers by pattern",
        ) from error
    if alpha is None:
        return 1.0
    return wide / (math.sqrt(rank) if setting("use_rslora") else rank)
