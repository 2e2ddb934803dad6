"""``tome``: token merging before the self-attentions at the highest resolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from sdopt.passes import _ascend_merging as ascend
from sdopt.passes import _token_merging as merging
from sdopt.passes._merging_sites import emitter, merge_around
from sdopt.passes._self_attention import KIND, Site, find
from sdopt.passes.base import Numerics, Pass, PassContext, Role

MAX_RATIO = 0.75
"""One token of each 2x2 cell is a destination, so at most three of four can be merged away."""


@dataclass(frozen=True)
class Tome(Pass):
    """Merge similar tokens before a self-attention and copy its result back to all of them.

    Before / After:
        x + attend(norm(x))  ->  x + unmerge(attend(merge(norm(x))))

    Applies when: q, k and v are linear projections of one LayerNormalization whose input is added
    back after the output projection and whose tokens come from a feature map; without mask. The
    first ``blocks`` of those at the highest resolution, in graph order, are merged. They share the
    destinations, one in each 2x2 cell, drawn by a seeded hash of the cell's number, so that batch,
    height and width stay dynamic. Attention only: cross-attention and feed-forward keep all tokens
    (``merge_attn`` of the package tomesd, whose dataflow this is). How much it saves
    grows with the size: reports beside a fused attention say from 768 px up (diffusers#2940).

    Numerics: lossy: merged tokens share one answer, and only images can tell what that costs.

    Options:
        blocks: how many self-attentions to merge (``tome=5`` is all of SD1.x and SD2.x at their
            highest resolution, ``tome=10`` all of SDXL, whose highest has none; ``--TOME_num`` of
            Ascend's modify_onnx.py).
        ratio: the share of the tokens that is merged away, up to 0.75.
        seed: draws the destinations; by default the run's seed.
        spelling: standard (operators of ONNX, the default) or ascend (FindMax, TomeMerged and
            TomeUnmerged, which only Ascend's compiler knows). Both merge the same tokens with the
            same seed. Ascend's kernels hold one size per graph, so every size must be fixed; they
            merge half of up to 4096 sources, compute in fp16 (with casts around them in an fp32
            graph), and take channels in multiples of 16.
        generation: of Ascend's kernels, cann8 (the default) or cann7, whose TomeUnmerged is
            called TomeUnmerge.

    Counts: ``self_attention``; those of lower resolutions and after the first ``blocks`` are left.

    Example:
        sdopt optimize BUNDLE --passes clean,fuse_qkv,tome=5:ratio=0.4
    """

    blocks: int
    ratio: float = 0.5
    seed: int | None = None
    spelling: Literal["standard", "ascend"] = "standard"
    generation: ascend.Generation = "cann8"

    numerics: ClassVar[Numerics] = Numerics.LOSSY
    roles: ClassVar[frozenset[Role]] = frozenset({Role.DENOISER, Role.MODEL})
    after: ClassVar[tuple[str, ...]] = ("raise_ops", "pad_align")
    once: ClassVar[bool] = True
    vendor_ops: ClassVar[frozenset[str]] = ascend.OPERATORS

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, not {self.blocks}")
        if not 0 <= self.ratio <= MAX_RATIO:
            raise ValueError(f"ratio must be from 0 to {MAX_RATIO}, not {self.ratio}")
        if self.spelling == "ascend" and self.ratio not in (0, ascend.RATE):
            raise ValueError(
                f"ratio is {ascend.RATE} with spelling=ascend: its kernels merge half"
            )
        if self.spelling == "standard" and self.generation != "cann8":
            raise ValueError("generation is an option of spelling=ascend")

    def draws(self) -> bool:
        """Unless it has a seed of its own."""
        return self.seed is None

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Merge around the chosen self-attentions; the rest is reported with its reason."""
        sites, refused = find(model)
        for reason, node, kind in refused:
            ctx.skip(reason, node, kind)
        if self.ratio == 0:
            ctx.note("ratio=0 merges no tokens: the graph is unchanged")
            return
        top = min((site.level for site in sites), default=0)
        highest = [site for site in sites if site.level == top]
        chosen = highest[: self.blocks]
        for site in sites:
            if site.level > top:
                share = 2 ** (site.level - top)
                ctx.skip(f"its resolution is 1/{share} of the highest", site.attention, KIND)
            elif site not in chosen:
                ctx.skip(f"it comes after the first {self.blocks}", site.attention, KIND)
        if len(highest) < self.blocks:
            ctx.note(
                f"asked for {self.blocks} self-attentions, merged {len(highest)}: "
                "no more at the highest resolution"
            )
        chosen = self._taken(chosen, ctx)
        if not chosen:
            return
        order = {node: index for index, node in enumerate(model.graph)}
        anchors = [min(site.projections, key=order.__getitem__) for site in chosen]
        seed = ctx.seed if self.seed is None else self.seed
        part: merging.Partition | ascend.Partition
        if self.spelling == "ascend":
            emit = emitter(chosen[0], anchors[0], "tome", ctx)
            part = ascend.partition(emit, chosen[0], seed, self.generation)
        else:
            emit = emitter(chosen[0], anchors[0], "tome/partition", ctx)
            part = merging.partition(emit, chosen[0].image, self.ratio, seed)
        for site, anchor in zip(chosen, anchors, strict=True):
            merge_around(site, anchor, part, ctx)
            ctx.count(KIND)

    def _taken(self, sites: list[Site], ctx: PassContext) -> list[Site]:
        """Those that the spelling can merge around."""
        if self.spelling == "standard":
            return sites
        reasons = {site.attention: ascend.refusal(site) for site in sites}
        for site in sites:
            if (reason := reasons[site.attention]) is not None:
                ctx.skip(reason, site.attention, kind="self_attention")
        return [site for site in sites if reasons[site.attention] is None]
