"""`dequantize_into`: packed rows to float32 by torch, tile by tile.

A decoder works on one tile, with scratch memory that the next tile reuses. Results equal those of
`zimage_core.reference.dequantize` exactly (tests/cpu/test_dequantize.py); `benchmarks.run dequant --device
cpu` measures the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from zimage_core.cpu import i_quants, k_quants, legacy, numbers
from zimage_core.cpu.pool import in_parallel
from zimage_core.cpu.workspace import Workspace, workspace
from zimage_core.errors import BadShape
from zimage_core.formats import BlockFormat

Header = Callable[[Tensor, Workspace], tuple[Tensor, ...]]
"""(blocks uint8 [n, nbytes] contiguous and 8-byte aligned, scratch) -> tensors of n rows."""
Body = Callable[..., None]
"""(blocks [n, nbytes], out float32 [n, weights], scratch, *rows of the header) -> None."""

CHUNK = 1 << 21
"""Number of weights whose block headers are decoded at once. The header of Q4_K is 15 operations on a few
bytes of each block: 0.6 ns a weight for chunks of 2^17 weights, 0.13 for 2^20, 0.08 for 2^22 (AVX512)."""
SPREAD_FROM = 1 << 20
"""Number of weights from which on `dequantize_into` uses several threads."""
TILE = 1 << 19
"""Weights per tile. Smaller tiles would fit the second-level cache, but their calls cost more than that
saves: 10240 x 3840 weights take 52, 45, 39 and 38 ms as Q4_K with tiles of 2^17 to 2^20, and 96, 59, 46 and
39 ms as Q3_K."""

DECODERS: dict[str, tuple[Header, Body]] = {
    "Q4_0": (legacy.scale_header, legacy.q4_0_body),
    "Q4_1": (legacy.affine_header, legacy.q4_1_body),
    "Q5_0": (legacy.q5_0_header, legacy.q5_0_body),
    "Q5_1": (legacy.q5_1_header, legacy.q5_1_body),
    "Q8_0": (legacy.scale_header, legacy.q8_0_body),
    "Q2_K": (k_quants.q2_k_header, k_quants.q2_k_body),
    "Q3_K": (k_quants.q3_k_header, k_quants.q3_k_body),
    "Q4_K": (k_quants.affine_header, k_quants.q4_k_body),
    "Q5_K": (k_quants.affine_header, k_quants.q5_k_body),
    "Q6_K": (k_quants.q6_k_header, k_quants.q6_k_body),
    "IQ2_XXS": (i_quants.iq2_xxs_header, partial(i_quants.grid_body, "iq2_xxs")),
    "IQ2_XS": (i_quants.iq2_xs_header, partial(i_quants.grid_body, "iq2_xs")),
    "IQ3_XXS": (i_quants.iq3_xxs_header, partial(i_quants.grid_body, "iq3_xxs")),
    "IQ1_S": (i_quants.iq1_s_header, partial(i_quants.grid_body, "iq1")),
    "IQ4_NL": (legacy.scale_header, legacy.iq4_nl_body),
    "IQ3_S": (i_quants.iq3_s_header, partial(i_quants.grid_body, "iq3_s")),
    "IQ2_S": (i_quants.iq2_s_header, i_quants.iq2_s_body),
    "IQ4_XS": (i_quants.iq4_xs_header, i_quants.iq4_xs_body),
    "IQ1_M": (i_quants.iq1_m_header, partial(i_quants.grid_body, "iq1")),
    "TQ1_0": (partial(legacy.scale_header, offset=52), legacy.tq1_0_body),
    "TQ2_0": (partial(legacy.scale_header, offset=64), legacy.tq2_0_body),
    "MXFP4": (legacy.mxfp4_header, legacy.mxfp4_body),
    "NVFP4": (legacy.nvfp4_header, legacy.nvfp4_body),
    "Q1_0": (legacy.scale_header, legacy.q1_0_body),
    "Q2_0": (legacy.scale_header, legacy.q2_0_body),
    "Q2_0_128": (legacy.scale_header, legacy.q2_0_body),
    "F8_E4M3": (numbers.fp8_header, partial(numbers.fp8_body, "F8_E4M3")),
    "F8_E5M2": (numbers.fp8_header, partial(numbers.fp8_body, "F8_E5M2")),
}
"""Decoders of all block formats and fp8; torch copies plain numbers."""


def dequantize_into(out: Tensor, packed: Tensor, fmt: BlockFormat) -> None:
    """Dequantise rows into an existing tensor.

    Args:
        out: float32 [..., K], contiguous.
        packed: uint8 [..., row bytes], the same leading axes, same device, any alignment.
        fmt: Format of the rows.

    Raises:
        BadShape: out and packed do not describe the same rows.
    """
    check_rows(packed, fmt)
    wanted = (*packed.shape[:-1], packed.shape[-1] // fmt.nbytes * fmt.weights)
    if out.shape != wanted or out.dtype != torch.float32 or not out.is_contiguous():
        raise BadShape(
            f"{fmt.name}: the result must be contiguous float32 of shape {wanted}, "
            f"not {out.dtype} of shape {tuple(out.shape)}"
        )
    if not out.numel():
        return
    blocks, values = packed.reshape(-1, fmt.nbytes), out.view(-1, fmt.weights)
    if fmt.is_float or fmt.is_integer:
        # torch's own copy rounds to nearest even if float32 is the narrower type
        values.copy_(aligned(blocks, None).view(numbers.DTYPES[fmt.name]))
        return
    chunk = max(CHUNK // fmt.weights, 1)

    def decode(start: int, stop: int) -> None:
        for first in range(start, stop, chunk):
            last = min(first + chunk, stop)
            bodies = headers(blocks[first:last], fmt)
            _decode(values[first:last], fmt, bodies, 0)

    if out.device.type == "cpu" and out.numel() > SPREAD_FROM:
        in_parallel(decode, len(blocks))
    else:
        decode(0, len(blocks))


def slabs(packed: Tensor, fmt: BlockFormat, height: int) -> Iterator[tuple[int, Tensor]]:
    """Dequantise rows slab by slab into one buffer, in this thread: their headers for many slabs at once.

    Args:
        packed: uint8 [N, row bytes], at least one row.
        fmt: Format of the rows.
        height: Rows of a slab, a multiple of 8.

    Yields:
        First row of a slab, and float32 [up to `height`, K], valid until the next one.
    """
    check_rows(packed, fmt)
    rows, width = len(packed), packed.shape[-1] // fmt.nbytes * fmt.weights
    work = workspace("slab", packed.device)
    work.release()
    slab = work.take(torch.float32, min(height, rows), width)
    plain = fmt.is_float or fmt.is_integer
    chunk = height if plain else max(CHUNK // max(height * width, 1), 1) * height
    for first in range(0, rows, chunk):
        blocks = packed[first : first + chunk].reshape(-1, fmt.nbytes)
        bodies = () if plain else headers(blocks, fmt)
        for start in range(first, min(first + chunk, rows), height):
            dense = slab[: min(height, rows - start)]
            if plain:
                dequantize_into(dense, packed[start : start + height], fmt)
            else:
                place = (start - first) * (width // fmt.weights)
                _decode(dense.view(-1, fmt.weights), fmt, bodies, place)
            yield start, dense


def headers(blocks: Tensor, fmt: BlockFormat) -> tuple[Tensor, ...]:
    """Aligned blocks and the columns of their headers, in a workspace that the next call reuses."""
    work = workspace("header", blocks.device)
    work.release()
    raw = aligned(blocks, work)
    return (raw, *DECODERS[fmt.name][0](raw, work))


def _decode(values: Tensor, fmt: BlockFormat, chunk: tuple[Tensor, ...], start: int) -> None:
    """Blocks from `start` of a chunk to values [n, weights], tile by tile."""
    body, work, tile = DECODERS[fmt.name][1], workspace("tile", values.device), max(TILE // fmt.weights, 1)
    for first in range(0, len(values), tile):
        dense = values[first : first + tile]
        place = start + first
        raw, *columns = (each[place : place + len(dense)] for each in chunk)
        work.release()
        body(raw, dense, work, *columns)


def decode(out: Tensor, blocks: Tensor, fmt: BlockFormat, work: Workspace) -> None:
    """Dequantise blocks at once, without tiles: for devices on which each operation is a launch.

    Args:
        out: float32 [n, weights], contiguous.
        blocks: uint8 [n, nbytes] of a block format or fp8, on the same device.
        fmt: Format of the blocks.
        work: Scratch memory of that device.
    """
    header, body = DECODERS[fmt.name]
    raw = aligned(blocks, work)
    body(raw, out, work, *header(raw, work))


def check_rows(packed: Tensor, fmt: BlockFormat) -> None:
    """Raise BadShape unless `packed` is uint8 and its last axis is a whole number of blocks."""
    if packed.dtype != torch.uint8 or not packed.ndim:
        raise BadShape(
            f"{fmt.name}: packed weights must be uint8 [..., row bytes], not {packed.dtype} of shape "
            f"{tuple(packed.shape)}; view the bytes with .view(torch.uint8)"
        )
    if packed.shape[-1] % fmt.nbytes:
        raise BadShape(
            f"{fmt.name}: rows of {packed.shape[-1]} bytes are not a whole number of blocks of {fmt.nbytes} "
            f"bytes; cut the data at row boundaries or name the format it has"
        )


def aligned(blocks: Tensor, work: Workspace | None) -> Tensor:
    """The blocks themselves, or a copy if their alignment does not allow to read numbers in place."""
    if blocks.storage_offset() % 8 == 0 and blocks.data_ptr() % 8 == 0:
        return blocks
    if work is None:
        return blocks.clone()
    return work.take(torch.uint8, *blocks.shape).copy_(blocks)
