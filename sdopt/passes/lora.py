"""``lora``: low-rank adapters merged into the weights that they were trained for."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from sdopt import reading
from sdopt.adapters import MERGED_KEY, files, matching, merging
from sdopt.errors import BundleError, UsageError
from sdopt.passes.base import Intent, Numerics, Pass, PassContext, Reach, Role


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
    adapter it is another model, and ``sdopt compare`` calls that pair unjudged. To try adapters on
    a stage that is there, ``sdopt run --lora FILE:scale`` needs no pass.

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
        return (files.digest_of(self._path()),)

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Replace each adapted weight by its lazy sum; no weight is read."""
        (digest,) = self.reads()
        adapters = files.read(self._path())
        merged = _merged(model)
        if digest in merged:
            self._check_scale(merged[digest])
            ctx.skip("this adapter was merged already", self.file)
            return
        weights = matching.weights_of(model)
        if not weights:
            ctx.skip("the graph has no weight matrices to merge into", self.file)
            return
        chosen = matching.choose(adapters, weights, ctx.role.value, ctx.config)
        if not chosen:
            ctx.skip(f"the adapter holds nothing for a {ctx.role.value}", self.file)
            return
        pairs = matching.pair(chosen, weights, adapters, self.file)
        updates = merging.updates(pairs, self.scale, digest, self.file)
        for leaf, update in updates:
            value = model.graph.initializers[leaf.name]
            if value.const_value is not None:
                tensor = merging.merge(value.const_value, update)
                # A graph made in memory may not state the types of its initializers.
                value.const_value, value.dtype, value.shape = tensor, tensor.dtype, tensor.shape
        model.metadata_props[MERGED_KEY] = json.dumps({**merged, digest: self.scale})
        ctx.count("adapted_weight", len(updates))

    def _path(self) -> Path:
        return reading.user_path(self.file)  # no shell expands ~ behind lora=

    def _check_scale(self, before: float) -> None:
        if before != self.scale:
            raise UsageError(
                "this adapter was merged already, at another scale",
                where=self.file,
                why=f"the model holds it at scale {before}; {self.scale} was asked for",
                hint="start from a stage without it: --from model",
            )


def _merged(model: ir.Model) -> dict[str, float]:
    """Digest to scale of the adapters that are in a graph, as its metadata says."""
    try:
        return reading.table(model.metadata_props.get(MERGED_KEY, "{}"))
    except ValueError as error:
        raise BundleError(
            "the record of merged adapters cannot be read",
            where=f"metadata {MERGED_KEY}",
            why=str(error),
            hint="make the stage again from the one that it came from",
        ) from error
