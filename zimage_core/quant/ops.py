"""`linear` and `embedding` for weights that may be dense or packed.

On a GPU, `gpu.linear` multiplies by kernels; where none run, a packed weight is dequantised by plain torch
and multiplied by torch's product. On a CPU, it is dequantised in slabs of rows into one reused float32 buffer
and multiplied in float32, so packed weights take only the memory of the file and one slab. For x in bfloat16,
where the CPU multiplies that faster, a slab is rounded to bfloat16 before.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from zimage_core.cpu import dequantize as cpu
from zimage_core.cpu.capability import bfloat16_pays
from zimage_core.cpu.numbers import DTYPES
from zimage_core.cpu.pool import in_parallel
from zimage_core.cpu.rotation import rotate
from zimage_core.cpu.workspace import workspace
from zimage_core.errors import BadArgument, BadShape, Unsupported
from zimage_core.formats import FORMATS
from zimage_core.quant import gpu
from zimage_core.quant.dequantize import dense_rows
from zimage_core.quant.dispatch import PLAIN_WEIGHTS, SCRATCH_BYTES
from zimage_core.quant.plain import slabs
from zimage_core.quant.tensor import PlaneCache, QuantTensor, check_operands, per_row

SLAB_BYTES = 4 << 20
"""Bytes of dequantised rows per thread and multiplication.

From 1,000 tokens on, half of it halves the speed of the multiplication, and twice as much gains 5 per cent;
at 256 tokens twice as much loses 5 per cent, because it no longer fits the cache.
"""

SPREAD_FROM = 1 << 24
"""Number of multiplications from which on a matrix is divided among threads: 0.4 ms of work."""

_FORMAT_OF = {dtype: FORMATS[name] for name, dtype in DTYPES.items() if not name.startswith("F8")}


def linear(
    x: Tensor, weight: Tensor | QuantTensor, bias: Tensor | None = None, in_bfloat16: bool = False
) -> Tensor:
    """x @ weight.T + bias.

    On a CPU the arithmetic is float32 for all dtypes of x and weight, with two exceptions. A dense weight of
    x's dtype under autograd uses torch's own linear. For x in bfloat16, where `capability.bfloat16_pays`, the
    weight is rounded to bfloat16 and the sums are float32. On a GPU the operands have x's dtype and the sums
    are float32. The result is rounded once, to x's dtype.

    Args:
        x: [..., K], a float type, any strides.
        weight: [N, K], dense or packed.
        bias: [N] or None.
        in_bfloat16: Multiply as if x were bfloat16, and round the result to that before x's dtype.

    Returns:
        [..., N] in x's dtype.

    Raises:
        BadShape: K of x is not K of the weight, or the weight is no matrix.
        Unsupported: A gradient would have to pass through packed weights.
    """
    check_operands(x.shape, weight)
    if in_bfloat16 and x.dtype != torch.bfloat16:
        return linear(x.bfloat16(), weight, bias).to(x.dtype)
    if isinstance(weight, QuantTensor):
        if torch.is_grad_enabled() and x.requires_grad:
            raise Unsupported(
                "packed weights give no gradients; run under torch.no_grad(), or make them dense by "
                "pipe.dequantize_weights(budget) or by dequantize_weight(dtype) of the layer"
            )
        if weight.rotation:  # (x R)(W R)^T is x W^T
            x, weight = rotate(x.float(), weight.rotation).to(x.dtype), weight.like(weight.packed, rotation=0)
    narrow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and bfloat16_pays()
    if isinstance(weight, Tensor):
        wants_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        narrow = narrow and not wants_grad
        if weight.dtype == torch.float32 and x.dtype != torch.float32 and not (weight.is_cuda or narrow):
            return functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
        fast = weight.is_cuda or narrow or x.dtype in (torch.float32, torch.float64)
        own = weight.dtype == x.dtype and fast
        if own or wants_grad or weight.dtype not in _FORMAT_OF:
            return functional.linear(x, weight, bias)
        raw = weight.detach().contiguous().view(torch.uint8)
        weight = QuantTensor(raw, _FORMAT_OF[weight.dtype], tuple(weight.shape))
    if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return _packed_linear(x, weight, bias)
    with torch.no_grad():
        if torch.compiler.is_compiling():
            planes = list(weight.planes.planes or ())
            out: Tensor = _linear_op(x, weight.packed, weight.format.name, weight.scale, bias, planes)
            return out
        return _packed_linear(x, weight, bias)


def _packed_linear(x: Tensor, weight: QuantTensor, bias: Tensor | None) -> Tensor:
    if x.dtype != torch.float64 and gpu.kernels_run(x.device):
        return gpu.linear(x, weight, bias)
    if x.device.type != "cpu":
        return plain_linear(x, weight, bias)
    rows, width = weight.shape
    narrow = x.dtype == torch.bfloat16 and bfloat16_pays()
    dtype = torch.bfloat16 if narrow else torch.float32
    flat = x.reshape(-1, width).to(dtype).contiguous()  # the strides of x must not choose the BLAS routine
    out = torch.empty(len(flat), rows, dtype=dtype)
    # a multiple of 8 rows, so that every slab is aligned like the first one
    height = max(8, SLAB_BYTES // (4 * max(width, 1)) // 8 * 8)

    def multiply(first: int, last: int) -> None:
        part = weight.rows(first, last)
        for start, dense in cpu.slabs(part.packed, part.format, height):
            place = slice(first + start, first + start + len(dense))
            if narrow:
                own = None if bias is None else bias[place]
                out[:, place] = _in_bfloat16(flat, dense, part.rows(start, start + len(dense)).scale, own)
            else:  # BLAS writes columns of a row-major matrix in place, by its leading dimension
                torch.mm(flat, dense.t(), out=out[:, place])

    if out.numel():
        in_parallel(multiply, rows) if out.numel() * width >= SPREAD_FROM else multiply(0, rows)
    if weight.scale is not None and not narrow:
        out.mul_(weight.scale.view(-1))
    if bias is not None and not narrow:
        out.add_(bias)
    return out.to(x.dtype).view(*x.shape[:-1], rows)


def _in_bfloat16(x: Tensor, dense: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """bfloat16 x times float32 rows, which are scaled and then rounded; one more rounding, of the result."""
    if scale is not None:
        dense.mul_(scale.view(-1, 1))
    work = workspace("bfloat16", dense.device)
    work.release()
    rows = work.take(torch.bfloat16, *dense.shape).copy_(dense)
    return functional.linear(x, rows, None if bias is None else bias.to(torch.bfloat16))


def plain_linear(x: Tensor, weight: QuantTensor, bias: Tensor | None) -> Tensor:
    """x @ W^T + bias in x's dtype: W dequantised without kernels, then torch's product; for any device.

    Args:
        x: [..., K], any float type.
        weight: [N, K] on x's device; `dispatch.plain_bytes` tells the memory that it takes.
        bias: [N] or None.

    Returns:
        [..., N].
    """
    rows, width = weight.shape
    own = None if bias is None else bias.to(x.dtype)
    # with a scale of its own, a weight is float32 twice before it is rounded
    parts = slabs(rows, width, SCRATCH_BYTES // x.dtype.itemsize if weight.scale is None else PLAIN_WEIGHTS)
    if len(parts) == 1:
        return functional.linear(x, weight.dequantize(x.dtype), own)
    out = x.new_empty(*x.shape[:-1], rows)
    for start, stop in parts:
        dense = weight.rows(start, stop).dequantize(x.dtype)
        out[..., start:stop] = functional.linear(x, dense, None if own is None else own[start:stop])
        del dense  # before the next slab is made
    return out


def embedding(ids: Tensor, weight: Tensor | QuantTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of a table by their numbers; only the requested rows of a packed table are read.

    Args:
        ids: Integers [...] below the number of rows.
        weight: [rows, hidden].
        dtype: Dtype of the result if the table is packed; rows of a dense table keep theirs.

    Returns:
        [..., hidden].

    Raises:
        BadArgument: An id is negative or not below the number of rows.
        BadShape: The weight is no matrix.
    """
    if len(weight.shape) != 2:
        raise BadShape(f"embedding: the table must have two axes, not shape {tuple(weight.shape)}")
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= weight.shape[0]:
            raise BadArgument(
                f"token id {low if low < 0 else high} is outside the table of {weight.shape[0]} rows; "
                "tokenizer and text encoder do not belong together"
            )
    if isinstance(weight, Tensor):
        return functional.embedding(ids, weight)
    flat = ids.reshape(-1).to(weight.device)
    packed = weight.packed.index_select(0, flat)
    dense = dense_rows(packed, weight.format, torch.float32)
    if weight.scale is not None:
        scale = weight.scale if weight.scale.numel() == 1 else weight.scale[flat]
        dense = dense * per_row(scale, 2)
    dense = rotate(dense, weight.rotation)
    return dense.to(dtype).view(*ids.shape, weight.shape[1])


# A graph of torch.compile holds this operator, which is opaque to the compiler.
@torch.library.custom_op("zimage::linear", mutates_args=())
def _linear_op(
    x: Tensor,
    packed: Tensor,
    format_name: str,
    scale: Tensor | None,
    bias: Tensor | None,
    planes: list[Tensor],
) -> Tensor:
    shape = (packed.shape[0], x.shape[-1])
    cache = PlaneCache(tuple(planes) or None, closed=True)
    return _packed_linear(x, QuantTensor(packed, FORMATS[format_name], shape, scale, cache), bias)


@_linear_op.register_fake
def _(x: Tensor, packed: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))
