"""Scales and minima of sub-blocks as small integers under two float16 scales (Q2_K, Q4_K, Q5_K).

`scale_search` gives each sub-block a scale and a minimum, which are real numbers; here both become integers.
The super-block's scales start at the candidates for which rounding the sub-blocks' scales costs least. Then
two steps alternate: the super-block's scales are fitted to the integers by least squares, and each integer is
compared with its neighbours, with all weights rounded again.
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
    Runs,
    SuperBlocks,
    centre_of,
    lowering,
    nearest_integer,
    reciprocal,
)


@dataclass(frozen=True, slots=True)
class Affine:
    """Super-blocks of w = d * scale * q - dmin * least: d, dmin [n]; scale, least [subs, n]; q as columns."""

    d: Tensor
    dmin: Tensor
    scale: Tensor
    least: Tensor
    codes: Tensor


class AffineSearch(SuperBlocks):
    """The search in one slab of n super-blocks with minima.

    Args:
        runs: subs * n centred runs, in the order of `columns`.
        power: Unit of the weights of each super-block [n].
        top: Largest code of a weight.
        limit: Largest code of a scale and of a minimum.
    """

    def __init__(self, runs: Runs, power: Tensor, top: int, limit: int) -> None:
        super().__init__(runs, power, nearest_integer(0, top))
        self.centre, self.limit = centre_of(runs), limit

    def _beta(self, dmin: Tensor, least: Tensor) -> Tensor:
        return -(dmin * least) - self.centre

    def least_for(self, m: Moments, s: Tensor, dmin: Tensor) -> Tensor:
        """The best codes of the minima for scales s: [runs]."""
        runs = self.runs
        wanted = (s * m.q - runs.total) / runs.weight - self.centre
        return (wanted * reciprocal(dmin)).round_().clamp_(0, self.limit)

    def recode(self, m: Moments, wanted: Tensor, d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Integers near the wanted scales, their minima, and the decrease of the error, for fixed codes."""
        wished = wanted * reciprocal(d)

        def tried(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            scale = scale.clamp_(0, self.limit)
            s = d * scale
            least = self.least_for(m, s, dmin)
            return scale, least, lowering(self.runs, m, s, self._beta(dmin, least))

        down, up = tried(wished.floor()), tried(wished.ceil())
        better = (up[2] > down[2]).to(wished.dtype)
        return down[0].lerp_(up[0], better), down[1].lerp_(up[1], better), torch.maximum(down[2], up[2])

    def refit(self, m: Moments, scale: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
        """d and dmin [n] by least squares for fixed codes, rounded to float16."""
        runs, c = self.runs, self.centre
        y_total, q = runs.total + c * runs.weight, m.q
        qx = m.qy + c * q

        total = self.total
        a = total(scale * scale * m.qq)
        b = total(scale * least * q)
        e = total(least * least * runs.weight)
        p, r = total(scale * qx), total(least * y_total)
        det = a * e - b * b
        solvable = det > 1e-6 * a * e
        det = torch.where(solvable, det, 1.0)
        d = torch.where(solvable, (p * e - r * b) / det, p / a.clamp(min=TINY))
        dmin = torch.where(solvable, (p * b - r * a) / det, -r / e.clamp(min=TINY))
        return as_half(d.clamp_(min=0), self.power), as_half(dmin.clamp_(min=0), self.power)

    def start(self, m: Moments, s: Tensor, beta: Tensor, divisors: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Integer scales and minima for the best d and dmin, which are the largest values / divisors."""
        over = torch.tensor(divisors, device=s.device)
        peak = s.view(-1, self.n).amax(0)
        floor = (-(beta + self.centre)).view(-1, self.n).amax(0).clamp_(min=0)
        d = as_half(peak / over.repeat_interleave(len(over))[:, None], self.power)
        dmin = as_half(floor / over.repeat(len(over))[:, None], self.power)
        scale, least, gain = self.recode(m, s, self.wide(d), self.wide(dmin))
        best = self.wide(self.total(gain).argmax(0, keepdim=True))
        return scale.gather(0, best)[0], least.gather(0, best)[0]

    def neighbours(
        self, m: Moments, d: Tensor, dmin: Tensor, scale: Tensor, shifts: Sequence[int]
    ) -> tuple[Tensor, Tensor, Moments]:
        """The best of each scale and its neighbours, with the weights rounded again for each."""
        wide_d, wide_m = self.wide(d), self.wide(dmin)
        best, least, gain, kept = scale, scale, torch.full_like(scale, -torch.inf), m
        for i, shift in enumerate(shifts):
            tried = (scale + shift).clamp_(0, self.limit)
            s = wide_d * tried
            low = self.least_for(m, s, wide_m)
            fresh = self.runs.moments(self.runs.levels(s, self._beta(wide_m, low), self.nearest))
            low = self.least_for(fresh, s, wide_m)
            found = lowering(self.runs, fresh, s, self._beta(wide_m, low))
            if i == 0:
                best, least, gain, kept = tried, low, found, fresh
            else:
                better = (found > gain).to(found.dtype)
                best, least = best.lerp(tried, better), least.lerp(low, better)
                gain = torch.maximum(gain, found)
                kept.take(fresh, better)
        return best, least, kept

    def run(
        self, s: Tensor, beta: Tensor, divisors: Sequence[float], shifts: Sequence[int], rounds: int
    ) -> Affine:
        """The finished super-blocks, starting from scales and offsets that fit the runs."""
        m = self.runs.moments(self.runs.levels(s, beta, self.nearest))
        scale, least = self.start(m, s, beta, divisors)
        d, dmin = self.refit(m, scale, least)
        for _ in range(rounds):
            scale, least, m = self.neighbours(m, d, dmin, scale, shifts)
            d, dmin = self.refit(m, scale, least)
        s, beta = self.wide(d) * scale, self._beta(self.wide(dmin), least)
        codes = self.runs.levels(s, beta, self.nearest)
        shape = (-1, self.n)
        return Affine(d * self.power, dmin * self.power, scale.view(shape), least.view(shape), codes)
