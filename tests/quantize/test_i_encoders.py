"""The I formats: rows and signs are optimal, scales nearly so, and the bytes hold them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers.grid_optimum import LEVELS, least_errors, parts_of, stored_scales
from tests.helpers.quantized import importance, weighted_error, weights
from zimage_core.codebooks import codebook
from zimage_core.quantize import i_quants, iq4
from zimage_core.quantize.encode import encode
from zimage_core.quantize.grid_scales import search
from zimage_core.reference.dequantize import dequantize

GRIDS = tuple(i_quants.ENCODERS)
ALL = (*GRIDS, *iq4.ENCODERS)
grids = pytest.mark.parametrize("name", GRIDS)
every = pytest.mark.parametrize("name", ALL)
weighing = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])


def encode_array(x, name, costs=None):
    return encode(torch.from_numpy(x), name, None if costs is None else torch.from_numpy(costs)).numpy()


@every
def test_importance_moves_the_error_to_where_it_costs_little(name):
    x, costs = weights("gaussian", (4, 2560)), importance(2560)
    with_it, without = encode_array(x, name, costs), encode_array(x, name)
    assert weighted_error(with_it, name, x, costs) < 0.96 * weighted_error(without, name, x, costs)
    assert weighted_error(with_it, name, x, None) > weighted_error(without, name, x, None)


@grids
@weighing
def test_bytes_mean_what_the_search_found(name, weighted):
    """d * unit * (1 + 2 * level) * (row +- 1/8), each product exact in float32."""
    plan = i_quants._PLANS[name]
    x, costs = torch.from_numpy(weights("student", (3, 512))), torch.from_numpy(importance(512))
    found = search(plan, x, costs[None] if weighted else None)
    book = codebook(plan.book)
    rows = np.frombuffer(book.values, np.int8).reshape(book.shape)[found.index].astype(np.float64)
    if plan.signs == "rows":
        rows += 0.125 - 0.25 * found.half.numpy()[..., None]
    steps = found.d.numpy()[:, None] * plan.unit * (1 + 2 * found.level.numpy())
    want = rows.reshape(6, -1, plan.run) * steps[..., None]
    want = np.where(found.minus.numpy(), -want.reshape(6, 256), want.reshape(6, 256))
    packed = encode(x, name, costs if weighted else None).numpy()
    np.testing.assert_array_equal(dequantize(packed, name), want.reshape(3, 512))


@grids
@weighing
@pytest.mark.parametrize("kind", ["gaussian", "student"])
def test_rows_and_signs_are_the_best_under_the_stored_scales(name, weighted, kind):
    """Against every row under every pattern of signs that the format has, in float64."""
    x = weights(kind, (1, 768), seed=3)
    costs = importance(768) if weighted else np.ones(768, np.float32)
    packed = encode_array(x, name, costs if weighted else None)
    d, level = stored_scales(packed, name)
    exact, w = x[0].astype(np.float64), costs.astype(np.float64)
    least, terms = least_errors(name, exact, w, (d[:, None] * (1 + 2 * level)).ravel())
    ours = parts_of(name, w * (exact - dequantize(packed, name)[0]) ** 2)
    # a score is a float32 sum of 16 products: some units in the seventh place of the largest of them
    assert (ours <= least + 1e-6 * terms).all()
    assert ours.sum() <= least.sum() * (1 + 1e-6)


@grids
@weighing
def test_levels_are_near_the_best_under_the_stored_d(name, weighted):
    """Against every level with its best rows and signs; chosen before the last d, some lose a little."""
    x = weights("student", (1, 768), seed=4)
    costs = importance(768) if weighted else np.ones(768, np.float32)
    packed = encode_array(x, name, costs if weighted else None)
    d, level = stored_scales(packed, name)

    def errors(level):
        steps = (d[:, None] * (1 + 2 * level)).ravel()
        parts, _ = least_errors(name, x[0].astype(np.float64), costs.astype(np.float64), steps)
        return parts.reshape(*level.shape, -1).sum(-1)

    under_each = [errors(np.full_like(level, i)) for i in range(LEVELS[name])]
    assert errors(level).sum() < 1.01 * np.min(under_each, axis=0).sum()


@weighing
def test_iq4_codes_are_nearest_and_the_scale_is_near_the_best(weighted):
    """Against every float16 as scale and every level as code: a part in a hundred more at most."""
    levels = np.frombuffer(codebook("iq4_nl").values, np.int8).astype(np.float64)
    x = weights("student", (1, 512), seed=6)
    costs = importance(512) if weighted else np.ones(512, np.float32)
    decoded = dequantize(encode_array(x, "IQ4_NL", costs if weighted else None), "IQ4_NL")
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    ours = least = 0.0
    for block, q, w in zip(x.reshape(-1, 32), decoded.reshape(-1, 32), costs.reshape(-1, 32), strict=True):
        peak = np.abs(block).max()
        d = halves[(halves > peak / 200) & (halves < peak / 60)]
        d = np.concatenate([d, -d])[:, None]
        nearest = levels[np.abs(block / d - levels[:, None, None]).argmin(0)]
        least += (w * (block - d * nearest) ** 2).sum(1).min()
        ours += (w * (block - q.astype(np.float64)) ** 2).sum()
    assert ours < 1.01 * least


@pytest.mark.parametrize("name", iq4.ENCODERS)
def test_iq4_levels_are_exact_at_ties_and_edges(name):
    """Weights that are levels times a scale come back as they were, and so do their negatives."""
    levels = np.frombuffer(codebook("iq4_nl").values, np.int8).astype(np.float32)
    x = np.tile(levels, 32)[None] * np.float32(2.0**-9)
    np.testing.assert_array_equal(dequantize(encode_array(x, name), name), x)
    np.testing.assert_array_equal(dequantize(encode_array(-x, name), name), -x)


@every
def test_what_was_decoded_is_encoded_again_without_loss(name):
    """The search does not know the grid of the weights, and finds it in all but a block or two."""
    decoded = dequantize(encode_array(weights("gaussian", (8, 1024)), name), name)
    packed = encode_array(decoded, name)
    assert (dequantize(packed, name) == decoded).reshape(-1, 256).all(1).mean() > 0.9
    assert weighted_error(packed, name, decoded, None) < 0.005
