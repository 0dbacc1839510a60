"""The element-wise steps before a product of int8 rows: a norm or a gate whose result is quantised in registers.

The result in float32 is never written. Each is the step of `elementwise.py` followed by `int8.quantize_rows`,
without the rounding to a float dtype between them.
Tests: tests/kernels/test_int8_steps.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from zimage_core.kernels.int8 import block, columns, row_tiles, row_warps, spread, store_row
from zimage_core.kernels.launch import Launch


@triton.jit
def _norm_tile(x, weight, scale, row, size, stride, START: tl.constexpr, SIZE: tl.constexpr):
    """A row's numbers in a tile, and what they are multiplied by besides the norm."""
    col = columns(SIZE, START)
    live = col < size
    v = tl.load(x + row * stride + col, mask=live, other=0.0).to(tl.float32)
    gain = tl.load(weight + col, mask=live, other=0.0).to(tl.float32)
    if scale is not None:
        gain = gain * (1.0 + tl.load(scale + col, mask=live, other=0.0).to(tl.float32))
    return v, gain


@triton.jit
def _rms_norm_modulate_int8_kernel(
    x, weight, scale, q, scales,    # [rows, size], [size], [size] or None, int8 [rows, size], float32 [rows]
    size, stride, eps,              # stride in elements
    HEAD: tl.constexpr, TAIL: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, gain = _norm_tile(x, weight, scale, row, size, stride, 0, HEAD)
    total = tl.sum(head * head)
    tail = head
    if TAIL:
        tail, more = _norm_tile(x, weight, scale, row, size, stride, HEAD, TAIL)
        total += tl.sum(tail * tail)
    inverse = tl.rsqrt(total / size + eps)
    head = spread(head * inverse * gain, G)
    if TAIL:
        tail = spread(tail * inverse * more, G)
    store_row(q, scales, row, size, head, tail, HEAD, TAIL, G)


@triton.jit
def _gate_tile(gate, up, row, size, stride_g, stride_u, factor, START: tl.constexpr, SIZE: tl.constexpr):
    """silu(gate) * up * factor in a tile of a row, float32."""
    col = columns(SIZE, START)
    live = col < size
    g = tl.load(gate + row * stride_g + col, mask=live, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_u + col, mask=live, other=0.0).to(tl.float32)
    # exp may become infinite; the quotient is then 0, as it should be
    return g / (1.0 + tl.exp(-g)) * u * factor


@triton.jit
def _silu_gate_int8_kernel(
    gate, up, q, scales,            # [rows, size] twice, int8 [rows, size], float32 [rows]
    size, stride_g, stride_u,       # strides in elements
    factor,
    HEAD: tl.constexpr, TAIL: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = spread(_gate_tile(gate, up, row, size, stride_g, stride_u, factor, 0, HEAD), G)
    tail = head
    if TAIL:
        tail = spread(_gate_tile(gate, up, row, size, stride_g, stride_u, factor, HEAD, TAIL), G)
    store_row(q, scales, row, size, head, tail, HEAD, TAIL, G)


def rms_norm_modulate(
    x: torch.Tensor, weight: torch.Tensor, eps: float, scale: torch.Tensor | None, rotation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, D], weight [D], scale [D] or None -> x / rms(x) * weight * (1 + scale) as int8 [M, D], scales [M]."""
    q, scales = _empty(x)
    if q.numel():
        x = _dense_rows(x)
        tensors = (x, weight.contiguous(), None if scale is None else scale.contiguous(), q, scales)
        launch = _launch(_rms_norm_modulate_int8_kernel, x.shape[1], rotation)
        launch((len(x), 1), tensors, (x.shape[1], x.stride(0)), (float(eps),))
    return q, scales


def silu_gate(
    gate: torch.Tensor, up: torch.Tensor, factor: float, rotation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """gate, up [M, D] -> silu(gate) * up * factor as int8 [M, D], scales [M]."""
    q, scales = _empty(gate)
    if q.numel():
        gate, up = _dense_rows(gate), _dense_rows(up)
        launch = _launch(_silu_gate_int8_kernel, gate.shape[1], rotation)
        sizes = (gate.shape[1], gate.stride(0), up.stride(0))
        launch((len(gate), 1), (gate, up, q, scales), sizes, (float(factor),))
    return q, scales


def _empty(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return q, torch.empty(len(x), dtype=torch.float32, device=x.device)


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


@cache
def _launch(kernel: Any, size: int, rotation: int) -> Launch:
    head, tail = row_tiles(size)
    constants = {"HEAD": head, "TAIL": tail, "G": block(rotation)}
    # as in `int8.py`: the scale and the integers must be those of the numbers in the registers
    return Launch(kernel, constants, num_warps=row_warps(head), enable_fp_fusion=False)
