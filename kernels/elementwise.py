"""The element-wise steps of an S3-DiT block, each in one pass over memory.

Norms: one program per row (per row of heads for q and k); the row is read once and stays in registers.
Gate: one program per 2,048 elements. Arithmetic is float32, rounded once to the dtype of the result.
Multiply-adds may be fused. `zimage_core.nn.elementwise` checks shapes before it calls these functions.
Oracle: tests/helpers/fused.py, from zimage_core.reference.layers. Tests: tests/kernels/test_elementwise.py.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from zimage_core.kernels.launch import Launch

HEAD_TILE = 1024
"""Elements of q, and of k, in one program: eight heads of 128, one 128-bit access per thread."""
RUN = 2048
"""Elements in one program of the gate: two 128-bit accesses per thread in half precision."""


@triton.jit
def _rms_norm_modulate_kernel(
    x, weight, scale, y,        # [rows, size], [size], [size] or None, [rows, size] contiguous
    size, stride_x, eps,        # stride in elements
    SIZE: tl.constexpr,         # size rounded up to a power of two
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # 64 bits before any multiplication
    col = tl.arange(0, SIZE)
    live = col < size
    v = tl.load(x + row * stride_x + col, mask=live, other=0.0).to(tl.float32)
    gain = tl.load(weight + col, mask=live, other=0.0).to(tl.float32)
    if scale is not None:
        gain = gain * (1.0 + tl.load(scale + col, mask=live, other=0.0).to(tl.float32))
    inverse = tl.rsqrt(tl.sum(v * v) / size + eps)
    tl.store(y + row * size + col, (v * inverse * gain).to(y.dtype.element_ty), mask=live)


@triton.jit
def _gate_norm_residual_kernel(
    x, branch, weight, gate, y,     # [rows, size] twice, [size], [size] or None, [rows, size] contiguous
    size, stride_x, stride_b, eps,  # strides in elements
    SIZE: tl.constexpr,             # size rounded up to a power of two
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, SIZE)
    live = col < size
    v = tl.load(branch + row * stride_b + col, mask=live, other=0.0).to(tl.float32)
    base = tl.load(x + row * stride_x + col, mask=live, other=0.0).to(tl.float32)
    gain = tl.load(weight + col, mask=live, other=0.0).to(tl.float32)
    if gate is not None:
        gain = gain * tl.load(gate + col, mask=live, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(v * v) / size + eps)
    tl.store(y + row * size + col, (base + v * inverse * gain).to(y.dtype.element_ty), mask=live)


@triton.jit
def _norm_and_rotate(x, gain, cos, sin, size, eps, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """x / rms(x) * gain with channels (2j, 2j + 1) rotated by angle j; float32 [HEADS, SIZE]."""
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / size + eps)
    y = x * inverse[:, None] * gain[None, :]
    a, b = tl.split(tl.reshape(y, (HEADS, SIZE // 2, 2)))
    cos, sin = cos[None, :], sin[None, :]
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (HEADS, SIZE))


@triton.jit(do_not_specialize=["length"])
def _qk_norm_rope_kernel(
    q, k, q_weight, k_weight,   # [rows, heads, size] twice, [size] twice
    cos, sin,                   # float32 [length, size / 2]; row r stands at place r % length
    q_out, k_out,               # [rows, heads, size] contiguous
    heads, size,
    stride_q, stride_qh, stride_k, stride_kh,  # in elements
    length, eps,
    HEADS: tl.constexpr,        # heads of one program
    SIZE: tl.constexpr,         # size rounded up to a power of two
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    col = tl.arange(0, SIZE)
    pair = tl.arange(0, SIZE // 2)
    wide = col < size
    live = (head < heads)[:, None] & wide[None, :]
    angle = (row % length) * (size // 2) + pair
    half = pair < size // 2
    c = tl.load(cos + angle, mask=half, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=half, other=0.0).to(tl.float32)
    out = row * heads * size + head[:, None] * size + col[None, :]

    at = row * stride_q + head.to(tl.int64)[:, None] * stride_qh + col[None, :]
    v = tl.load(q + at, mask=live, other=0.0).to(tl.float32)
    gain = tl.load(q_weight + col, mask=wide, other=0.0).to(tl.float32)
    rotated = _norm_and_rotate(v, gain, c, s, size, eps, HEADS, SIZE)
    tl.store(q_out + out, rotated.to(q_out.dtype.element_ty), mask=live)

    at = row * stride_k + head.to(tl.int64)[:, None] * stride_kh + col[None, :]
    v = tl.load(k + at, mask=live, other=0.0).to(tl.float32)
    gain = tl.load(k_weight + col, mask=wide, other=0.0).to(tl.float32)
    rotated = _norm_and_rotate(v, gain, c, s, size, eps, HEADS, SIZE)
    tl.store(k_out + out, rotated.to(k_out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["runs"])
def _silu_gate_kernel(
    gate, up, y,                # [rows, size] twice, [rows, size] contiguous
    size, stride_g, stride_u,   # strides in elements
    runs, factor,               # programs a row
    RUN: tl.constexpr,          # elements of one program
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // runs).to(tl.int64)
    col = (program % runs).to(tl.int64) * RUN + tl.arange(0, RUN)
    live = col < size
    g = tl.load(gate + row * stride_g + col, mask=live, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_u + col, mask=live, other=0.0).to(tl.float32)
    # exp may become infinite; the quotient is then 0, as it should be
    out = g / (1.0 + tl.exp(-g)) * u * factor
    tl.store(y + row * size + col, out.to(y.dtype.element_ty), mask=live)


def rms_norm_modulate(
    x: torch.Tensor, weight: torch.Tensor, eps: float, scale: torch.Tensor | None
) -> torch.Tensor:
    """x [..., D], weight [D], scale [D] or None -> x / rms(x) * weight * (1 + scale), contiguous."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        rows, size = _rows(x), x.shape[-1]
        tensors = (rows, weight.contiguous(), None if scale is None else scale.contiguous(), y)
        launch = _norm_launch(size)
        launch((rows.shape[0], 1), tensors, (size, rows.stride(0)), (float(eps),))
    return y


def gate_norm_residual(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    gate: torch.Tensor | None,
    factor: float,
) -> torch.Tensor:
    """x, branch [..., D], weight [D], gate [D] or None -> x + gate * norm(branch), contiguous."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        rows, branches, size = _rows(x), _rows(branch), x.shape[-1]
        tensors = (rows, branches, weight.contiguous(), None if gate is None else gate.contiguous(), y)
        launch = _gate_launch(size)
        strides = (rows.stride(0), branches.stride(0))
        launch((rows.shape[0], 1), tensors, (size, *strides), (float(eps * factor * factor),))
    return y


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k [..., L, H, D], weights [D], cos and sin [L, D / 2] -> both normed and rotated, contiguous."""
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    k_out = torch.empty_like(k, memory_format=torch.contiguous_format)
    if q_out.numel():
        length, heads, size = q.shape[-3:]
        if q.ndim > 3:
            q, k = q.flatten(0, -3), k.flatten(0, -3)
        q, k = _dense_rows(q), _dense_rows(k)
        vectors = (q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous())
        launch, at_once = _head_launch(heads, size)
        sizes = (heads, size, q.stride(0), q.stride(1), k.stride(0), k.stride(1))
        grid = (q.shape[0], -(-heads // at_once))
        launch(grid, (q, k, *vectors, q_out, k_out), sizes, (length, float(eps)))
    return q_out, k_out


def silu_gate(gate: torch.Tensor, up: torch.Tensor, factor: float) -> torch.Tensor:
    """gate, up [...] -> silu(gate) * up * factor in the dtype of gate, contiguous."""
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if y.numel():
        if gate.shape[-1:].numel() % RUN and gate.is_contiguous() and up.is_contiguous():
            gates, ups = gate.view(1, -1), up.view(1, -1)  # no row ends inside a run
        else:
            gates, ups = _rows(gate), _rows(up)
        rows, size = gates.shape
        runs = -(-size // RUN)
        sizes = (size, gates.stride(0), ups.stride(0))
        _silu_launch()((rows * runs, 1), (gates, ups, y), sizes, (runs, float(factor)))
    return y


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., D] -> [rows, D] with adjacent columns; copies only if the strides require it."""
    return _dense_rows(x if x.ndim == 2 else x.reshape(-1, x.shape[-1] if x.ndim else 1))


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@cache
def _norm_launch(size: int) -> Launch:
    return _row_launch(_rms_norm_modulate_kernel, size)


@cache
def _gate_launch(size: int) -> Launch:
    return _row_launch(_gate_norm_residual_kernel, size)


def _row_launch(kernel: Any, size: int) -> Launch:
    """A kernel whose programs hold one row."""
    tile = triton.next_power_of_2(size)
    return Launch(kernel, {"SIZE": tile}, num_warps=_warps(tile, 512), enable_fp_fusion=True)


@cache
def _head_launch(heads: int, size: int) -> tuple[Launch, int]:
    """The kernel of q and k, and the heads that a program takes."""
    tile = triton.next_power_of_2(size)
    at_once = min(triton.next_power_of_2(heads), max(1, HEAD_TILE // tile))
    warps = _warps(at_once * tile, 256)
    constants = {"HEADS": at_once, "SIZE": tile}
    return Launch(_qk_norm_rope_kernel, constants, num_warps=warps, enable_fp_fusion=True), at_once


@cache
def _silu_launch() -> Launch:
    return Launch(_silu_gate_kernel, {"RUN": RUN}, num_warps=4, enable_fp_fusion=True)


def _warps(elements: int, share: int) -> int:
    """Warps of a program of `elements`, about `share` elements per warp: a power of two up to eight."""
    return min(8, max(1, elements // share))
