"""The I formats on difficult blocks; rows and slabs are encoded independently."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.grid_optimum import EVEN
from tests.helpers.quantized import importance, weighted_error, weights
from zimage_core.formats import by_name
from zimage_core.quantize import encode as encode_module
from zimage_core.quantize import grid, i_quants, iq4
from zimage_core.quantize.encode import encode
from zimage_core.quantize.grid_scales import search
from zimage_core.reference.dequantize import dequantize

ALL = (*i_quants.ENCODERS, *iq4.ENCODERS)
every = pytest.mark.parametrize("name", ALL)

# What each format can do, measured, as relative errors; ggml's are larger. Codebooks of 2 and 3 bits hold
# no zero, so beside a spike stands the smallest number of its row, and not all have a row of one number.
CONSTANT = {"IQ2_XXS": 0.34, "IQ3_S": 0.12}
SPIKE = {
    "IQ1_S": 0.54, "IQ1_M": 0.42, "IQ2_XXS": 0.73, "IQ2_XS": 0.6, "IQ2_S": 0.6, "IQ3_XXS": 0.38,
    "IQ3_S": 0.36, "IQ4_NL": 0.05, "IQ4_XS": 0.05,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def small_slabs():
    """Slabs are whole, padded where weights are few: smaller ones make single blocks forty times as fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "SCORES", 1 << 15)
        yield


def decoded(x, name, costs=None):
    """Weights [n, K] -> what they become, finite."""
    y = dequantize(
        encode(torch.from_numpy(x), name, None if costs is None else torch.from_numpy(costs)).numpy(), name
    )
    assert np.isfinite(y).all()
    return y


@every
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_stay_zeros(name, zero):
    assert (decoded(np.full((2, 512), zero, np.float32), name) == 0).all()


@every
@pytest.mark.parametrize(
    ("x", "limits"),
    [(np.full((1, 256), value, np.float32), CONSTANT) for value in (0.03, -0.03, 3.0)]
    + [(sign * np.eye(1, 256, place, np.float32), SPIKE) for sign in (1, -1) for place in (0, 7, 100, 255)],
)
def test_one_number_everywhere_or_once(name, x, limits):
    assert np.linalg.norm(decoded(x, name) - x) < limits.get(name, 1.5e-3) * np.linalg.norm(x)


@every
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-30, 1e-8, 3e-7])
def test_weights_below_the_reach_of_float16_become_small(name, size):
    x = weights("gaussian", (1, 512)) * np.float32(size / 0.02)
    assert np.abs(decoded(x, name)).max() <= max(8 * size, 4e-6)


@every
@pytest.mark.parametrize("size", [1e8, 1e30, 1e38])
def test_weights_beyond_the_reach_of_the_scale_become_the_largest_and_keep_their_sign(name, size):
    alternating = np.where(np.arange(256) % 2, -size, size).astype(np.float32)[None]
    beside_ordinary_ones = weights("gaussian", (1, 512))
    beside_ordinary_ones[0, 3] = size
    y = decoded(alternating, name)
    assert (np.sign(y) == np.sign(alternating)).all()
    assert np.abs(y).min() > 65504
    assert decoded(beside_ordinary_ones, name)[0, 3] > 65504


@every
def test_importance_of_nothing_counts_as_none(name):
    """Blocks in which no weight counts are encoded as if all did."""
    x, costs = weights("gaussian", (2, 768)), importance(768)
    costs[256:512] = 0
    y = decoded(x, name, costs)
    alike = decoded(x[:, 256:512].copy(), name, np.ones(256, np.float32))
    np.testing.assert_array_equal(y[:, 256:512], alike)


@every
@pytest.mark.parametrize("hot", [0, 9, 200])
def test_one_weight_that_counts_is_exact(name, hot):
    """Its importance is a million times that of its neighbours: its error is below a part in a thousand."""
    x = weights("student", (3, 256))
    costs = np.zeros(256, np.float32)
    costs[hot] = 1
    y = decoded(x, name, costs)
    np.testing.assert_allclose(y[:, hot], x[:, hot], rtol=2e-3)


@every
@pytest.mark.parametrize("factor", [1e-38, 1e30])
def test_only_ratios_of_importance_count(name, factor):
    x, costs = weights("gaussian", (2, 512)), importance(512)
    with_it = weighted_error_of(x, name, costs)
    assert weighted_error_of(x, name, costs * np.float32(factor)) == pytest.approx(with_it, rel=1e-3)


def weighted_error_of(x, name, costs):
    packed = encode(torch.from_numpy(x), name, torch.from_numpy(costs)).numpy()
    return weighted_error(packed, name, x, costs.astype(np.float64) / costs.max())


numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-40, 6e-8, 65504.0, 1e38, -1e38]),
    st.floats(-1, 1, width=32),
    st.integers(-16, 16).map(lambda i: i / 8),
)


@given(few=st.lists(numbers, min_size=1, max_size=40), costs=st.lists(st.floats(0, 1, width=32), max_size=9))
@pytest.mark.parametrize("name", EVEN)
def test_minuses_are_even_for_any_weights(name, few, costs):
    x = torch.tensor(few, dtype=torch.float32).repeat(256)[:256][None]
    w = torch.tensor(costs, dtype=torch.float32).repeat(256)[:256][None] if costs else None
    found = search(i_quants._PLANS[name], x, w)
    assert not (found.minus.view(-1, 8).sum(1) % 2).any()


@given(few=st.lists(numbers, min_size=1, max_size=40), costs=st.lists(st.floats(0, 1, width=32), max_size=9))
@every
def test_any_weights_are_encoded_to_finite_ones_of_no_greater_error(name, few, costs):
    """Never worse than zeros, by more than rounding, unless the smallest scale is already too large."""
    x = np.resize(np.array(few, np.float32), 256)[None]
    w = np.resize(np.array(costs, np.float32), 256) if costs else None
    y = decoded(x, name, w)
    if 1e-3 < np.abs(x).max() < 1e4:
        weight = np.maximum(w / w.max(), 1e-6) if w is not None and w.max() > 0 else np.ones(256)
        assert (weight * (x - y.astype(np.float64)) ** 2).sum() <= 1.001 * (
            weight * x.astype(np.float64) ** 2
        ).sum()


@every
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_rows_slabs_and_threads_change_no_bit(name, weighted, monkeypatch):
    monkeypatch.setattr(grid, "SCORES", 1 << 18)
    x = torch.from_numpy(weights("student", (5, 768)))
    costs = torch.from_numpy(importance(768)) if weighted else None
    whole = encode(x, name, costs)
    assert whole.shape == (5, by_name(name).row_bytes(768))
    assert torch.equal(torch.stack([encode(row, name, costs) for row in x]), whole)
    assert torch.equal(encode(x.flip(0), name, costs).flip(0), whole)
    monkeypatch.setattr(encode_module, "SLAB", 512)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(encode(x, name, costs), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", iq4.ENCODERS)
@pytest.mark.parametrize("kind", ["gaussian", "student"])
def test_groups_of_rows_of_any_size_give_the_same_bytes(name, kind):
    """Sums over columns are made in another order at the edge of a vector, if that is not seen to."""
    for seed in range(6):
        x = torch.from_numpy(weights(kind, (41, 768), seed))
        costs = torch.from_numpy(importance(768, seed)) if seed % 2 else None
        whole = encode(x, name, costs)
        for size in (1, 3, 7):
            assert torch.equal(torch.cat([encode(part, name, costs) for part in x.split(size)]), whole)


@pytest.mark.parametrize("name", i_quants.ENCODERS)
def test_importance_of_each_row_of_its_own(name):
    x = torch.from_numpy(weights("gaussian", (3, 512)))
    costs = torch.from_numpy(np.stack([importance(512, seed) for seed in range(3)]))
    alone = [i_quants.ENCODERS[name](x[i : i + 1], costs[i : i + 1]) for i in range(3)]
    assert torch.equal(i_quants.ENCODERS[name](x, costs), torch.cat(alone))


@pytest.mark.gpu
@every
def test_a_gpu_errs_as_little(name):
    """Products round in another order there, so that near ties may fall otherwise."""
    x, costs = torch.from_numpy(weights("student", (4, 1024))), torch.from_numpy(importance(1024))
    here, there = encode(x, name, costs).numpy(), encode(x.cuda(), name, costs.cuda()).cpu().numpy()
    error = weighted_error(here, name, x.numpy(), costs.numpy())
    assert weighted_error(there, name, x.numpy(), costs.numpy()) == pytest.approx(error, rel=1e-3)


def test_scores_stay_within_their_budget(monkeypatch):
    """Scratch is a budget of scores and features padded to whole chunks, however many weights there are."""
    monkeypatch.setattr(grid, "SCORES", 1 << 20)
    for name, plan in i_quants._PLANS.items():
        book = grid.grid(plan.book, torch.device("cpu"), plan.signs == "rows")
        a = torch.rand(64, 256 // plan.run, plan.run)
        groups = grid.Groups(book, a, torch.ones_like(a), plan.shared)
        assert groups._scores.numel() == 1 << 20, name
        assert groups._features.shape[0] % groups._scores.shape[0] == 0, name
