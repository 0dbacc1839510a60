"""Packed blocks to dense weights: one kernel body with a decoder for each format.

A program reads a run of blocks as words and computes in float32 without contraction, so that every weight has
the bits of the reference. It stores once, rounded to the result's dtype.
Oracle: zimage_core.reference.dequantize. Tests: tests/kernels/test_dequantize.py.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from zimage_core.formats import BlockFormat
from zimage_core.kernels import tiles
from zimage_core.kernels.decode.table import DECODERS, lookup_table, words
from zimage_core.kernels.launch import Launch


@triton.jit
def decoded(
    base, live, table,                  # first words of blocks, which of them exist, codebook
    CODES: tl.constexpr, SCALES: tl.constexpr, SB: tl.constexpr, WEIGHTS: tl.constexpr, GROUPS: tl.constexpr,
    SUB: tl.constexpr, AFFINE: tl.constexpr, ZERO: tl.constexpr, LOOKUP: tl.constexpr,
):  # fmt: skip
    """Weights of SB blocks, float32 [SB, GROUPS, WEIGHTS / GROUPS]."""
    code = CODES(base, live, table)
    if LOOKUP:
        level = tl.load(table + code)
    else:
        level = (code - ZERO).to(tl.float32)
    parts = SCALES(base, live)
    scale = parts[0][:, None]
    if SUB:
        scale = scale * parts[1].to(tl.float32)
    weight = tl.reshape(level, (SB, GROUPS, WEIGHTS // GROUPS)) * scale[:, :, None]
    if AFFINE:
        if SUB:
            weight -= (parts[2][:, None] * parts[3].to(tl.float32))[:, :, None]
        else:
            weight -= parts[1][:, None, None]
    return weight


@triton.jit(do_not_specialize=["blocks"])
def _dequantize_kernel(
    packed, out, table,                 # words, [blocks * WEIGHTS], codebook
    blocks,
    CODES: tl.constexpr, SCALES: tl.constexpr, WORDS: tl.constexpr, WEIGHTS: tl.constexpr,
    GROUPS: tl.constexpr, SUB: tl.constexpr, AFFINE: tl.constexpr, ZERO: tl.constexpr, LOOKUP: tl.constexpr,
    SB: tl.constexpr,                   # blocks a program
    WHOLE: tl.constexpr,                # whether no program is part empty, so that nothing needs a mask
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * SB + tl.arange(0, SB)
    live = tl.full((SB,), True, tl.int1) if WHOLE else block < blocks
    base = packed + block * WORDS
    weight = decoded(base, live, table, CODES, SCALES, SB, WEIGHTS, GROUPS, SUB, AFFINE, ZERO, LOOKUP)
    place = block[:, None] * WEIGHTS + tl.arange(0, WEIGHTS)[None, :]
    tl.store(out + place, tl.reshape(weight, (SB, WEIGHTS)).to(out.dtype.element_ty), mask=live[:, None])


WHOLE_FROM = 1 << 21
"""Weights from which on a kernel without masks is compiled: for matrices, not for some rows of a table."""


@cache
def _launch(name: str, per_program: int, whole: bool) -> Launch:
    constants = {**DECODERS[name].constants(name), "SB": per_program, "WHOLE": whole}
    return Launch(_dequantize_kernel, constants, num_warps=tiles.DEQUANTIZE_WARPS, enable_fp_fusion=False)


def dequantize_into(out: torch.Tensor, packed: torch.Tensor, fmt: BlockFormat) -> None:
    """Fill `out` [..., K], contiguous float32, float16 or bfloat16, from uint8 [..., row bytes] on its device.

    `packed` may also be the `words` of these bytes.
    """
    blocks = out.numel() // fmt.weights
    if not blocks:
        return
    table = lookup_table(fmt.name, packed.device)
    source = words(packed, fmt.name)
    per_program = tiles.dequantize_weights() // fmt.weights
    whole = blocks % per_program == 0 and out.numel() >= WHOLE_FROM
    launch = _launch(fmt.name, per_program, whole)
    launch((-(-blocks // per_program), 1), (source, out, source if table is None else table), (), (blocks,))
