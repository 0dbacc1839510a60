"""Searches super-blocks of the grid formats: codebook rows, and scales of sub-blocks and super-blocks.

w = d * unit * (1 + 2 * level[sub]) * row[group], where level is a small integer. The search has four steps.
  1. The moments of each sub-block give a guess of its scale. The best of nine scales around the guess is
     improved by least squares for its rows.
  2. d is chosen so that the possible levels are nearest to those scales, with errors weighted by their cost.
  3. Each sub-block gets the better of the two levels around its scale, after an exhaustive search for the
     rows of both.
  4. Rows are chosen, d is fitted by least squares, and signs and rows are chosen again for the stored d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zimage_core.quantize.blocks import as_half
from zimage_core.quantize.grid import DELTA, Groups, grid
from zimage_core.quantize.scale_search import TINY, block_costs, exponents, reciprocal

_RATIOS = (-0.4, 0.5)
"""Logarithms of the smallest and the largest scale that are tried, relative to the guess."""
_SPAN = (-0.5, 0.2)
"""Logarithms of the smallest and the largest d that are tried, relative to the d for which the largest scale
has the last level."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The parameters of a format.

    Args:
        book: Name of the codebook.
        run: Number of weights in a sub-block.
        levels: Number of levels: a scale is one of the odd numbers up to 2 * levels - 1.
        unit: Factor of d: the step of a sub-block is d * unit * (1 + 2 * level).
        signs: "free" (a bit for each), "even" (an even number of minuses in 8), "rows" (in the codebook).
        shared: Number of groups that use the same half of a shifted codebook.
        peak: Influence of the large weights on the guess of a scale; 0 uses the mean square alone.
    """

    book: str
    run: int
    levels: int
    unit: float
    signs: str
    shared: int = 1
    peak: float = 0.65


@dataclass(frozen=True, slots=True)
class Found:
    """n super-blocks as integers.

    Args:
        d: Scale of each super-block, float32 [n], a float16 number.
        level: Level of each sub-block, int64 [n, subs].
        index: Row of the codebook for each group, int64 [n, groups].
        half: 1 if DELTA is subtracted from the row, else 0, int64 [n, groups].
        minus: Whether a weight is negative, bool [n, 256]; all False if the codebook has the signs.
    """

    d: Tensor
    level: Tensor
    index: Tensor
    half: Tensor
    minus: Tensor


class _Search:
    """The search in one slab of n super-blocks.

    Args:
        plan: The parameters of the format.
        x: Weights in units of `power`, float32 [n, subs, run], within [-2, 2].
        w: Importance, like x; None for ones.
        power: Unit of the weights of each super-block [n].
    """

    def __init__(self, plan: Plan, x: Tensor, w: Tensor | None, power: Tensor) -> None:
        self.plan, self.w, self.power = plan, w, power
        self.rows_have_signs = plan.signs == "rows"
        self.negative = torch.zeros_like(x, dtype=torch.bool) if self.rows_have_signs else x < 0
        self.a, self.minus = x if self.rows_have_signs else x.abs(), self.negative
        self.energy = self._sum(x * x)
        self.groups = Groups(grid(plan.book, x.device, self.rows_have_signs), self.a, w, plan.shared)
        if plan.signs == "even":
            self._make_even(self.a if w is None else self.a * w)

    def _sum(self, values: Tensor) -> Tensor:
        """Weighted sum over each sub-block."""
        return (values if self.w is None else values * self.w).sum(-1)

    def _make_even(self, rises: Tensor) -> None:
        """Make the number of minuses in each 8 weights even by flipping the sign with the least `rises`."""
        odd = self.negative.view(-1, 8).sum(1, keepdim=True) % 2 == 1
        cheapest = rises.view(-1, 8).argmin(1, keepdim=True)
        wrong = torch.zeros_like(self.negative).view(-1, 8).scatter_(1, cheapest, odd).view(self.a.shape)
        self.minus = self.negative ^ wrong
        size = self.a.abs()
        self.a = torch.where(wrong, -size, size)
        self.groups.take(self.a)

    def settle_signs(self, step: Tensor) -> None:
        """Make the number of minuses in each 8 weights even by flipping the sign that costs least.

        Before this call the flipped weight is the one with the least w * |x|, a cost that ignores the row.
        """
        self.groups.take(self.a.abs())
        self._make_even(self.groups.rises(step))

    def guess(self) -> Tensor:
        """Guess scales [n, subs] from the mean square and, for heavy tails, the mean fourth power over it."""
        mass = self.plan.run if self.w is None else self.w.sum(-1)
        mean = self.energy / mass
        tail = self._sum(self.a.pow(4)) / self.energy.clamp(min=TINY)
        typical = self.groups.grid.values.square().mean().sqrt()
        p = self.plan.peak / 2
        return mean.pow(0.5 - p) * tail.pow(p) * math.exp(-0.28) / typical

    def tried(self) -> tuple[Tensor, Tensor]:
        """The best scale of each sub-block near the guess, and sum(w * row^2) of its rows: [n, subs] each."""
        rough, guess = self.rows_have_signs, self.guess()
        best, gain = guess, torch.zeros_like(guess)
        for ratio in torch.linspace(*_RATIOS, 9, device=guess.device).exp():
            step = guess * ratio
            found = -(self.rough(step)[1] if rough else self.groups.cost(step))
            best = torch.where(found > gain, step, best)
            gain = torch.maximum(found, gain)
        rows = self.rough(best)[0] if rough else self.groups.decoded(*self.groups.nearest(best))
        mass = self._sum(rows * rows)
        fitted = self._sum(rows * self.a) / mass.clamp(min=TINY)
        return torch.where(fitted > 0, fitted, best), mass

    def rough(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and errors as if the codebook had all rows of -1, 0 and 1: shaped like a and `Groups.cost`.

        The exact search among 4096 rows takes thirty times as long, and its best scales are almost the same.
        """
        relative = self.a * reciprocal(step)[..., None]
        shifts = torch.tensor((DELTA, -DELTA), device=step.device).view(2, 1, 1, 1)
        rows = (relative - shifts).round_().clamp_(-1, 1).add_(shifts)
        error = (rows - relative).square_()
        if self.w is not None:
            error *= self.w
        together = self.plan.shared * self.groups.grid.width
        error = error.view(2, *step.shape, -1, together).sum(-1)
        second = (error[1] < error[0]).repeat_interleave(together, -1)
        return torch.where(second, rows[1], rows[0]), error.amin(0).sum(-1) * step.square() - self.energy

    def start(self, best: Tensor, mass: Tensor) -> Tensor:
        """The d [n, 1] for which the possible levels are nearest to the best scales.

        For fixed rows, an error e of a step costs mass * e^2. The best d for a set of levels is therefore a
        least squares fit, and the set with the least remaining error is used.
        """
        over_last = best.amax(1, keepdim=True) / (2 * self.plan.levels - 1)
        tried = over_last * torch.linspace(*_SPAN, 24, device=best.device).exp()
        wanted, weight = best[:, None], mass[:, None]
        odd = 2 * self.level(wanted, tried[:, :, None]).round_().clamp_(0, self.plan.levels - 1) + 1
        pull, curve = (odd * wanted * weight).sum(-1), (odd * odd * weight).sum(-1)
        fitted = pull / curve.clamp(min=TINY)
        return self.stored(fitted.gather(1, (fitted * pull).argmax(1, keepdim=True)))

    @staticmethod
    def level(step: Tensor, d: Tensor) -> Tensor:
        """The level for a step, before rounding to an integer."""
        return (step * reciprocal(d) - 1) / 2

    def stored(self, d: Tensor) -> Tensor:
        """d [n, 1], rounded to float16 as in the file."""
        return as_half(d[:, 0] / self.plan.unit, self.power)[:, None] * self.plan.unit

    def levels(self, best: Tensor, d: Tensor) -> Tensor:
        """The better of the two levels around each scale [n, subs]."""
        last = self.plan.levels - 1
        low = self.level(best, d).floor_().clamp_(0, last)
        high = (low + 1).clamp_(max=last)
        under_low, under_high = (self.groups.cost(d * (2 * level + 1)) for level in (low, high))
        return torch.where(under_high < under_low, high, low)

    def refit(self, level: Tensor, index: Tensor, half: Tensor) -> Tensor:
        """d [n, 1] by least squares for fixed rows and levels."""
        odd = 2 * level + 1
        rows = self.groups.decoded(index, half)
        up = (self._sum(rows * self.a) * odd).sum(1, keepdim=True)
        return self.stored(up / (self._sum(rows * rows) * odd * odd).sum(1, keepdim=True).clamp(min=TINY))

    def run(self) -> Found:
        """The finished super-blocks."""
        best, mass = self.tried()
        d = self.start(best, mass)
        level = self.levels(best, d)
        d = self.refit(level, *self.groups.nearest(d * (2 * level + 1)))
        step = d * (2 * level + 1)
        if self.plan.signs == "even":
            self.settle_signs(step)
        index, half = self.groups.nearest(step)
        return Found(d[:, 0] / self.plan.unit * self.power, level.long(), index, half, self.minus.flatten(1))


def search(plan: Plan, x: Tensor, importance: Tensor | None) -> Found:
    """Search the super-blocks of weights x [rows, K] with importance [rows, K], [1, K] or None."""
    blocks = x.view(-1, 256)
    power, inverse = exponents(blocks)
    costs = block_costs(x, importance, 256)
    shape = (len(blocks), 256 // plan.run, plan.run)
    w = None if costs is None else costs.view(shape)
    return _Search(plan, (blocks * inverse[:, None]).view(shape), w, power).run()
