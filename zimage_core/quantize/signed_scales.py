"""Signed integer scales of sub-blocks, times one float16 scale of the super-block (Q3_K, Q6_K, IQ4_XS).

The search is like that of `affine_scales`, without minima: w = d * scale * level, with levels of both signs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zimage_core.quantize.blocks import as_half
from zimage_core.quantize.scale_search import (
    TINY,
    Moments,
    Nearest,
    Runs,
    SuperBlocks,
    fit_symmetric,
    peaks,
    quadratic_gain,
    reciprocal,
)


@dataclass(frozen=True, slots=True)
class Signed:
    """Super-blocks of w = d * scale * level; d is [n], scale [subs, n], the levels are columns."""

    d: Tensor
    scale: Tensor
    levels: Tensor


class SignedSearch(SuperBlocks):
    """The search in one slab of n super-blocks without minima.

    Args:
        runs: subs * n runs, in the order of `columns`.
        power: Unit of the weights of each super-block [n].
        nearest: Moves numbers to the levels of a weight.
        limit: Scales are -limit..limit - 1.
    """

    def __init__(self, runs: Runs, power: Tensor, nearest: Nearest, limit: int) -> None:
        super().__init__(runs, power, nearest)
        self.limit = limit

    def start(self, m: Moments, s: Tensor, divisors: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The best d [n], which is the largest scale / one of the divisors, and the integer scales for it."""
        over = torch.tensor(divisors, device=s.device)[:, None]
        d = as_half(peaks(s.view(-1, self.n)) / over, self.power)
        scale = self._integers(s, self.wide(d))
        step = self.wide(d) * scale
        best = self.total(quadratic_gain(m, step)).argmax(0, keepdim=True)
        return d.gather(0, best)[0], scale.gather(0, self.wide(best))[0]

    def _integers(self, s: Tensor, d: Tensor) -> Tensor:
        return (s * reciprocal(d)).round_().clamp_(-self.limit, self.limit - 1)

    def refit(self, m: Moments, scale: Tensor) -> Tensor:
        """d [n] by least squares for fixed codes, rounded to float16."""
        d = self.total(scale * m.qy) / self.total(scale * scale * m.qq).clamp(min=TINY)
        return as_half(d, self.power)

    def neighbours(self, d: Tensor, scale: Tensor, shifts: Sequence[int]) -> tuple[Tensor, Moments]:
        """The best of each scale and its neighbours, with the weights rounded again for each."""
        wide = self.wide(d)
        best, kept, gain = scale, None, torch.full_like(scale, -torch.inf)
        for shift in shifts:
            tried = (scale + shift).clamp_(-self.limit, self.limit - 1)
            s = wide * tried
            fresh = self.runs.moments(self.runs.levels(s, None, self.nearest))
            found = quadratic_gain(fresh, s)
            if kept is None:
                kept = fresh
            better = (found > gain).to(found.dtype)
            best = best.lerp(tried, better)
            kept.take(fresh, better)
            gain = torch.maximum(gain, found)
        return best, kept or self.runs.moments(self.runs.levels(wide * best, None, self.nearest))

    def run(self, starts: Sequence[Tensor], divisors: Sequence[float], rounds: int) -> Signed:
        """The finished super-blocks, from starting scales of the runs."""
        s = fit_symmetric(self.runs, starts, self.nearest)
        m = self.runs.moments(self.runs.levels(s, None, self.nearest))
        d, scale = self.start(m, s, divisors)
        for _ in range(rounds):
            d = self.refit(m, scale)
            scale, m = self.neighbours(d, scale, (0, -1, 1))
        levels = self.runs.levels(self.wide(d) * scale, None, self.nearest)
        return Signed(d * self.power, scale.view(-1, self.n), levels)
