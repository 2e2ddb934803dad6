"""``flash_attention=ort`` where a bool mask may hide every key of a query."""

from __future__ import annotations

import pytest

from sdopt.passes.base import PassContext
from sdopt.passes.flash_attention import FlashAttention
from tests.passes.attention_graphs import Sizes, block, hidden_rows
from tests.toolkit import leaves, relative_l2, run

ORT = FlashAttention("ort")
TIGHT = 2e-6
LENGTHS = {"B": 2, "S": 9, "T": 13}


@pytest.mark.parametrize("mask", ["bool[S,T]", "bool[B,1,S,T]"])
@pytest.mark.parametrize("opset", [17, 23])
def test_a_query_that_sees_no_key_becomes_zero(mask: str, opset: int) -> None:
    model = block(mask=mask)
    given = hidden_rows(model, **LENGTHS)
    (before,) = run(model, given)
    assert not before[:, 1].any()
    model.opset_imports[""] = opset  # only Attention needs 23, and the pass takes it away
    ORT.apply(model, PassContext(model))
    (after,) = run(model, given)
    assert not after[:, 1].any()
    assert relative_l2(after, before) < TIGHT


@pytest.mark.parametrize(
    ("mask", "sizes", "attributes"),
    [("bool[B,4,S,T]", Sizes(), ""), ("bool[S,S]", Sizes(keys="S"), "<is_causal=1>")],
)
def test_a_mask_that_may_hide_a_query_from_some_heads_only_is_left(
    mask: str, sizes: Sizes, attributes: str
) -> None:
    leaves(ORT, block(sizes, mask=mask, attributes=attributes), "may hide all keys of a query")
