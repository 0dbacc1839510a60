"""The nearest row of a codebook under weights, for all groups of a slab at once.

A group of 4 or 8 neighbouring weights a under the scale s is stored as the row v of a table that makes

    sum(w * (a - s * v)^2) = sum(w * a^2) + s * (sum(v * -2 * w * a) + sum(v^2 * s * w))

least. The bracket is a product of 2 * width numbers of the group with 2 * width numbers of the row, so
the scores of all rows for many groups are one matrix product, and the search is exhaustive: no list of
neighbours, nothing missed. Without importance the second half is one number, s * sum(v^2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from zimage_core.codebooks import codebook

SCORES = 1 << 20
"""Scores held at once on a CPU: four megabytes, which its cache takes."""
GPU_SCORES = 1 << 26
_LANES = 32

DELTA = 0.125
"""What IQ1_S and IQ1_M add to or take from each number of a row."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A codebook ready to be searched.

    Args:
        values: float32 [halves, rows, width]; two halves where a bit shifts the whole row by DELTA.
        matrix: float32 [2 * width, halves * rows]: values and their squares.
        plain: float32 [width + 1, halves * rows]: values and the sum of their squares.
    """

    values: Tensor
    matrix: Tensor
    plain: Tensor

    @property
    def width(self) -> int:
        """Weights that one row stands for."""
        return self.values.shape[-1]


@cache
def grid(name: str, device: torch.device, shifted: bool = False) -> Grid:
    """The codebook of that name on a device; `shifted` gives the two halves row + DELTA and row - DELTA."""
    book = codebook(name)
    with torch.inference_mode(False):  # it outlives the caller's mode
        rows = torch.frombuffer(bytearray(book.values), dtype=torch.int8).view(book.shape).float()
        values = torch.stack((rows + DELTA, rows - DELTA)) if shifted else rows[None]
        values = values.to(device)
        columns = values.flatten(0, 1).t()
        squares = columns * columns
        matrix = torch.cat((columns, squares))
        plain = torch.cat((columns, squares.sum(0, keepdim=True)))
        return Grid(values, matrix.contiguous(), plain.contiguous())


class Groups:
    """Groups of weights and their importance, to be scored under one scale after the other.

    Args:
        grid: The rows to choose from.
        a: float32 [n, subs, run]: weights, or their magnitudes where signs are stored apart.
        w: Importance like a, or None for ones.
        shared: Groups that take the same half of the grid: 1, or all of a sub-block.
    """

    def __init__(self, grid: Grid, a: Tensor, w: Tensor | None, shared: int = 1) -> None:
        self.grid, self.shared, self.shape = grid, shared, a.shape
        width = grid.width
        self._w = None if w is None else w.reshape(-1, width)
        self._table = grid.plain if w is None else grid.matrix
        self._count = a.numel() // width
        budget = SCORES if a.device.type == "cpu" else GPU_SCORES
        self._chunk = max(budget // self._table.shape[1], _LANES)
        # Whole chunks: the matrix product then has one shape, whatever the number of rows, and rounds alike
        padded = -(-self._count // self._chunk) * self._chunk
        self._features = a.new_zeros(padded, len(self._table))
        self._scores = a.new_empty(self._chunk, self._table.shape[1])
        self.take(a)

    def take(self, a: Tensor) -> None:
        """Search for other weights from now on, of the same shape and importance."""
        pull = a.reshape(-1, self.grid.width) * -2
        self._features[: self._count, : self.grid.width] = pull if self._w is None else pull * self._w

    def _under(self, step: Tensor) -> None:
        """Set the scales [n, subs]."""
        width = self.grid.width
        column = step.reshape(-1, 1).expand(-1, self.shape[2] // width).reshape(-1, 1)
        self._features[: self._count, width:] = column if self._w is None else column * self._w

    def _lanes(self, chunk: Tensor) -> Tensor:
        """Features [m, 2 * width] -> scores [m, halves, rows / 32, 32], valid until the next call."""
        halves, rows, _ = self.grid.values.shape
        return torch.mm(chunk, self._table, out=self._scores).view(-1, halves, rows // _LANES, _LANES)

    def _together(self, least: Tensor) -> Tensor:
        """Least scores [m, halves], summed over groups that share a half: [m / shared, halves]."""
        return least.view(-1, self.shared, least.shape[1]).sum(1)

    def _least(self) -> Tensor:
        """The least score of each group in each half [groups, halves]."""
        chunks = torch.split(self._features, self._chunk)
        return torch.cat([self._lanes(chunk).flatten(2).amin(-1) for chunk in chunks])[: self._count]

    def cost(self, step: Tensor) -> Tensor:
        """The least error of each sub-block under its scale, less sum(w * a^2): [n, subs] -> [n, subs]."""
        self._under(step)
        return self._together(self._least()).amin(-1).view(*step.shape, -1).sum(-1) * step

    def rises(self, step: Tensor) -> Tensor:
        """By how much the error over the scale rises when one weight has the other sign, like a.

        Each time the best row is another one, so this takes as many searches as a group has weights.
        """
        self._under(step)
        right = self._least()
        rises = []
        for column in self._features[:, : self.grid.width].unbind(1):
            column.neg_()
            rises.append(self._least() - right)
            column.neg_()
        return torch.cat(rises, 1).view(self.shape)

    def nearest(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """The best row of each group: index and half, int64 [n, groups], under scales [n, subs]."""
        self._under(step)
        found = [self._choose(self._lanes(chunk)) for chunk in torch.split(self._features, self._chunk)]
        index, half = (torch.cat(parts)[: self._count] for parts in zip(*found, strict=True))
        return index.view(len(step), -1), half.view(len(step), -1)

    def _choose(self, lanes: Tensor) -> tuple[Tensor, Tensor]:
        """Index and half [m] of the least scores.

        Two steps in place of one argmin, in a quarter of the time: the least of each lane vectorises.
        """
        least = lanes.amin(2)
        half = self._together(least.amin(-1)).argmin(-1).repeat_interleave(self.shared)
        here = torch.arange(len(lanes), device=lanes.device)
        lane = least[here, half].argmin(1)
        return lanes[here, half, :, lane].argmin(1) * _LANES + lane, half

    def decoded(self, index: Tensor, half: Tensor) -> Tensor:
        """Rows chosen [n, groups] -> their numbers [n, subs, run]."""
        return self.grid.values[half, index].view(self.shape)
