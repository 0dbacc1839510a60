"""Schedules by name: other ways than the checkpoint's own to place the noise levels of N steps.

Each gives N + 1 falling levels from 1 to 0. Those that choose a grid u in (0, 1] are bent by the shift like
the checkpoint's; bong_tangent states noise levels, and no shift applies to it.
"""

from __future__ import annotations

import math

import torch

from zimage_core.sampling.schedule import FlowMatchEulerScheduler
from zimage_core.sampling.stepping import TRAINED

BETA = 0.6
"""Both parameters of the beta distribution, as in ComfyUI."""


def levels(name: str, scheduler: FlowMatchEulerScheduler, steps: int) -> tuple[float, ...]:
    """Noise levels of a schedule.

    Args:
        name: One of `samplers.SCHEDULES`.
        scheduler: States the shift.
        steps: Number of steps, from 1 to `MAX_STEPS`.

    Raises:
        BadArgument: The number of steps is out of range.
    """
    linear = scheduler.levels(steps)
    if name == "linear":
        return linear
    if name == "bong_tangent":
        return bong_tangent(steps)
    return scheduler.bent(torch.tensor(simple(steps) if name == "simple" else beta(steps)))


def simple(steps: int) -> list[float]:
    """Every (1000 / N)th of the trained times 1, 0.999, ..., 0.001, rounded to more noise, as in ComfyUI."""
    return [(TRAINED - i * TRAINED // steps) / TRAINED for i in range(steps)]


def beta(steps: int) -> list[float]:
    """Quantiles of a beta distribution: dense at both ends.

    ComfyUI rounds them to the 1000 trained times and drops those that occur twice, so that many steps become
    fewer; here they are not rounded, and differ from it by at most 0.0005.

    Source: Lee et al. 2024, arXiv 2407.12173, section 4.
    """
    return [(1 + (TRAINED - 1) * beta_quantile(1 - i / steps, BETA, BETA)) / TRAINED for i in range(steps)]


def bong_tangent(steps: int) -> tuple[float, ...]:
    """Two halves of an arctangent, from 1 to 0.5 and on to 0.

    Source: RES4LYF's `bong_tangent` with its defaults (pivots 0.6, slopes 0.2 * 40 / n, middle 0.5).
    """
    if steps == 1:
        return (1.0, 0.0)
    n = steps + 2
    slope, first = 0.2 * 40 / n, int(n * 0.6)

    def half(count: int, pivot: int, start: float, end: float) -> list[float]:
        curve = [math.atan(slope * (pivot - i)) for i in range(count)]
        low, high = curve[-1], curve[0]
        return [end + (start - end) * (value - low) / (high - low) for value in curve]

    found = [*half(first, first, 1.0, 0.5)[:-1], *half(n - first, 0, 0.5, 0.0)]
    return (*torch.tensor(found[:-1]).tolist(), 0.0)


def beta_quantile(q: float, a: float, b: float) -> float:
    """The x in [0, 1] with I_x(a, b) = q, by bisection in float64."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if incomplete_beta(middle, a, b) < q else (low, middle)
    return high


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), for x in [0, 1].

    Source: the continued fraction of DLMF 8.17.22, evaluated backwards; 61 terms give float64 where x is
    below the mean, and I_x(a, b) = 1 - I_(1 - x)(b, a) elsewhere.
    """
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(1 - x, b, a)
    fraction = 1.0
    for m in range(30, -1, -1):
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        if m < 30:
            k = m + 1
            fraction = 1 + k * (b - k) * x / ((a + 2 * k - 1) * (a + 2 * k)) / fraction
        fraction = 1 + odd / fraction
    front = a * math.log(x) + b * math.log1p(-x) - math.lgamma(a) - math.lgamma(b) + math.lgamma(a + b)
    return math.exp(front) / (a * fraction)
