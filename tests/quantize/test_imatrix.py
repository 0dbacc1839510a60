"""Importance matrices: means, merging, and what does not fit a model."""

from __future__ import annotations

import pytest
import torch

from zimage_core.errors import WrongModel
from zimage_core.quantize.imatrix import Imatrix, Sums, flat

WIDTHS = {"layers.0.attention.qkv.weight": 4, "layers.0.feed_forward.w2.weight": 6}


def sums(width: int, count: int, value: float) -> Sums:
    return Sums(torch.full((width,), value * count, dtype=torch.float64), count)


def test_importance_is_the_mean_square():
    imatrix = Imatrix({"a": sums(4, 3, 2.0)})
    assert torch.equal(imatrix.importance("a"), torch.full((4,), 2.0))
    assert imatrix.importance("a").dtype == torch.float32
    assert imatrix.importance("b") is None
    assert Imatrix({"a": sums(4, 0, 0.0)}).importance("a") is None


def test_merged_parts_are_the_whole():
    one = Imatrix({"a": sums(4, 3, 2.0), "b": sums(2, 1, 1.0)}, ("x",), 2)
    two = Imatrix({"a": sums(4, 1, 6.0), "c": sums(2, 1, 1.0)}, ("x", "y"), 1)
    both = one.merge(two)
    assert torch.equal(both.importance("a"), torch.full((4,), 3.0))  # (3 * 2 + 1 * 6) / 4
    assert both.entries["a"].count == 4
    assert set(both.entries) == {"a", "b", "c"}
    assert (both.datasets, both.chunks) == (("x", "y"), 3)


def test_merging_two_models_is_refused():
    with pytest.raises(WrongModel, match="a has 4 input channels there and 5 here"):
        Imatrix({"a": sums(4, 1, 1.0)}).merge(Imatrix({"a": sums(5, 1, 1.0)}))


def test_an_imatrix_of_this_model_fits():
    flat(WIDTHS).check_fits(WIDTHS)
    partly = Imatrix({"layers.0.attention.qkv.weight": sums(4, 1, 1.0)})
    partly.check_fits(WIDTHS)
    assert partly.missing(WIDTHS) == ("layers.0.feed_forward.w2.weight",)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"layers.0.attention.qkv.weight": 8}, "qkv.weight has 8 input channels there and 4 here"),
        ({"blk.0.attn_q.weight": 4}, "knows 0 of 2 tensors, layers.0.*qkv.weight is not.*has blk.0.attn_q"),
        ({}, "knows 0 of 2 tensors.*it is empty"),
    ],
)
def test_an_imatrix_of_another_model_is_refused(entries, words):
    with pytest.raises(WrongModel, match=words):
        flat(entries).check_fits(WIDTHS)
