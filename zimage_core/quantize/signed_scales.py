"""Signed integer scales of sub-blocks under one float16 of the super-block (Q3_K, Q6_K).

As `affine_scales`, with one number a sub-block: w = d * scale * level, the levels lying about zero.
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
    """Super-blocks of w = d * scale * level: d [n], scale [subs, n], levels as columns."""

    d: Tensor
    scale: Tensor
    levels: Tensor


class SignedSearch(SuperBlocks):
    """One slab of super-blocks without minima.

    Args:
        runs: subs * n runs, ordered as `columns` does.
        power: The unit of the weights [n].
        nearest: Moves numbers to the levels of a weight.
        limit: Scales are -limit..limit - 1.
    """

    def __init__(self, runs: Runs, power: Tensor, nearest: Nearest, limit: int) -> None:
        super().__init__(runs, power, nearest)
        self.limit = limit

    def start(self, m: Moments, s: Tensor, divisors: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The best of several d [n]: the extreme scale over each divisor; and the scales under it."""
        over = torch.tensor(divisors, device=s.device)[:, None]
        d = as_half(peaks(s.view(-1, self.n)) / over, self.power)
        scale = self._integers(s, self.wide(d))
        step = self.wide(d) * scale
        best = self.total(quadratic_gain(m, step)).argmax(0, keepdim=True)
        return d.gather(0, best)[0], scale.gather(0, self.wide(best))[0]

    def _integers(self, s: Tensor, d: Tensor) -> Tensor:
        return (s * reciprocal(d)).round_().clamp_(-self.limit, self.limit - 1)

    def refit(self, m: Moments, scale: Tensor) -> Tensor:
        """Least squares for d [n], as float16 numbers, all codes fixed."""
        d = self.total(scale * m.qy) / self.total(scale * scale * m.qq).clamp(min=TINY)
        return as_half(d, self.power)

    def neighbours(self, d: Tensor, scale: Tensor, shifts: Sequence[int]) -> tuple[Tensor, Moments]:
        """Each scale against its neighbours, the weights rounded anew for each."""
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
        """From starting scales of the runs to finished super-blocks."""
        s = fit_symmetric(self.runs, starts, self.nearest)
        m = self.runs.moments(self.runs.levels(s, None, self.nearest))
        d, scale = self.start(m, s, divisors)
        for _ in range(rounds):
            d = self.refit(m, scale)
            scale, m = self.neighbours(d, scale, (0, -1, 1))
        levels = self.runs.levels(self.wide(d) * scale, None, self.nearest)
        return Signed(d * self.power, scale.view(-1, self.n), levels)
