"""The one door to the torch dequantisers: packed rows to float32, tile by tile.

A tile is what its intermediates leave room for in a core's second-level cache; each family's
decoder works on one tile with scratch that is reused by the next. Exact against
`zimage_core.reference.dequantize` (tests/cpu/test_dequantize.py); timings come from
benchmarks/cpu_dequantize.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from zimage_core.cpu import i_quants, k_quants, legacy, numbers, small
from zimage_core.cpu.workspace import Workspace, workspace
from zimage_core.errors import BadShape
from zimage_core.formats import FORMATS, BlockFormat

Decoder = Callable[[Tensor, Tensor, Workspace], None]
"""(blocks uint8 [n, nbytes] contiguous and 8-byte aligned, out float32 [n, weights], scratch) -> None."""

TILE = 1 << 18
"""Weights a tile: 1 MB of float32 results, the fastest of 2^15 to 2^19 on a core with 1 MB of L2."""

DECODERS: dict[str, Decoder] = {
    "Q4_0": legacy.q4_0,
    "Q4_1": legacy.q4_1,
    "Q5_0": legacy.q5_0,
    "Q5_1": legacy.q5_1,
    "Q8_0": legacy.q8_0,
    "Q2_K": k_quants.q2_k,
    "Q3_K": k_quants.q3_k,
    "Q4_K": k_quants.q4_k,
    "Q5_K": k_quants.q5_k,
    "Q6_K": k_quants.q6_k,
    "IQ2_XXS": i_quants.iq2_xxs,
    "IQ2_XS": i_quants.iq2_xs,
    "IQ3_XXS": i_quants.iq3_xxs,
    "IQ1_S": i_quants.iq1_s,
    "IQ4_NL": legacy.iq4_nl,
    "IQ3_S": i_quants.iq3_s,
    "IQ2_S": i_quants.iq2_s,
    "IQ4_XS": i_quants.iq4_xs,
    "IQ1_M": i_quants.iq1_m,
    "TQ1_0": small.tq1_0,
    "TQ2_0": small.tq2_0,
    "MXFP4": small.mxfp4,
    "NVFP4": small.nvfp4,
    "Q1_0": small.q1_0,
    "Q2_0": small.q2_0,
    "Q2_0_128": small.q2_0,
    "F8_E4M3": partial(numbers.fp8, FORMATS["F8_E4M3"]),
    "F8_E5M2": partial(numbers.fp8, FORMATS["F8_E5M2"]),
}
"""Every block format and fp8; plain numbers go through `numbers.number`."""


def dequantize_into(out: Tensor, packed: Tensor, fmt: BlockFormat) -> None:
    """Dequantise rows into memory that is already there.

    Args:
        out: float32 [..., K], contiguous.
        packed: uint8 [..., row bytes], the same leading axes, same device, any alignment.
        fmt: The format of the rows.

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
        numbers.number(fmt, _aligned(blocks, None), values)
        return
    decode, count = DECODERS[fmt.name], TILE // fmt.weights
    work = workspace("tile", out.device)
    for start in range(0, len(blocks), count):
        work.reset()
        decode(_aligned(blocks[start : start + count], work), values[start : start + count], work)


def check_rows(packed: Tensor, fmt: BlockFormat) -> None:
    """BadShape unless `packed` is uint8 and its last axis is a whole number of blocks."""
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


def _aligned(blocks: Tensor, work: Workspace | None) -> Tensor:
    """The blocks themselves, or a copy when numbers in them could not be read in place."""
    if blocks.storage_offset() % 8 == 0 and blocks.data_ptr() % 8 == 0:
        return blocks
    if work is None:
        return blocks.clone()
    return work.take(torch.uint8, *blocks.shape).copy_(blocks)


def dequantize(packed: Tensor, fmt: BlockFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [..., row bytes] -> [..., K].

    Block formats are computed in float32 and rounded once. Plain numbers are converted directly, and
    of the same dtype returned as a view where the bytes are aligned.
    """
    check_rows(packed, fmt)
    if fmt.is_float or fmt.is_integer:
        native = numbers.DTYPES[fmt.name]
        readable = packed.is_contiguous() and packed.storage_offset() % fmt.nbytes == 0
        readable = readable and packed.data_ptr() % fmt.nbytes == 0
        source = packed if readable else packed.clone(memory_format=torch.contiguous_format)
        return source.view(native).to(dtype)
    shape = (*packed.shape[:-1], packed.shape[-1] // fmt.nbytes * fmt.weights)
    out = torch.empty(shape, dtype=torch.float32, device=packed.device)
    dequantize_into(out, packed, fmt)
    return out.to(dtype)
