"""Products of int8 rows on a GPU, by Triton kernels or by torch (`dispatch.int8_product`); attention.

A weight that is packed, or dense, is quantised into the scratch of `quant.gpu` before each product: a program
decodes a row, rotates it and finds its scale without writing it in between. Where no kernel runs, plain torch
quantises, with the same integers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zimage_core.cpu.int8 import LARGEST, LEAST
from zimage_core.cpu.rotation import rotate
from zimage_core.formats import BlockFormat
from zimage_core.quant import dispatch, gpu
from zimage_core.quant.dequantize import convert, dense_rows
from zimage_core.quant.int8 import Int8Rows, is_int8
from zimage_core.quant.tensor import QuantTensor

SUM_BYTES = 64 << 20
"""Most bytes of int32 sums at a time where torch multiplies: they are written, read and scaled in float32."""
TORCH_ROWS, TORCH_MULTIPLE = 17, 8
"""Least rows of x, and of what K and N must be multiples, for `torch._int_mm` on a GPU."""


def quantize_rows(x: Tensor, rotation: int = 0) -> tuple[Tensor, Tensor]:
    """x [M, K], a float type, any strides -> int8 [M, K], float32 scales [M].

    Args:
        x: The rows.
        rotation: Block of the Hadamard rotation before; 0 or 1 for none.
    """
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    _quantize_into(values, scale, x, rotation)
    return values, scale


def quantize_weight(weight: Tensor | QuantTensor, rotation: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [N, K], dense or packed, as int8 [N, K] and float32 scales [N], to be kept."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    _weight_into(values, scale, weight, rotation)
    return values, scale


def linear(
    x: Tensor | Int8Rows, weight: Tensor | QuantTensor, bias: Tensor | None, rotation: int = 0
) -> Tensor:
    """x @ W^T + bias by int8 rows, in x's dtype, rounded once.

    Args:
        x: [..., K], a float type, or rows that were quantised with the same rotation.
        weight: [N, K] on x's device; int8 rows are used as they are.
        bias: [N] or None.
        rotation: Block of the Hadamard rotation of both operands; int8 rows have it already.

    Returns:
        [..., N].

    Raises:
        Unsupported: The GPU multiplies no int8.
    """
    rows, width = weight.shape
    if isinstance(x, Int8Rows):
        values, scale, lead, dtype = x.values, x.scale, x.lead, x.dtype
    else:
        lead, dtype = tuple(x.shape[:-1]), x.dtype
        values, scale = quantize_rows(x if x.ndim == 2 else x.reshape(-1, width), rotation)
    own = None if bias is None else bias.contiguous()
    if is_int8(weight) and weight.scale is not None:
        kept = weight.scale.view(-1)
        kept = kept if len(kept) == rows else kept.expand(rows).contiguous()
        out = _product(values, scale, weight.packed.view(torch.int8), kept, own, dtype)
    else:
        out = _through_scratch(values, scale, weight, own, dtype, rotation)
    return out.view(*lead, rows)


def attention_pays(q: Tensor) -> bool:
    """Whether attention without mask takes q k^T in int8, where kernels run; q [..., L, H, D]."""
    dtype = str(q.dtype).removeprefix("torch.")
    return dispatch.int8_attention(gpu.architecture(q.device), q.shape[-3], q.shape[-1], dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v by a kernel, with q k^T in int8 and smoothed keys.

    Args:
        q: [..., L, H, D], as `dispatch.int8_attention` wants it.
        k: The same shape and dtype.
        v: The same shape and dtype.

    Returns:
        [..., L, H * D].
    """
    four = (t if t.ndim == 4 else t.reshape(-1, *t.shape[-3:]) for t in (q, k, v))
    out: Tensor = _attention_kernels().attention(*four)
    return out.view(*q.shape[:-2], -1)


def scratch_bytes(weight: Tensor | QuantTensor) -> int:
    """Bytes of scratch that a product with a weight takes in int8."""
    return 0 if is_int8(weight) else min(dispatch.SCRATCH_BYTES, weight.shape[0] * weight.shape[1])


@cache
def _kernels() -> Any:
    from zimage_core.kernels import int8 as kernels  # Triton is imported at the first call

    return kernels


@cache
def _attention_kernels() -> Any:
    from zimage_core.kernels import attention_int8 as kernels

    return kernels


def _through_scratch(
    values: Tensor,
    scale: Tensor,
    weight: Tensor | QuantTensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    rotation: int,
) -> Tensor:
    """The product with a weight that is quantised for it, slab by slab if it is larger than the scratch."""
    rows, width = weight.shape
    height = min(rows, max(8, dispatch.SCRATCH_BYTES // max(width, 1) // 8 * 8))
    scratch = gpu.scratch(values.device, height, width, torch.int8)
    made = torch.empty(height, dtype=torch.float32, device=values.device)
    if height == rows:
        _weight_into(scratch, made, weight, rotation)
        return _product(values, scale, scratch, made, bias, dtype)
    out = torch.empty(len(values), rows, dtype=dtype, device=values.device)
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        part = weight.rows(start, stop) if isinstance(weight, QuantTensor) else weight[start:stop]
        slab, factors = scratch[: stop - start], made[: stop - start]
        _weight_into(slab, factors, part, rotation)
        add = None if bias is None else bias[start:stop]
        out[:, start:stop] = _product(values, scale, slab, factors, add, dtype)
    return out


def _product(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """int8 x [M, K] and w [N, K] with their scales -> [M, N] in `dtype`."""
    how = dispatch.int8_product(gpu.architecture(x.device))
    if how == "triton" and gpu.kernels_run(x.device):
        product: Tensor = _kernels().matmul(x, x_scale, w, w_scale, bias, dtype)
        return product
    return _by_torch(x, x_scale, w, w_scale, bias, dtype)


def _by_torch(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product by cuBLASLt, whose sums are scaled afterwards; x in parts, for the memory of the sums."""
    (count, width), rows = x.shape, len(w)
    out = torch.empty(count, rows, dtype=dtype, device=x.device)
    if not out.numel():
        return out
    more_k, more_n = -width % TORCH_MULTIPLE, -rows % TORCH_MULTIPLE
    if more_k or more_n:
        x, w = functional.pad(x, (0, more_k)), functional.pad(w, (0, more_k, 0, more_n))
    height = max(TORCH_ROWS, SUM_BYTES // (4 * len(w)))
    for start in range(0, count, height):
        stop = min(start + height, count)
        part = x[start:stop]
        if len(part) < TORCH_ROWS:
            part = functional.pad(part, (0, 0, 0, TORCH_ROWS - len(part)))
        sums = torch._int_mm(part, w.t())[: stop - start, :rows]
        if gpu.kernels_run(x.device):  # one pass over the sums instead of four
            _kernels().rescale_into(out[start:stop], sums, x_scale[start:stop], w_scale, bias)
            continue
        scaled = (sums * w_scale).mul_(x_scale[start:stop].unsqueeze(1))
        out[start:stop] = scaled if bias is None else scaled.add_(bias)
    return out


def _weight_into(values: Tensor, scale: Tensor, weight: Tensor | QuantTensor, rotation: int) -> None:
    """A weight, dense or packed, as int8 [N, K] and scales [N], which a scale beside the blocks joins."""
    if not isinstance(weight, QuantTensor):
        _quantize_into(values, scale, weight.detach(), rotation)
        return
    fmt = weight.format
    if fmt.weights > 1 and gpu.kernels_run(values.device) and values.shape[1] <= _kernels().LARGEST_ROW:
        packed = gpu.words(weight)
        _kernels().requantize_into(values, scale, packed, fmt, rotation)
    else:
        _dense_into(values, scale, weight, rotation)
    if weight.scale is not None:
        scale.mul_(weight.scale.view(-1))


def _dense_into(values: Tensor, scale: Tensor, weight: QuantTensor, rotation: int) -> None:
    """The same by dequantising slabs of rows."""
    rows, width = values.shape
    height = max(1, dispatch.PLAIN_WEIGHTS // max(width, 1))
    for start in range(0, rows, height):
        part = slice(start, min(start + height, rows))
        packed = weight.packed[part]
        if weight.format.weights == 1:
            wide = convert(packed, weight.format, _exact(weight.format))
        else:
            wide = dense_rows(packed, weight.format, torch.float32)
        _quantize_into(values[part], scale[part], wide, rotation)


def _exact(fmt: BlockFormat) -> torch.dtype:
    """The shortest dtype of kernels that holds plain numbers exactly."""
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(fmt.name, torch.float32)


def _quantize_into(values: Tensor, scale: Tensor, x: Tensor, rotation: int) -> None:
    """Quantise x [M, K] into int8 [M, K], contiguous, and scales [M]."""
    if x.dtype != torch.float64 and gpu.kernels_run(x.device) and x.shape[1] <= _kernels().LARGEST_ROW:
        _kernels().quantize_into(values, scale, x, rotation)
        return
    wide = rotate(x.float(), rotation)
    # a number divided by a tensor would be the reciprocal times the number, rounded twice
    largest = wide.abs().amax(1).clamp_(min=LEAST)
    inverse = torch.full_like(largest, LARGEST).div_(largest)
    values.copy_((wide * inverse.unsqueeze(1)).round_())
    torch.div(largest, torch.full_like(largest, LARGEST), out=scale)
