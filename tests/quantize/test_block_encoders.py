"""What holds for every encoder that searches scales, seen through the NumPy decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers.quantized import BLOCK_TYPES, K_TYPES, SAME_BYTES, importance, weighted_error, weights
from zimage_core.quantize.encode import encode
from zimage_core.reference.dequantize import dequantize

every_type = pytest.mark.parametrize("name", BLOCK_TYPES)
K = 512


def decoded(x, name, costs=None):
    packed = encode(torch.from_numpy(x), name, None if costs is None else torch.from_numpy(costs))
    return dequantize(packed.numpy(), name)


def hard_rows():
    """Rows that a search can stumble over, each float32 [K]."""
    rng = np.random.default_rng(1)
    normal = rng.standard_normal(K)
    rows = {
        "zeros": np.zeros(K),
        "negative zeros": -np.zeros(K),
        "constant": np.full(K, 0.3),
        "negative constant": np.full(K, -0.3),
        "spike": np.eye(K)[3],
        "negative spike": -np.eye(K)[3],
        "alternating": np.where(np.arange(K) % 2, 1.0, -1.0),
        "integers": rng.integers(-8, 8, K),
        "positive": np.abs(normal),
        "far from zero": 1000 + normal,
        "far below zero": -1000 + normal,
        "orders of magnitude": normal * 10.0 ** rng.integers(-10, 4, K),
        "subnormal": normal * 1e-40,
        "smallest": np.full(K, 1e-45),
        "below float16": normal * 1e-7,
        "above float16": normal * 1e6,
        "huge": normal * 1e37,
        "largest": np.where(rng.random(K) < 0.5, -1, 1) * float(np.finfo(np.float32).max),
    }
    return {key: np.asarray(value).astype(np.float32) for key, value in rows.items()}


COSTS = {
    "plain": None,
    "ones": np.ones(K),
    "zeros": np.zeros(K),
    "one channel": np.eye(K)[3],
    "half of the channels": np.arange(K) < K // 2 - 20,
    "orders of magnitude": 10.0 ** np.random.default_rng(2).integers(-30, 30, K),
}


@every_type
@pytest.mark.parametrize("kind", list(COSTS))
def test_no_finite_row_gives_a_weight_that_is_no_number(name, kind):
    rows = hard_rows()
    costs = None if COSTS[kind] is None else COSTS[kind].astype(np.float32)
    found = decoded(np.stack(list(rows.values())), name, costs)
    for row, key in zip(found, rows, strict=True):
        assert np.isfinite(row).all(), key
    assert not found[list(rows).index("zeros")].any()
    assert not found[list(rows).index("negative zeros")].any()


@every_type
def test_importance_of_zero_everywhere_is_none(name):
    x = weights("student", (4, K))
    if name in SAME_BYTES:
        want = decoded(x, name, np.ones(K, np.float32))  # without importance these are not searched
    else:
        want = decoded(x, name)
    np.testing.assert_array_equal(decoded(x, name, np.zeros(K, np.float32)), want)


@every_type
@pytest.mark.parametrize("costs", [None, importance(K)], ids=["plain", "weighted"])
@pytest.mark.parametrize("power", [-2, 3])
def test_a_power_of_two_passes_through(name, costs, power):
    """Deviation 1, so that no scale is subnormal in float16 or E4M3."""
    x = weights("gaussian", (4, K)) * np.float32(50)
    factor = np.float32(2.0**power)
    np.testing.assert_array_equal(decoded(x * factor, name, costs), decoded(x, name, costs) * factor)


SYMMETRIC = ("Q3_K", "Q6_K", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0", "Q4_0", "Q5_0", "Q8_0")


@pytest.mark.parametrize("name", SYMMETRIC)
@pytest.mark.parametrize("costs", [None, importance(K)], ids=["plain", "weighted"])
def test_the_sign_passes_through(name, costs):
    """Scales have signs, or levels are symmetric."""
    x = weights("student", (4, K))
    np.testing.assert_array_equal(decoded(-x, name, costs), -decoded(x, name, costs))


LEVELS = {
    "Q2_K": 16,
    "Q3_K": 16,
    "Q4_K": 32,
    "Q5_K": 32,
    "Q6_K": 16,
    "NVFP4": 16,
    "Q2_0": 64,
    "Q2_0_128": 128,
}


@pytest.mark.parametrize("name", list(LEVELS))
@pytest.mark.parametrize("costs", [None, importance(K)], ids=["plain", "weighted"])
def test_every_weight_has_the_nearest_level_of_its_run(name, costs):
    """Levels seen in a run are levels it has, so none of them may be nearer than the one chosen."""
    x = weights("student", (16, K))
    found = decoded(x, name, costs)
    runs = LEVELS[name]
    x, found = x.reshape(-1, runs), found.reshape(-1, runs)
    distance = np.abs(x[:, :, None] - found[:, None, :]).min(2)
    # the search computes in units of a power of two and rounds (x - minimum) / scale, so halfway is blurred
    assert (np.abs(x - found) <= distance * (1 + 1e-4) + 1e-6 * np.abs(x).max(1, keepdims=True)).all()


@pytest.mark.parametrize("name", K_TYPES)
@pytest.mark.parametrize("kind", ["gaussian", "student"])
@pytest.mark.parametrize("costs", [None, importance(K)], ids=["plain", "weighted"])
def test_scales_are_least_squares_solutions(name, kind, costs):
    """No factor near 1 on all decoded weights of a super-block lowers its error: d (and dmin) are fitted."""
    x = weights(kind, (8, K)).astype(np.float64).reshape(-1, 256)
    found = decoded(x.reshape(8, K).astype(np.float32), name, costs).astype(np.float64).reshape(-1, 256)
    w = np.ones((16, 256)) if costs is None else np.tile(costs.astype(np.float64).reshape(2, 256), (8, 1))
    best = (w * x * found).sum(1) / (w * found**2).sum(1)
    # d is a float16, and the codes are rounded once more after the last fit; 0.52 % is the most seen
    np.testing.assert_allclose(best, 1, atol=1e-2)
    assert np.sqrt(np.mean((best - 1) ** 2)) < 3e-3


@every_type
@pytest.mark.parametrize("kind", ["gaussian", "student"])
def test_decoded_weights_are_encoded_again_with_less_loss(name, kind):
    """Weights that lie on levels already: a second pass costs a part of the first."""
    x = weights(kind, (8, K))
    first = encode(torch.from_numpy(x), name)
    once = dequantize(first.numpy(), name)
    again = encode(torch.from_numpy(once), name).numpy()
    assert weighted_error(again, name, once, None) <= 0.65 * weighted_error(first.numpy(), name, x, None)


@pytest.mark.parametrize("name", K_TYPES)
def test_importance_moves_error_to_where_it_costs_nothing(name):
    x = weights("gaussian", (16, K))
    costs = np.where(np.arange(K) % 4 == 0, 100, 1).astype(np.float32)
    plain, weighted = np.abs(decoded(x, name) - x), np.abs(decoded(x, name, costs) - x)
    assert weighted[:, ::4].mean() < 0.9 * plain[:, ::4].mean()
