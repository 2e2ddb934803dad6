"""``tome``: token merging before the self-attentions at the highest resolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from sdopt import graph
from sdopt.passes import _token_merging as merging
from sdopt.passes._self_attention import KIND, Site, find, token_free_shape
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
        blocks: how many self-attentions to merge (``tome=5`` is all of SD1.x and SD2.x).
        ratio: the share of the tokens that is merged away, up to 0.75.
        seed: draws the destinations; by default the run's seed.

    Counts: ``self_attention``; those of lower resolutions and after the first ``blocks`` are left.

    Example:
        sdopt optimize BUNDLE --passes clean,fuse_qkv,tome=5:ratio=0.4
    """

    blocks: int
    ratio: float = 0.5
    seed: int | None = None

    numerics: ClassVar[Numerics] = Numerics.LOSSY
    roles: ClassVar[frozenset[Role]] = frozenset({Role.DENOISER, Role.MODEL})
    after: ClassVar[tuple[str, ...]] = ("raise_ops", "pad_align")
    once: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, not {self.blocks}")
        if not 0 <= self.ratio <= MAX_RATIO:
            raise ValueError(f"ratio must be from 0 to {MAX_RATIO}, not {self.ratio}")

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
                part = 2 ** (site.level - top)
                ctx.skip(f"its resolution is 1/{part} of the highest", site.attention, KIND)
            elif site not in chosen:
                ctx.skip(f"it comes after the first {self.blocks}", site.attention, KIND)
        if len(highest) < self.blocks:
            ctx.note(
                f"asked for {self.blocks} self-attentions, merged {len(highest)}: "
                "no more at the highest resolution"
            )
        if not chosen:
            return
        order = {node: index for index, node in enumerate(model.graph)}
        anchors = [min(site.projections, key=order.__getitem__) for site in chosen]
        seed = ctx.seed if self.seed is None else self.seed
        emit = _emitter(chosen[0], anchors[0], "partition", ctx)
        part = merging.partition(emit, chosen[0].image, self.ratio, seed)
        for site, anchor in zip(chosen, anchors, strict=True):
            _merge_around(site, anchor, part, ctx)
            ctx.count(KIND)


def _merge_around(site: Site, anchor: ir.Node, part: merging.Partition, ctx: PassContext) -> None:
    emit = _emitter(site, anchor, "merge", ctx)
    tokens, rows = merging.merge(emit, part, site.hidden, site.tokens)
    for projection in site.projections:
        projection.replace_input_with(0, tokens)
    for reshape in site.reshapes:
        if (shape := token_free_shape(reshape)) is not None:
            reshape.replace_input_with(1, _emitter(site, reshape, "shape", ctx).const(shape))
            reshape.attributes.pop("allowzero", None)
    full = site.residual.inputs[site.branch]
    if full is None:
        raise TypeError("the branch of a residual Add is never empty")
    restored = merging.unmerge(_emitter(site, site.residual, "unmerge", ctx), full, rows)
    restored.shape = full.shape
    site.residual.replace_input_with(site.branch, restored)
    _forget_length(site, full)


def _emitter(site: Site, anchor: ir.Node, label: str, ctx: PassContext) -> graph.Emitter:
    """Nodes below ``<the attention's module>.tome``, so that keep-lists can name them."""
    emit = ctx.emitter(anchor, f"tome/{label}")
    emit.module = f"{graph.module_path(site.attention)}.tome"
    return emit


def _forget_length(site: Site, full: ir.Value) -> None:
    """Mark the token axis of every value inside as unknown: it is shorter now."""
    length = site.tokens.shape[1] if site.tokens.shape is not None else None
    for value in {*site.inner, full}:
        if value.shape is not None:
            value.shape = ir.Shape([None if dim == length else dim for dim in value.shape])
