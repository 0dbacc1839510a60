"""Finds the codebook row with the least weighted error, for all groups of a slab at once.

A group of 4 or 8 neighbouring weights a with the scale s is stored as the row v of a table that minimises

    sum(w * (a - s * v)^2) = sum(w * a^2) + s * (sum(v * -2 * w * a) + sum(v^2 * s * w)).

The bracket is a scalar product of 2 * width numbers of the group with 2 * width numbers of the row, so one
matrix product gives the scores of all rows for many groups, and no row is missed. Without importance the
second half of the bracket is one number, s * sum(v^2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from zimage_core.codebooks import codebook

SCORES = 1 << 20
"""Number of scores in memory at once on a CPU: four megabytes, which fit its cache."""
GPU_SCORES = 1 << 26
"""Number of scores in memory at once on a GPU."""
_LANES = 32

DELTA = 0.125
"""Offset that IQ1_S and IQ1_M add to, or subtract from, each number of a row."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A codebook as tables for the search.

    Args:
        values: float32 [halves, rows, width]; there are two halves if a bit shifts the whole row by DELTA.
        matrix: float32 [2 * width, halves * rows], the values and their squares.
        plain: float32 [width + 1, halves * rows], the values and the sums of their squares.
    """

    values: Tensor
    matrix: Tensor
    plain: Tensor

    @property
    def width(self) -> int:
        """Number of weights per row."""
        return self.values.shape[-1]


@cache
def grid(name: str, device: torch.device, shifted: bool = False) -> Grid:
    """The codebook of that name on a device; with `shifted` in two halves, row + DELTA and row - DELTA."""
    book = codebook(name)
    with torch.inference_mode(False):  # the tables are used after the caller's mode ends
        rows = torch.frombuffer(bytearray(book.values), dtype=torch.int8).view(book.shape).float()
        values = torch.stack((rows + DELTA, rows - DELTA)) if shifted else rows[None]
        values = values.to(device)
        columns = values.flatten(0, 1).t()
        squares = columns * columns
        matrix = torch.cat((columns, squares))
        plain = torch.cat((columns, squares.sum(0, keepdim=True)))
        return Grid(values, matrix.contiguous(), plain.contiguous())


class Groups:
    """Groups of weights with their importance, for scores with several scales.

    Args:
        grid: The rows to choose from.
        a: Weights, or their magnitudes if signs are stored separately, float32 [n, subs, run].
        w: Importance, with the shape of a; None for ones.
        shared: Number of neighbouring groups that use the same half of the grid: 1, or all of a sub-block.
    """

    def __init__(self, grid: Grid, a: Tensor, w: Tensor | None, shared: int = 1) -> None:
        self.grid, self.shared, self.shape = grid, shared, a.shape
        width = grid.width
        self._w = None if w is None else w.reshape(-1, width)
        self._table = grid.plain if w is None else grid.matrix
        self._count = a.numel() // width
        budget = SCORES if a.device.type == "cpu" else GPU_SCORES
        self._chunk = max(budget // self._table.shape[1], _LANES)
        # whole chunks, so that all matrix products have the same shape and round in the same way
        padded = -(-self._count // self._chunk) * self._chunk
        self._features = a.new_zeros(padded, len(self._table))
        self._scores = a.new_empty(self._chunk, self._table.shape[1])
        self.take(a)

    def take(self, a: Tensor) -> None:
        """Replace the weights by others with the same shape and importance."""
        pull = a.reshape(-1, self.grid.width) * -2
        self._features[: self._count, : self.grid.width] = pull if self._w is None else pull * self._w

    def _set_scales(self, step: Tensor) -> None:
        """Put the scales [n, subs] into the features of the groups."""
        width = self.grid.width
        column = step.reshape(-1, 1).expand(-1, self.shape[2] // width).reshape(-1, 1)
        self._features[: self._count, width:] = column if self._w is None else column * self._w

    def _lanes(self, chunk: Tensor) -> Tensor:
        """Scores [m, halves, rows / 32, 32] of features [m, 2 * width], valid until the next call."""
        halves, rows, _ = self.grid.values.shape
        return torch.mm(chunk, self._table, out=self._scores).view(-1, halves, rows // _LANES, _LANES)

    def _together(self, least: Tensor) -> Tensor:
        """Least scores [m, halves] summed over the groups that share a half: [m / shared, halves]."""
        return least.view(-1, self.shared, least.shape[1]).sum(1)

    def _least(self) -> Tensor:
        """The least score of each group in each half [groups, halves]."""
        chunks = torch.split(self._features, self._chunk)
        return torch.cat([self._lanes(chunk).flatten(2).amin(-1) for chunk in chunks])[: self._count]

    def cost(self, step: Tensor) -> Tensor:
        """Least error of each sub-block for its scale, minus sum(w * a^2): [n, subs] -> [n, subs]."""
        self._set_scales(step)
        return self._together(self._least()).amin(-1).view(*step.shape, -1).sum(-1) * step

    def rises(self, step: Tensor) -> Tensor:
        """Increase of error / scale if the sign of a single weight is flipped, for each weight, like a.

        Each weight has another best row, so this takes as many searches as a group has weights.
        """
        self._set_scales(step)
        right = self._least()
        rises = []
        for column in self._features[:, : self.grid.width].unbind(1):
            column.neg_()
            rises.append(self._least() - right)
            column.neg_()
        return torch.cat(rises, 1).view(self.shape)

    def nearest(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Index and half of the best row of each group for scales [n, subs]: int64 [n, groups] each."""
        self._set_scales(step)
        found = [self._choose(self._lanes(chunk)) for chunk in torch.split(self._features, self._chunk)]
        index, half = (torch.cat(parts)[: self._count] for parts in zip(*found, strict=True))
        return index.view(len(step), -1), half.view(len(step), -1)

    def _choose(self, lanes: Tensor) -> tuple[Tensor, Tensor]:
        """Index and half of the least scores, [m] each.

        One argmin would take four times as long as these two steps; the first of them vectorises over lanes.
        """
        least = lanes.amin(2)
        half = self._together(least.amin(-1)).argmin(-1).repeat_interleave(self.shared)
        here = torch.arange(len(lanes), device=lanes.device)
        lane = least[here, half].argmin(1)
        return lanes[here, half, :, lane].argmin(1) * _LANES + lane, half

    def decoded(self, index: Tensor, half: Tensor) -> Tensor:
        """The numbers of chosen rows: [n, groups] -> [n, subs, run]."""
        return self.grid.values[half, index].view(self.shape)
