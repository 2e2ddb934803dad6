"""What a model holds, counted from its PyTorch modules while they run: no graph is looked at."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPAttention

from tests.surgery import models

KINDS: dict[str, tuple[type[torch.nn.Module], ...]] = {
    "attention": (Attention, CLIPAttention),
    "group_norm": (torch.nn.GroupNorm,),
    "layer_norm": (torch.nn.LayerNorm,),
    "geglu": (GEGLU,),
    "silu": (torch.nn.SiLU,),
    "quick_gelu": (QuickGELUActivation,),
}


def counted(model: str, attention: str = "eager") -> dict[str, int]:
    """How often each kind of module is called, of calls on one tensor only the first.

    SD1.5's 22 residual blocks each take the SiLU of the same time embedding: that is one.
    """
    module = models.module(model, attention, "fp32")
    seen: set[tuple[str, int]] = set()
    alive: list[torch.Tensor] = []
    counts: Counter[str] = Counter(dict.fromkeys(KINDS, 0))

    def called(kind: str, one: torch.nn.Module, given: Any) -> None:
        value = given[0]
        owner = 0 if kind in ("silu", "quick_gelu") else id(one)
        if (kind, id(value), owner) not in seen:
            seen.add((kind, id(value), owner))
            alive.append(value)  # so that its id is not given away again
            counts[kind] += 1

    handles = []
    for one in module.modules():
        for kind, types in KINDS.items():
            if isinstance(one, types):
                hook = lambda m, args, kwargs, kind=kind: called(  # noqa: E731
                    kind, m, args or (kwargs["hidden_states"],)
                )
                handles.append(one.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with torch.no_grad():
            module(*models.arguments(model, "fp32"))
    finally:
        for handle in handles:
            handle.remove()
    return dict(counts)
