"""Putting a merge in front of a self-attention and what undoes it behind."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from sdopt import graph
from sdopt.passes import _ascend_merging as ascend
from sdopt.passes import _token_merging as merging
from sdopt.passes._self_attention import Site, token_free_shape
from sdopt.passes.base import PassContext

Partition = merging.Partition | ascend.Partition
Restore = Callable[[graph.Emitter, ir.Value], ir.Value]


def merge_around(site: Site, anchor: ir.Node, part: Partition, ctx: PassContext) -> None:
    """Merge the tokens in front of the projections, and restore all before the residual Add.

    ``anchor`` is the first of the projections.
    """
    tokens, restore = _merged(emitter(site, anchor, "tome/merge", ctx), part, site)
    for projection in site.projections:
        projection.replace_input_with(0, tokens)
    for reshape in site.reshapes:
        if (shape := token_free_shape(reshape)) is not None:
            reshape.replace_input_with(1, emitter(site, reshape, "tome/shape", ctx).const(shape))
            reshape.attributes.pop("allowzero", None)
    full = site.residual.inputs[site.branch]
    if full is None:
        raise TypeError("the branch of a residual Add is never empty")
    restored = restore(emitter(site, site.residual, "tome/unmerge", ctx), full)
    restored.shape = full.shape
    site.residual.replace_input_with(site.branch, restored)
    _resize(site, full, tokens)


def _merged(emit: graph.Emitter, part: Partition, site: Site) -> tuple[ir.Value, Restore]:
    """The merged tokens, and what restores the full sequence behind the attention."""
    if isinstance(part, ascend.Partition):
        tokens, found = ascend.merge(emit, part, site.hidden, site.tokens)
        width = ascend.channels(site.tokens)
        return tokens, lambda behind, value: ascend.unmerge(behind, part, value, found, width)
    tokens, rows = merging.merge(emit, part, site.hidden, site.tokens)
    return tokens, lambda behind, value: merging.unmerge(behind, value, rows)


def emitter(site: Site, anchor: ir.Node, label: str, ctx: PassContext) -> graph.Emitter:
    """Nodes below ``<the attention's module>.tome``, so that keep-lists can name them."""
    emit = ctx.emitter(anchor, label)
    emit.module = f"{graph.module_path(site.attention)}.tome"
    return emit


def _resize(site: Site, full: ir.Value, tokens: ir.Value) -> None:
    """Write the length of the merged sequence to every value inside; it is shorter now.

    Where that is not known, or other axes have the old length too, the length is unknown.
    """
    length = site.tokens.shape[1] if site.tokens.shape is not None else None
    merged = tokens.shape[1] if tokens.shape is not None else None
    for value in {*site.inner, full}:
        if value.shape is None or length is None:
            continue
        dims = list(value.shape)
        new = merged if isinstance(merged, int) and dims.count(length) == 1 else None
        value.shape = ir.Shape([new if dim == length else dim for dim in dims])
