"""Super-blocks of the grid formats: codewords, scales of sub-blocks and the scale over them.

w = d * unit * (1 + 2 * level[sub]) * row[group], level a small integer. The search goes
  1. from moments of each sub-block to a guess of its scale, and from nine scales around it to the best,
     made better by least squares for its rows;
  2. to the d under which the levels come nearest to those scales, errors counted by what they cost;
  3. to the better of the two levels about each scale, by exhaustive search for the rows under both;
  4. to the rows, to d by least squares, and to the rows again under the d that is stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zimage_core.quantize.blocks import as_half
from zimage_core.quantize.grid import DELTA, Groups, grid
from zimage_core.quantize.rounding import TINY, cost_columns, exponents, reciprocal

_RATIOS = (-0.4, 0.5)
"""Logarithms of the least and the largest scale tried, over the guess; 9 in 10 optima lie in (-0.2, 0.25)."""
_SPAN = (-0.5, 0.2)
"""Logarithms of the least and the largest d tried; 0 is the d that gives the largest scale the last level."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the search must know of a format.

    Args:
        book: Name of the codebook.
        run: Weights of a sub-block.
        levels: A scale is one of the odd numbers up to 2 * levels - 1.
        unit: What d of the file stands for: a sub-block's step is d * unit * (1 + 2 * level).
        signs: "free" (a bit each), "even" (an even number of minuses in 8), "rows" (in the codebook).
        shared: Groups that share the half of a shifted codebook.
        starts: Values of d that are searched.
        peak: How much the guess of a scale leans to the large weights: 0 for their mean square alone.
    """

    book: str
    run: int
    levels: int
    unit: float
    signs: str
    shared: int = 1
    starts: int = 3
    peak: float = 0.65


@dataclass(frozen=True, slots=True)
class Found:
    """Super-blocks [n] as integers.

    Args:
        d: float32 [n], a float16 number.
        level: int64 [n, subs].
        index: int64 [n, groups], rows of the codebook.
        half: int64 [n, groups], 1 where the row is less DELTA.
        minus: bool [n, 256]; all False where the codebook has the signs.
    """

    d: Tensor
    level: Tensor
    index: Tensor
    half: Tensor
    minus: Tensor


class _Search:
    """One slab: sub-blocks a [n, subs, run], importance w like a or None, power [n] the unit of a."""

    def __init__(self, plan: Plan, a: Tensor, w: Tensor | None, power: Tensor) -> None:
        self.plan, self.a, self.w, self.power = plan, a, w, power
        book = grid(plan.book, a.device, plan.signs == "rows")
        self.groups = Groups(book, a, w, plan.shared)
        self.typical = float(book.values.square().mean().sqrt())
        self.energy = self._sum(a * a)

    def _sum(self, values: Tensor) -> Tensor:
        """Weighted sum over each sub-block."""
        return (values if self.w is None else values * self.w).sum(-1)

    def guess(self) -> Tensor:
        """Scales [n, subs] from the mean square and, for the tails, the mean square of the energy."""
        mass = self.plan.run if self.w is None else self.w.sum(-1)
        mean = self.energy / mass
        tail = self._sum(self.a.pow(4)) / self.energy.clamp(min=TINY)
        p = self.plan.peak / 2
        return mean.pow(0.5 - p) * tail.pow(p) * (math.exp(-0.28) / self.typical)

    def tried(self) -> tuple[Tensor, Tensor]:
        """The best scale of each sub-block [n, subs] near the guess, and by how much it lowers the error."""
        rough = self.plan.signs == "rows"
        guess = self.guess()
        best, cost = guess, torch.zeros_like(guess)
        for ratio in torch.linspace(*_RATIOS, 9, device=guess.device).exp():
            step = guess * ratio
            found = self.rough(step)[1] if rough else self.groups.cost(step)
            best = torch.where(found < cost, step, best)
            cost = torch.minimum(found, cost)
        rows = self.rough(best)[0] if rough else self.groups.decoded(*self.groups.nearest(best))
        up = self._sum(rows * self.a)
        fitted = up / self._sum(rows * rows).clamp(min=TINY)
        better = (up > 0) & (fitted * up > -cost)
        return torch.where(better, fitted, best), torch.where(better, fitted * up, -cost)

    def rough(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """As if every row of -1, 0 and 1 were in the codebook: rows like a, and the error of `Groups.cost`.

        The exact search among 4096 rows takes twenty times as long, and its best scales are much the same.
        """
        relative = self.a * reciprocal(step)[..., None]
        shifts = torch.tensor((DELTA, -DELTA), device=step.device).view(2, 1, 1, 1)
        rows = (relative - shifts).round_().clamp_(-1, 1).add_(shifts)
        error = (rows - relative).square_()
        if self.w is not None:
            error *= self.w
        together = error.view(2, *step.shape, -1, self.plan.shared * self.groups.grid.width).sum(-1)
        second = (together[1] < together[0]).repeat_interleave(self.plan.shared * self.groups.grid.width, -1)
        return torch.where(second, rows[1], rows[0]), together.amin(0).sum(-1) * step.square() - self.energy

    def starts(self, best: Tensor, gain: Tensor) -> list[Tensor]:
        """Some d [n, 1] under which levels come near to the best scales, the nearest of each range.

        With rows fixed a scale that is off by the factor r costs gain * (r - 1)^2.
        """
        spans = torch.linspace(*_SPAN, 12 * self.plan.starts, device=best.device).exp()
        tried = best.amax(1, keepdim=True) / (2 * self.plan.levels - 1) * spans
        wide = tried[:, :, None]
        odd = 2 * self.level(best[:, None], wide).round_().clamp_(0, self.plan.levels - 1) + 1
        off = wide * odd * reciprocal(best)[:, None] - 1
        cost = (off.square_() * gain[:, None]).sum(-1)
        ranges = zip(torch.split(tried, 12, 1), torch.split(cost, 12, 1), strict=True)
        return [self.stored(d.gather(1, c.argmin(1, keepdim=True))) for d, c in ranges]

    @staticmethod
    def level(step: Tensor, d: Tensor) -> Tensor:
        """The level, not yet an integer, that gives a step."""
        return (step * reciprocal(d) - 1) / 2

    def stored(self, d: Tensor) -> Tensor:
        """d [n, 1] as the file will hold it."""
        return as_half(d[:, 0] / self.plan.unit, self.power)[:, None] * self.plan.unit

    def levels(self, best: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """The better of the two levels about each scale [n, subs], and the error of the whole [n, 1]."""
        last = self.plan.levels - 1
        low = self.level(best, d).floor_().clamp_(0, last)
        high = (low + 1).clamp_(max=last)
        under_low, under_high = (self.groups.cost(d * (2 * level + 1)) for level in (low, high))
        level = torch.where(under_high < under_low, high, low)
        return level, torch.minimum(under_low, under_high).sum(1, keepdim=True)

    def refit(self, level: Tensor, index: Tensor, half: Tensor) -> Tensor:
        """Least squares for d [n, 1], rows and levels fixed."""
        odd = 2 * level + 1
        rows = self.groups.decoded(index, half)
        up = (self._sum(rows * self.a) * odd).sum(1, keepdim=True)
        return up / (self._sum(rows * rows) * odd * odd).sum(1, keepdim=True).clamp(min=TINY)

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """d [n], level [n, subs], index and half [n, groups]."""
        best, gain = self.tried()
        d, *others = self.starts(best, gain)
        level, cost = self.levels(best, d)
        for other in others:
            tried, found = self.levels(best, other)
            better = found < cost
            d, level = torch.where(better, other, d), torch.where(better, tried, level)
            cost = torch.minimum(found, cost)
        index, half = self.groups.nearest(d * (2 * level + 1))
        d = self.stored(self.refit(level, index, half))
        index, half = self.groups.nearest(d * (2 * level + 1))
        return d[:, 0] / self.plan.unit * self.power, level.long(), index, half


def even_signs(x: Tensor, w: Tensor | None) -> Tensor:
    """Which of x [n, 256] become minus so that each 8 have an even number: bool, off where it costs least.

    The wrong sign costs 4 * step * w * |x| * v, v being chosen after; the least w * |x| stands for it.
    """
    eights = x.view(-1, 8)
    minus = eights < 0
    pull = eights.abs() if w is None else eights.abs() * w.view(-1, 8)
    odd = minus.sum(1, keepdim=True) % 2 == 1
    cheapest = torch.zeros_like(minus).scatter_(1, pull.argmin(1, keepdim=True), odd)
    return (minus ^ cheapest).view(x.shape)


def search(plan: Plan, x: Tensor, importance: Tensor | None) -> Found:
    """Super-blocks of weights x [rows, K] with importance [rows, K], [1, K] or None."""
    blocks = x.view(-1, 256)
    power, inverse = exponents(blocks)
    costs = cost_columns(x, importance, 256, 256)
    w = None if costs is None else costs.t().contiguous()
    a = blocks * inverse[:, None]
    minus = even_signs(a, w) if plan.signs == "even" else (a < 0) & (plan.signs == "free")
    a = torch.where(minus, -a, a)
    shape = (len(a), 256 // plan.run, plan.run)
    found = _Search(plan, a.view(shape), None if w is None else w.view(shape), power).run()
    return Found(*found, minus)
