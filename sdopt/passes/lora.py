"""``lora``: low-rank adapters merged into the weights that they were trained for."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from sdopt.errors import UsageError, WeightsError
from sdopt.passes import _lora_file, _lora_match, _lora_merge
from sdopt.passes.base import Intent, Numerics, Pass, PassContext, Reach, Role

MERGED_KEY = "sdopt.lora"
"""Metadata key of a model: JSON, digest of each adapter file merged into it to its scale."""


@dataclass(frozen=True)
class Lora(Pass):
    """Merge a LoRA file into the weights while they are written; two files are two passes.

    Before / After:
        W                     ->  W + scale * alpha / rank * up @ down
        W [out, in, kh, kw]   ->  the same, the update reshaped; with mid where there is one

    Applies when: a weight has the module path of a key. Keys are kohya's
    (``lora_unet_mid_block_attentions_0_proj_in.lora_down.weight``) or those of diffusers and PEFT
    (``unet.mid_block.attentions.0.proj_in.lora_A.weight``, ``...attn1.processor.to_q_lora.down``).
    Keys of other components are left to these; a key that matches nothing is an error with the
    nearest names. A file that is in the model already is not merged again.

    Numerics: reassociated, beside the same model merged in PyTorch. Beside a stage without the
    adapter it is another model, and ``sdopt compare`` calls that pair unjudged.

    Options:
        file: the safetensors file.
        scale: the strength; 1 is what the adapter was trained with.

    Counts: ``adapted_weight``, each weight that an update was merged into.

    Example:
        sdopt optimize BUNDLE --passes clean,lora=style.safetensors:scale=0.8,fuse_qkv
    """

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED
    intent: ClassVar[Intent] = Intent.OTHER
    roles: ClassVar[frozenset[Role]] = frozenset({Role.DENOISER, Role.TEXT_ENCODER, Role.MODEL})
    reach: ClassVar[Reach] = Reach.WHOLE

    file: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be a finite number, not {self.scale}")

    def reads(self) -> tuple[str, ...]:
        """The digest of the adapter file."""
        return (_lora_file.digest_of(self._path()),)

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Replace each adapted weight by its lazy sum; no weight is read."""
        (digest,) = self.reads()
        adapters = _lora_file.read(self._path())
        merged: dict[str, float] = json.loads(model.metadata_props.get(MERGED_KEY, "{}"))
        if digest in merged:
            self._check_scale(merged[digest])
            ctx.skip("this adapter was merged already", self.file)
            return
        weights = _lora_match.weights_of(model)
        if not weights:
            ctx.skip("the graph has no weight matrices to merge into", self.file)
            return
        chosen = _lora_match.choose(adapters, weights, ctx.role, ctx.config)
        if not chosen:
            ctx.skip(f"the adapter holds nothing for a {ctx.role.value}", self.file)
            return
        updates = []
        for value, one in _lora_match.pair(chosen, weights, adapters, self.file):
            update = _lora_merge.Update(one, self.scale, _lora_match.inputs_first(value))
            updates.append((value, update))
        self._check_shapes(updates)
        for value, update in updates:
            if value.const_value is not None:
                tensor = _lora_merge.merge(value.const_value, update)
                # A graph made in memory may not state the types of its initializers.
                value.const_value, value.dtype, value.shape = tensor, tensor.dtype, tensor.shape
        model.metadata_props[MERGED_KEY] = json.dumps({**merged, digest: self.scale})
        ctx.count("adapted_weight", len(updates))

    def _path(self) -> Path:
        return Path(self.file).expanduser()  # no shell expands ~ behind lora=

    def _check_scale(self, before: float) -> None:
        if before != self.scale:
            raise UsageError(
                "this adapter was merged already, at another scale",
                where=self.file,
                why=f"the model holds it at scale {before}; {self.scale} was asked for",
                hint="start from a stage without it: --from model",
            )

    def _check_shapes(self, updates: list[tuple[ir.Value, _lora_merge.Update]]) -> None:
        wrong = [
            reason
            for value, update in updates
            if value.const_value is not None
            and (reason := _lora_merge.misfit(value.const_value.shape.numpy(), update))
        ]
        if wrong:
            raise WeightsError(
                f"{len(wrong)} of the adapter's {len(updates)} updates do not fit their weights",
                where=self.file,
                why="\n".join(wrong[:3]),
                hint="the adapter was made for a model of another size",
            )
