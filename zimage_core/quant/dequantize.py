"""`dequantize`: packed rows to dense weights, by a Triton kernel on GPUs and by torch elsewhere.

The backends are `zimage_core.kernels.dequantize`, `zimage_core.cpu.dequantize`, and `quant.plain` for GPUs
where no kernel runs. All give the bits of `zimage_core.reference.dequantize`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zimage_core.cpu.dequantize import check_rows
from zimage_core.cpu.dequantize import dequantize_into as by_torch
from zimage_core.cpu.numbers import DTYPES
from zimage_core.errors import BadArgument, printable
from zimage_core.formats import FORMATS, BlockFormat, by_name
from zimage_core.quant import plain
from zimage_core.quant.dispatch import kernels_for

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def dequantize(packed: Tensor, format_name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Packed rows to dense weights, on the same device.

    Args:
        packed: uint8 [..., row bytes], rows of whole blocks.
        format_name: Key of `zimage_core.formats.FORMATS`: "Q4_K", "BF16", "F8_E4M3" ...
        dtype: Float type of the result. Blocks are computed in float32 and rounded once.

    Returns:
        [..., K] with K = row bytes / block bytes * block weights. For plain numbers already in `dtype`,
        the result is a view of `packed`.

    Raises:
        UnknownFormat: No such format; the message lists them.
        BadShape: packed is not uint8 or its rows are not whole blocks.
        BadArgument: packed is no tensor, or dtype is no float type.
    """
    fmt = by_name(format_name)
    if not isinstance(packed, Tensor):
        raise BadArgument(f"packed must be a uint8 torch.Tensor, not {printable(type(packed).__name__)}")
    if dtype not in _FLOATS:
        raise BadArgument(f"dtype must be a torch float type such as torch.float32, not {printable(dtype)}")
    return dense_rows(packed, fmt, dtype)


def dense_rows(packed: Tensor, fmt: BlockFormat, dtype: torch.dtype) -> Tensor:
    """`dequantize` for a `BlockFormat`, without restriction of the dtype.

    Raises:
        BadShape: packed is not uint8 or its rows are not whole blocks.
    """
    if torch.compiler.is_compiling():
        traced: Tensor = _dequantize_op(packed, fmt.name, dtype)
        return traced
    check_rows(packed, fmt)
    on_cpu = packed.device.type == "cpu"
    if fmt.is_float or fmt.is_integer or (fmt.weights == 1 and not on_cpu):
        return convert(packed, fmt, dtype)
    triton = fmt.weights > 1 and kernels_for(packed.device)
    if not triton and not on_cpu:
        return plain.dequantize(packed, fmt, dtype)
    shape = (*packed.shape[:-1], packed.shape[-1] // fmt.nbytes * fmt.weights)
    stored = dtype if triton and dtype != torch.float64 else torch.float32
    out = torch.empty(shape, dtype=stored, device=packed.device)
    if triton:
        from zimage_core.kernels.dequantize import dequantize_into as by_triton

        by_triton(out, packed, fmt)
    else:
        by_torch(out, packed, fmt)
    return out.to(dtype)


def convert(packed: Tensor, fmt: BlockFormat, dtype: torch.dtype) -> Tensor:
    """Convert plain numbers or fp8, uint8 [..., row bytes], to [..., K] by torch's own conversion.

    For numbers already in `dtype`, the result is a view if the bytes are contiguous and aligned.
    """
    readable = packed.is_contiguous() and packed.storage_offset() % fmt.nbytes == 0
    if not readable or packed.data_ptr() % fmt.nbytes:
        packed = packed.clone(memory_format=torch.contiguous_format)
    return packed.view(DTYPES[fmt.name]).to(dtype)


# A graph of torch.compile holds this operator, which is opaque to the compiler.
@torch.library.custom_op("zimage::dequantize", mutates_args=())
def _dequantize_op(packed: Tensor, format_name: str, dtype: torch.dtype) -> Tensor:
    dense = dense_rows(packed, FORMATS[format_name], dtype)
    # an operator may not return a view of its input
    return dense.clone() if DTYPES.get(format_name) == dtype else dense


@_dequantize_op.register_fake
def _(packed: Tensor, format_name: str, dtype: torch.dtype) -> Tensor:
    fmt = FORMATS[format_name]
    shape = (*packed.shape[:-1], packed.shape[-1] // fmt.nbytes * fmt.weights)
    return packed.new_empty(shape, dtype=dtype)
