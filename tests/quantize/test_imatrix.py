"""Importance matrices: means, merging, and what does not fit a model."""

from __future__ import annotations

import pytest
import torch

from zimage_core.errors import BadArgument, WrongModel
from zimage_core.quantize.imatrix import LEVEL_EDGES, Imatrix, Sums, flat, level_bin
from zimage_core.sampling.schedule import FlowMatchEulerScheduler

WIDTHS = {"layers.0.attention.qkv.weight": 4, "layers.0.feed_forward.w2.weight": 6}


def sums(width: int, count: int, value: float, levels: int = 0) -> Sums:
    total = Sums(torch.full((width,), value * count, dtype=torch.float64), count)
    if not levels:
        return total
    parts = torch.zeros(levels, width, dtype=torch.float64)
    parts[0], counts = total.squares, torch.zeros(levels, dtype=torch.int64)
    counts[0] = count
    return Sums(total.squares, count, parts, counts)


def test_importance_is_the_mean_square():
    imatrix = Imatrix({"a": sums(4, 3, 2.0)})
    assert torch.equal(imatrix.importance("a"), torch.full((4,), 2.0))
    assert imatrix.importance("a").dtype == torch.float32
    assert imatrix.importance("b") is None
    assert Imatrix({"a": sums(4, 0, 0.0)}).importance("a") is None


def test_importance_of_a_noise_level_is_the_mean_of_its_rows():
    imatrix = Imatrix({"a": sums(4, 3, 2.0, levels=2)}, edges=(0.5,))
    assert torch.equal(imatrix.importance("a", 0), torch.full((4,), 2.0))
    assert imatrix.importance("a", 1) is None
    with pytest.raises(BadArgument, match="level: 2 is none of the 2 bins"):
        imatrix.importance("a", 2)


def test_merged_parts_are_the_whole():
    one = Imatrix({"a": sums(4, 3, 2.0, 2), "b": sums(2, 1, 1.0)}, ("x",), 2, (0.5,))
    two = Imatrix({"a": sums(4, 1, 6.0, 2), "c": sums(2, 1, 1.0)}, ("x", "y"), 1, (0.5,))
    both = one.merge(two)
    assert torch.equal(both.importance("a"), torch.full((4,), 3.0))  # (3 * 2 + 1 * 6) / 4
    assert both.entries["a"].level_counts.tolist() == [4, 0]
    assert set(both.entries) == {"a", "b", "c"}
    assert (both.datasets, both.chunks, both.edges) == (("x", "y"), 3, (0.5,))


def test_bins_are_dropped_where_two_parts_have_others():
    one = Imatrix({"a": sums(4, 3, 2.0, 2)}, edges=(0.5,))
    both = one.merge(Imatrix({"a": sums(4, 1, 6.0, 2)}, edges=(0.25,)))
    assert both.edges == ()
    assert both.entries["a"].by_level is None
    assert torch.equal(both.importance("a"), torch.full((4,), 3.0))


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


def test_each_step_of_turbo_has_a_bin_of_its_own():
    levels = FlowMatchEulerScheduler(3.0).sigmas(8)[:-1]
    assert [level_bin(level) for level in levels] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert list(LEVEL_EDGES) == sorted(LEVEL_EDGES)
