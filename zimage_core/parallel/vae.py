"""Decoding of one image by several ranks: each computes a strip of rows of every map of the VAE's decoder.

A strip has one row of the neighbouring strips at its edges, which the 3x3 convolutions read and which the
ranks send each other after each of them. Every norm uses the mean and variance of the whole image. So the
image is that of the decoder in tiles, up to rounding, without seams; see `models.vae_tiles`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zimage_core.models.vae_tiles import Tile, layout
from zimage_core.parallel.group import Group
from zimage_core.parallel.ulysses import evenly

FEWEST = 32 * 32
"""Latents of an image below which each rank decodes it alone: the exchanges would take as long."""


def strips(group: Group, h: int, w: int, tile: int) -> Strip | None:
    """The strip of this rank for latents h x w in tiles; None where the image is too small to share."""
    return Strip(group, h, w, tile) if h * w >= FEWEST and h >= group.size > 1 else None


class Strip:
    """The rows that this rank decodes, and what the ranks exchange about them.

    Args:
        group: The ranks, from the top of the image to its bottom.
        h: Rows of latents, at least one for each rank.
        w: Columns of latents.
        tile: Side of a tile in latents.
    """

    def __init__(self, group: Group, h: int, w: int, tile: int) -> None:
        self.group = group
        self.rows = evenly(h, group.size)
        self.above, self.below = int(group.rank > 0), int(group.rank < group.size - 1)
        self._tiles = [layout(rows, w, tile) for rows in self.rows]

    @property
    def own(self) -> int:
        """Rows of latents of this strip."""
        return self.rows[self.group.rank]

    @property
    def tiles(self) -> list[Tile]:
        """The tiles of a map of this strip, which begins with the row above it, if there is one."""
        found = (t for t in self._tiles[self.group.rank])
        return [
            Tile(t.top + self.above, t.left, t.bottom + self.above, t.right, t.skip_rows, t.skip_columns)
            for t in found
        ]

    def part(self, coarse: Tensor) -> Tensor:
        """The rows of this strip and one of each neighbour: [B, C, h, w] -> [B, C, rows, w]."""
        first = sum(self.rows[: self.group.rank])
        part = coarse[..., first - self.above : first + self.own + self.below, :]
        return part.contiguous(memory_format=torch.channels_last)

    def _edges(self, data: Tensor) -> tuple[int, int]:
        """The first own row of a map of this strip, and the row after the last."""
        scale = data.shape[2] // (self.own + self.above + self.below)
        return scale * self.above, scale * (self.above + self.own)

    def fill(self, data: Tensor) -> None:
        """Write the neighbours' nearest rows beside the own rows of a map [1, C, rows, W]."""
        first, after = self._edges(data)
        rank, size = self.group.rank, self.group.size
        counts = [int(abs(other - rank) == 1) for other in range(size)]
        edges = [data[0, :, first]] * self.above + [data[0, :, after - 1]] * self.below
        sent = torch.stack(edges).to(self.group.device)
        got = self.group.exchange(sent, counts, counts)
        if self.above:
            data[0, :, first - 1] = got[0].to(data.device)
        if self.below:
            data[0, :, after] = got[-1].to(data.device)

    def statistics(self, found: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Those of the tiles of all ranks: [tiles, 2, groups] float64 and the positions in each, [tiles]."""
        own = torch.cat((torch.tensor(sizes, dtype=found.dtype)[:, None], found.flatten(1)), dim=1)
        whole = self.group.gather(own.to(self.group.device), [len(tiles) for tiles in self._tiles]).cpu()
        return whole[:, 1:].view(-1, *found.shape[1:]), whole[:, 0]

    def whole(self, out: Tensor) -> Tensor:
        """The image of all strips: [1, 3, rows of this map, W] -> [1, 3, H, W]."""
        first, after = self._edges(out)
        scale = (after - first) // self.own
        rows = out[0, :, first:after].transpose(0, 1).contiguous()
        found = self.group.gather(rows.to(self.group.device), [scale * rows for rows in self.rows])
        return found.transpose(0, 1)[None].to(out.device)
