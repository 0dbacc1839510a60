"""Searches the best scale, or scale and minimum, for a run of weights; most formats use it.

Runs are columns: row i of a [length, runs] tensor has weight i of all runs of a slab. Operations then access
memory contiguously, the scales of the runs broadcast without strides, and sums over a run vectorise.

For given codes q, the best s and b of x ~ s * q + b solve a two by two system of weighted sums; for given s
and b, the best codes are the nearest ones. The search tries several starting points, solves the system for
each, keeps the best and alternates the two steps from there (Lloyd 1982). The error follows from the same
sums, without residuals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-9
"""Least importance of a weight, relative to the largest of its block, so that no sum of weights is 0."""
PAD = 64
"""The number of blocks is padded to a multiple of this. Torch sums columns in another order if they do not
fill its vectors, and the bytes of a block must not depend on the other blocks."""
TINY = 1e-30
MARGIN = 1 + 2e-7
"""Factor by which a later scale must be better; it exceeds the rounding of sums. The first of several exact
scales is kept, so that equal runs get equal scales."""

Nearest = Callable[[Tensor], Tensor]
"""Moves each number of a tensor to the nearest level, in place."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Weighted sums of q, q^2 and q * y over each run, [runs], for levels q and weights y."""

    q: Tensor
    qq: Tensor
    qy: Tensor

    def take(self, other: Moments, mask: Tensor) -> None:
        """Copy the values of `other` where the mask is 1.0."""
        for mine, theirs in ((self.q, other.q), (self.qq, other.qq), (self.qy, other.qy)):
            mine.lerp_(theirs, mask)


def nearest_integer(low: int, high: int) -> Nearest:
    """A function that moves numbers to the nearest of the integers low..high, in place."""

    def move(values: Tensor) -> Tensor:
        return values.round_().clamp_(low, high)

    return move


def reciprocal(s: Tensor) -> Tensor:
    """1 / s, and 0 where s is 0 or so small that 1 / s is not finite."""
    return s.reciprocal().nan_to_num_(0.0, 0.0, 0.0)


class Runs:
    """Runs of weights as columns, their importance, and scratch for the search.

    Args:
        x: float32 [length, runs].
        w: Importance with the shape of x, float32 and positive; None for ones.
        centred: Subtract the weighted mean of each run first, for formats with a minimum. Sums then do not
            cancel when a run is far from zero.
    """

    def __init__(self, x: Tensor, w: Tensor | None, *, centred: bool = False) -> None:
        self.x, self.w = x, w
        self.weight = torch.full_like(x[0], len(x)) if w is None else w.sum(0)
        self._codes, self._one, self._two = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        self.centre: Tensor | None = None
        self.y = x
        if centred:
            self.centre = self._sum(x) / self.weight
            self.y = x - self.centre
            self.total = self._sum(self.y)  # the rest that rounding leaves

    def _sum(self, values: Tensor) -> Tensor:
        return (values if self.w is None else torch.mul(values, self.w, out=self._one)).sum(0)

    def levels(self, s: Tensor, beta: Tensor | None, nearest: Nearest) -> Tensor:
        """Nearest levels [length, runs] of (y - beta) / s, s and beta [runs]; valid until the next call."""
        inverse = reciprocal(s)
        if beta is None:
            torch.mul(self.y, inverse, out=self._codes)
        else:
            torch.addcmul(-beta * inverse, self.y, inverse, out=self._codes)
        return nearest(self._codes)

    def moments(self, q: Tensor) -> Moments:
        """Moments of levels q [length, runs]."""
        if self.w is None:
            weighted, sq = q, q.sum(0)
        else:
            weighted = torch.mul(q, self.w, out=self._one)
            sq = weighted.sum(0)
        sqq = torch.mul(weighted, q, out=self._two).sum(0)
        return Moments(sq, sqq, torch.mul(weighted, self.y, out=self._two).sum(0))


def centre_of(runs: Runs) -> Tensor:
    """The means [runs] that were subtracted from the runs, or zeros."""
    return torch.zeros_like(runs.weight) if runs.centre is None else runs.centre


class SuperBlocks:
    """Runs that are the sub-blocks of n super-blocks: run j of super-block i is column j * n + i.

    Args:
        runs: Runs in the order of `columns`.
        power: Unit of the weights of each super-block [n].
        nearest: Moves numbers to the levels of a weight.
    """

    def __init__(self, runs: Runs, power: Tensor, nearest: Nearest) -> None:
        self.runs, self.power, self.nearest = runs, power, nearest
        self.n = len(power)

    def wide(self, values: Tensor) -> Tensor:
        """Repeat a number of each super-block for each of its runs: [..., n] -> [..., subs * n]."""
        return values.repeat(*[1] * (values.ndim - 1), self.runs.weight.numel() // self.n)

    def total(self, values: Tensor) -> Tensor:
        """Sum over the runs of each super-block: [..., subs * n] -> [..., n]."""
        return values.view(*values.shape[:-1], -1, self.n).sum(-2)


def quadratic_gain(m: Moments, s: Tensor) -> Tensor:
    """Decrease of the error by y ~ s * q, for any s."""
    return s * (2 * m.qy - s * m.qq)


def symmetric_gain(m: Moments) -> tuple[Tensor, Tensor]:
    """The best s of y ~ s * q, and the decrease of the error by it: [runs] each."""
    s = m.qy / m.qq.clamp(min=TINY)
    return s, s * m.qy


def peaks(x: Tensor) -> Tensor:
    """The number of largest magnitude in each column, with its sign: [runs]."""
    high, low = x.amax(0), x.amin(0)
    return torch.where(high + low > 0, high, low)


def starting_scales(runs: Runs, levels: Sequence[float]) -> list[Tensor]:
    """Scales [runs] for which the weight of largest magnitude is exactly one of `levels`.

    With importance there are two more, for which the weight that is costliest to lose is the first level or
    half of it. If this weight is small, the other scales are far from the best one.
    """
    peak = peaks(runs.x)
    starts = [peak / level for level in levels]
    if runs.w is not None:
        loss = runs.x.square().mul_(runs.w)
        chosen = torch.ge(loss, loss.amax(0), out=torch.empty_like(loss))
        dear = peaks(chosen.mul_(runs.x))
        starts += [dear / levels[0], dear / (levels[0] / 2)]
    return starts


def fit_symmetric(runs: Runs, starts: Sequence[Tensor], nearest: Nearest, rounds: int = 2) -> Tensor:
    """The best scale [runs] of each run, found from several starting scales and improved `rounds` times."""
    best, gain = torch.zeros_like(runs.weight), torch.full_like(runs.weight, -TINY)

    def consider(start: Tensor) -> None:
        s, found = symmetric_gain(runs.moments(runs.levels(start, None, nearest)))
        better = (found > gain * MARGIN).to(gain.dtype)
        best.lerp_(s, better)
        torch.maximum(gain, found, out=gain)

    for start in starts:
        consider(start)
    for _ in range(rounds):
        consider(best)
    return best


def solve_affine(runs: Runs, m: Moments, *, floor_at_zero: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The best s and beta of y ~ s * q + beta, and the decrease of the error by them: [runs] each.

    With floor_at_zero, the offset beta + centre is at most 0.
    """
    centre = centre_of(runs)
    mean = m.q / runs.weight
    spread = m.qq - m.q * mean
    slope = m.qy - runs.total * mean
    s = slope / spread.clamp(min=TINY)
    s *= spread > 1e-6 * m.qq
    beta = runs.total / runs.weight - s * mean
    gain = s * slope
    if floor_at_zero:
        above = ((beta + centre) > 0).to(s.dtype)
        through = (m.qy + centre * m.q) / m.qq.clamp(min=TINY)  # slope of the line through 0
        s = s.lerp(through, above)
        beta = beta.lerp(-centre, above)
        gain = gain.lerp(lowering(runs, m, s, beta), above)
    return s, beta, gain


def lowering(runs: Runs, m: Moments, s: Tensor, beta: Tensor) -> Tensor:
    """Decrease of the error by y ~ s * q + beta, for any s and beta."""
    return 2 * (s * m.qy + beta * runs.total) - s * s * m.qq - beta * (2 * s * m.q + beta * runs.weight)


def fit_affine(
    runs: Runs, top: int, cuts: Sequence[tuple[float, float]], *, floor_at_zero: bool, rounds: int = 2
) -> tuple[Tensor, Tensor]:
    """The best scale and offset [runs] of y ~ s * q + beta, q in 0..top.

    Args:
        runs: Centred runs.
        top: The largest code.
        cuts: Starting points: numbers of steps by which the full range is shortened at its two ends.
        floor_at_zero: Keep the offset beta + centre at 0 or below.
        rounds: Number of times that the best result is improved.
    """
    low, high = runs.y.amin(0), runs.y.amax(0)
    if floor_at_zero:
        low = torch.minimum(low, -centre_of(runs))
        high = torch.maximum(high, low)
    step = (high - low) / top
    nearest = nearest_integer(0, top)
    best, offset = torch.zeros_like(step), low.clone()
    gain = torch.full_like(step, -torch.inf)

    def consider(s: Tensor, beta: Tensor) -> None:
        m = runs.moments(runs.levels(s, beta, nearest))
        s, beta, found = solve_affine(runs, m, floor_at_zero=floor_at_zero)
        better = (found > gain * MARGIN).to(gain.dtype)
        best.lerp_(s, better)
        offset.lerp_(beta, better)
        torch.maximum(gain, found, out=gain)

    for below, above in cuts:
        consider(step * (1 - (below + above) / top), low + below * step)
    for _ in range(rounds):
        consider(best.clone(), offset.clone())
    return best, offset


def exponents(x: Tensor) -> tuple[Tensor, Tensor]:
    """Powers of two p and 1 / p [n] for x [n, m]: the largest magnitude of x / p is in [1, 2), or 0."""
    _, exponent = torch.frexp(x.abs().amax(1))
    bits = (exponent - 1).clamp_(-126, 126)
    return ((bits + 127) << 23).view(torch.float32), ((127 - bits) << 23).view(torch.float32)


def columns(blocks: Tensor, length: int) -> Tensor:
    """Blocks [n, m * length] -> runs as columns [length, m * n]; run j of block i is column j * n + i."""
    n = len(blocks)
    return blocks.view(n, -1, length).permute(2, 1, 0).contiguous().view(length, -1)


def blocks_of(runs: Tensor, n: int) -> Tensor:
    """The inverse of `columns`: [length, m * n] -> [n, m * length]."""
    return runs.view(len(runs), -1, n).permute(2, 1, 0).reshape(n, -1)


def block_costs(x: Tensor, importance: Tensor | None, weights: int) -> Tensor | None:
    """Importance of each weight [blocks, weights], in units of a power of two near the largest of its block.

    Values are at least FLOOR, and a block of zeros becomes ones, so that no sum over a run is 0.
    """
    if importance is None:
        return None
    blocks = importance.reshape(-1, weights)
    _, inverse = exponents(blocks)
    blocks = blocks * inverse[:, None]
    blocks = (blocks + (blocks.amax(1, keepdim=True) == 0)).clamp_(min=FLOOR)
    return blocks.view(len(importance), -1).expand(len(x), -1).reshape(-1, weights)


def padded(blocks: Tensor) -> Tensor:
    """Blocks [n, m] followed by blocks of zeros up to a multiple of PAD."""
    return torch.nn.functional.pad(blocks, (0, 0, 0, -len(blocks) % PAD))


def unit_runs(
    x: Tensor, importance: Tensor | None, weights: int, length: int, *, centred: bool = False
) -> tuple[Runs, Tensor]:
    """The runs of padded blocks of `weights`, and the power of two [n] that is the unit of each block."""
    blocks = padded(x.view(-1, weights))
    power, inverse = exponents(blocks)
    costs = block_costs(x, importance, weights)
    w = None if costs is None else columns(padded(costs).clamp_(min=FLOOR), length)
    return Runs(columns(blocks * inverse[:, None], length), w, centred=centred), power
