"""Dequantises on a GPU where no Triton kernel runs, by plain torch.

The decoders are those of `zimage_core.cpu`, so the weights have the bits of the reference. There they work on
tiles that fit a core's cache; here each of their operations is a launch, so they work on slabs of
`dispatch.PLAIN_WEIGHTS`: 10 to 40 launches a slab. `dispatch.plain_bytes` is the memory that this takes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zimage_core.cpu.dequantize import decode
from zimage_core.cpu.workspace import Workspace
from zimage_core.formats import BlockFormat
from zimage_core.quant.dispatch import PLAIN_WEIGHTS


class _Allocator(Workspace):
    """Scratch from torch's allocator, which reuses it in the order of the stream."""

    def take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """An uninitialised contiguous tensor, freed when the decoder drops it."""
        return torch.empty(shape, dtype=dtype, device=self.device)


def slabs(rows: int, width: int, most: int) -> list[tuple[int, int]]:
    """First and last row of equal slabs of at most `most` weights; they start at multiples of 8 rows.

    Eight rows of any format are a multiple of 8 bytes, so that every slab is as aligned as the first one.
    """
    height = max(8, most // max(width, 1) // 8 * 8)
    height = -(-rows // max(1, -(-rows // height)) // 8) * 8 if rows > height else rows
    return [(start, min(start + height, rows)) for start in range(0, rows, max(height, 1))]


def dequantize(packed: Tensor, fmt: BlockFormat, dtype: torch.dtype) -> Tensor:
    """Packed rows of a block format to dense weights: computed in float32, rounded once.

    Args:
        packed: uint8 [..., row bytes], on any device.
        fmt: Format of the rows.
        dtype: Float type of the result.

    Returns:
        [..., K].
    """
    width = packed.shape[-1] // fmt.nbytes * fmt.weights
    flat = packed.reshape(math.prod(packed.shape[:-1]), packed.shape[-1])
    out = torch.empty(len(flat), width, dtype=dtype, device=packed.device)
    parts = slabs(len(flat), width, PLAIN_WEIGHTS) if out.numel() else []
    tallest = max((stop - start for start, stop in parts), default=0)
    wide = out if dtype == torch.float32 else torch.empty_like(out[:tallest], dtype=torch.float32)
    for start, stop in parts:
        part = out[start:stop] if wide is out else wide[: stop - start]
        blocks = flat[start:stop].reshape(-1, fmt.nbytes)
        decode(part.view(-1, fmt.weights), blocks, fmt, _Allocator(packed.device))
        if wide is not out:
            out[start:stop] = part
    return out.view(*packed.shape[:-1], width)
