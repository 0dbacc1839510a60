"""Packed weights on a GPU: dequantised or multiplied by Triton kernels, on the path that `paths` chooses.

Also the operators of the namespace `zimage` that stand for all this under torch.compile.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from zimage_core.cpu.numbers import DTYPES
from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.quant import dispatch

if TYPE_CHECKING:
    from zimage_core.quant.tensor import PlaneCache

SCRATCH_BYTES = dispatch.SCRATCH_BYTES
PLANES_MARGIN = dispatch.PLANES_MARGIN


_NATIVE = {**DTYPES, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


class _Local(threading.local):
    def __init__(self) -> None:
        self.scratch: dict[tuple[torch.device, int], Tensor] = {}


_local = _Local()


def architecture(device: torch.device) -> str:
    """Name as `paths` knows it: sm_90, gfx942; cpu, or sm_90 where a CPU plays one in the interpreter."""
    if device.type == "cuda":
        from zimage_core.kernels.tiles import architecture as of_gpu

        return of_gpu(device)[0]
    return "sm_90" if dispatch.kernels_for(device) else "cpu"


def dequantize(packed: Tensor, fmt: BlockFormat, dtype: torch.dtype) -> Tensor:
    """Packed rows uint8 [..., row bytes] -> [..., K]; blocks are computed in float32 and rounded once."""
    if torch.compiler.is_compiling():
        dense: Tensor = _dequantize_op(packed, fmt.name, dtype)
        return dense
    return _dequantize(packed, fmt, dtype)


def _dequantize(packed: Tensor, fmt: BlockFormat, dtype: torch.dtype) -> Tensor:
    if fmt.weights == 1:
        return _numbers(packed, fmt, dtype)
    from zimage_core.kernels.dequantize import dequantize as run

    shape = (*packed.shape[:-1], packed.shape[-1] // fmt.nbytes * fmt.weights)
    stored = torch.float32 if dtype == torch.float64 else dtype
    out = torch.empty(shape, dtype=stored, device=packed.device)
    run(packed, fmt, out)
    return out.to(dtype)


def linear(
    x: Tensor,
    packed: Tensor,
    fmt: BlockFormat,
    scale: Tensor | None,
    bias: Tensor | None,
    cache: PlaneCache,
) -> Tensor:
    """x @ W^T + bias for a packed W, in x's dtype with float32 sums.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        packed: uint8 [N, row bytes] on x's device.
        fmt: Of the rows.
        scale: float32, one number or [N], multiplies the rows; plain numbers (fp8) only.
        bias: [N] or None.
        cache: Of this weight; holds its planes once they are made.

    Returns:
        [..., N].
    """
    if not packed.shape[0]:
        return x.new_empty(*x.shape[:-1], 0)
    if torch.compiler.is_compiling():
        out: Tensor = _linear_op(x, packed, fmt.name, scale, bias, list(cache.planes or ()))
        return out
    flat = x.reshape(-1, x.shape[-1])
    if cache.planes is None and not cache.closed:
        _make_planes(flat, packed, fmt, cache)
    return _product(flat, packed, fmt, scale, bias, cache.planes).view(*x.shape[:-1], packed.shape[0])


def _choose(x: Tensor, rows: int, fmt: BlockFormat, free: int, planes: bool, mode: str) -> dispatch.Choice:
    name, dtype = architecture(x.device), str(x.dtype).removeprefix("torch.")
    return dispatch.choose(fmt.name, rows, x.shape[1], len(x), name, free, mode, dtype, planes)


def _make_planes(x: Tensor, packed: Tensor, fmt: BlockFormat, cache: PlaneCache) -> None:
    """Make the planes of a weight when x is the first that wants them and there is room."""
    rows = packed.shape[0]
    if _choose(x, rows, fmt, 1 << 62, False, dispatch.mode()).path != "fused":
        return
    free = _free_bytes(packed.device)
    if dispatch.mode() == "fused":
        _choose(x, rows, fmt, free, False, "fused")  # says what is missing
    if dispatch.planar_bytes(fmt, rows, x.shape[1]) <= free:
        from zimage_core.kernels.planar import repack

        with torch.inference_mode(False):  # they outlive the caller's mode
            cache.planes = repack(packed, fmt)
    cache.closed = True


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 40
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, free + unused - PLANES_MARGIN)


def _product(
    x: Tensor, packed: Tensor, fmt: BlockFormat, scale: Tensor | None, bias: Tensor | None, planes: Any
) -> Tensor:
    """x [M, K] -> [M, N] on the path that is chosen for it."""
    rows = packed.shape[0]
    choice = _choose(x, rows, fmt, 0, bool(planes), dispatch.mode() if planes else "dequantise")
    if choice.path == "fused":
        from zimage_core.kernels.matmul import matmul

        return matmul(x, planes, fmt, rows, None if bias is None else bias.contiguous())
    own = None if bias is None else bias.to(x.dtype)
    if fmt.weights == 1:
        weight = _numbers(packed, fmt, x.dtype if scale is None else torch.float32)
        if scale is not None:
            weight = (weight * scale.view(-1, 1)).to(x.dtype)
        return functional.linear(x, weight, own)
    return _through_scratch(x, packed, fmt, own)


def _numbers(packed: Tensor, fmt: BlockFormat, dtype: torch.dtype) -> Tensor:
    """Plain numbers and fp8 -> [..., K]: torch converts them in one pass."""
    native = _NATIVE[fmt.name]
    if packed.storage_offset() % fmt.nbytes or not packed.is_contiguous():
        packed = packed.clone(memory_format=torch.contiguous_format)
    return packed.view(native).to(dtype)


def _through_scratch(x: Tensor, packed: Tensor, fmt: BlockFormat, bias: Tensor | None) -> Tensor:
    from zimage_core.kernels.dequantize import dequantize as run

    rows, width = packed.shape[0], x.shape[1]
    height = min(rows, max(8, SCRATCH_BYTES // (width * x.dtype.itemsize) // 8 * 8))
    weight = _scratch(x.device, height * width * x.dtype.itemsize).view(x.dtype).view(height, width)
    if height == rows:
        run(packed, fmt, weight)
        return functional.linear(x, weight, bias)
    out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        slab = weight[: stop - start]
        run(packed[start:stop], fmt, slab)
        out[:, start:stop] = functional.linear(x, slab, None if bias is None else bias[start:stop])
    return out


def _scratch(device: torch.device, nbytes: int) -> Tensor:
    """Bytes that this thread reuses on the current stream; grown when they do not suffice.

    One buffer a stream: work on a stream is done in order, so the next weight cannot overwrite one that a
    product still reads.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _local.scratch.get((device, stream))
    if found is None or found.numel() < nbytes:
        with torch.inference_mode(False):  # it outlives the caller's mode
            found = _local.scratch[device, stream] = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return found[:nbytes]


def hand_over_scratch(device: torch.device, stream: int) -> Tensor | None:
    """This thread's scratch of a stream, from now on the caller's: a graph holds its address."""
    return _local.scratch.pop((device, stream), None)


@torch.library.custom_op("zimage::dequantize", mutates_args=())
def _dequantize_op(packed: Tensor, format_name: str, dtype: torch.dtype) -> Tensor:
    dense = _dequantize(packed, FORMATS[format_name], dtype)
    # an operator may not return a view of what it was given
    return dense.clone() if _NATIVE.get(format_name) == dtype else dense


@_dequantize_op.register_fake
def _(packed: Tensor, format_name: str, dtype: torch.dtype) -> Tensor:
    fmt = FORMATS[format_name]
    shape = (*packed.shape[:-1], packed.shape[-1] // fmt.nbytes * fmt.weights)
    return packed.new_empty(shape, dtype=dtype)


@torch.library.custom_op("zimage::linear", mutates_args=())
def _linear_op(
    x: Tensor,
    packed: Tensor,
    format_name: str,
    scale: Tensor | None,
    bias: Tensor | None,
    planes: list[Tensor],
) -> Tensor:
    from zimage_core.kernels.planar import Planes

    flat = x.reshape(-1, x.shape[-1])
    found = Planes(*planes) if planes else None
    out = _product(flat, packed, FORMATS[format_name], scale, bias, found)
    return out.view(*x.shape[:-1], packed.shape[0])


@_linear_op.register_fake
def _(x: Tensor, packed: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))
