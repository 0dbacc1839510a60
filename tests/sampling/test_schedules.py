"""Schedules: known values, and N + 1 falling levels from 1 to 0 for every N."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from zimage_core.sampling import schedules
from zimage_core.sampling.samplers import SCHEDULES
from zimage_core.sampling.schedule import FlowMatchEulerScheduler

TURBO, BASE = FlowMatchEulerScheduler(3.0), FlowMatchEulerScheduler(6.0)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 200])
def test_levels_fall_from_one_to_zero(name, steps):
    got = schedules.levels(name, BASE, steps)
    assert len(got) == steps + 1
    assert (got[0], got[-1]) == (1, 0)
    assert all(a > b for a, b in pairwise(got))


def test_a_thousand_steps_visit_every_level_of_the_table_once():
    assert schedules.simple(1000) == [i / 1000 for i in range(1000, 0, -1)]


def test_linear_is_the_schedulers_own():
    assert schedules.levels("linear", BASE, 9) == BASE.levels(9)


def test_simple_equals_the_official_grid_where_the_steps_divide_the_table():
    assert schedules.levels("simple", TURBO, 8) == TURBO.levels(8)
    for steps in (1, 2, 4, 10, 25):
        # the last bit of a grid point may differ
        assert schedules.levels("simple", TURBO, steps) == pytest.approx(TURBO.levels(steps), abs=2e-7)


def test_simple_is_sampled_from_the_shifted_table():
    """As ComfyUI: entry -(1 + int(i * 1000 / N)) of sigma(1 / 1000), ..., sigma(1)."""
    u = torch.arange(1, 1001) / 1000
    table = 3 * u / (1 + 2 * u)
    for steps in (3, 9, 30, 48):
        want = [float(table[-(1 + int(i * (1000 / steps)))]) for i in range(steps)]
        # the grid's last bit may differ between a division and a table
        assert schedules.levels("simple", TURBO, steps)[:-1] == pytest.approx(want, abs=1e-7)


def test_the_quantile_of_the_arcsine_law_is_a_square_of_a_sine():
    for i in range(41):
        assert schedules.beta_quantile(i / 40, 0.5, 0.5) == pytest.approx(
            math.sin(math.pi * i / 80) ** 2, abs=1e-14
        )


def test_the_incomplete_beta_function_equals_its_integral():
    """By the midpoint rule after x = t^(1 / a), which removes the singularity at 0."""
    a, b, count = 0.6, 0.7, 20_000
    whole = math.exp(math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))
    for x in (0.02, 0.3, 0.5, 0.8):
        steps = (torch.arange(count, dtype=torch.float64) + 0.5) / count * x**a
        integral = float(((1 - steps ** (1 / a)) ** (b - 1)).mean()) * x**a / a
        assert schedules.incomplete_beta(x, a, b) == pytest.approx(integral / whole, rel=1e-7)


def test_beta_is_symmetric_before_the_shift():
    grid = schedules.beta(8)
    assert grid[4] == pytest.approx((1 + 999 * 0.5) / 1000)
    assert all(x + y == pytest.approx(1.001) for x, y in zip(grid[1:], grid[:0:-1], strict=True))


def test_beta_bends_by_the_shift():
    grid = schedules.beta(5)
    want = [3 * u / (1 + 2 * u) for u in grid]
    assert schedules.levels("beta", TURBO, 5)[:-1] == pytest.approx(want, abs=1e-7)


def test_bong_tangent_is_two_arctangents_with_the_middle_at_one_half():
    got = schedules.levels("bong_tangent", TURBO, 8)
    n, slope = 10, 0.2 * 40 / 10
    first = [math.atan(slope * (6 - i)) for i in range(6)]
    assert got[:6] == pytest.approx([0.5 + 0.5 * (c - first[-1]) / (first[0] - first[-1]) for c in first])
    second = [math.atan(-slope * i) for i in range(n - 6)]
    assert got[5:] == pytest.approx([0.5 * (c - second[-1]) / (second[0] - second[-1]) for c in second])
    assert got[5] == 0.5
    assert schedules.levels("bong_tangent", BASE, 8) == got
