"""Multiplies packed weights on a GPU with Triton kernels, on the path that `dispatch` chooses."""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.nn import functional

from zimage_core.quant import dispatch
from zimage_core.quant.dequantize import convert
from zimage_core.quant.dispatch import PLANES_MARGIN, SCRATCH_BYTES
from zimage_core.quant.tensor import QuantTensor


class _Local(threading.local):
    def __init__(self) -> None:
        self.scratch: dict[tuple[torch.device, int], Tensor] = {}


_local = _Local()


def architecture(device: torch.device) -> str:
    """Name of a device in `dispatch`: sm_90, gfx942, cpu.

    A CPU that runs kernels in Triton's interpreter counts as sm_90.
    """
    if device.type == "cuda":
        from zimage_core.kernels.tiles import architecture as of_gpu

        return of_gpu(device)[0]
    return "sm_90" if dispatch.kernels_for(device) else "cpu"


def linear(x: Tensor, weight: QuantTensor, bias: Tensor | None) -> Tensor:
    """x @ W^T + bias for a packed W, in x's dtype with float32 sums.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        weight: [N, K] on x's device; its planes are made here if x is the first input that needs them.
        bias: [N] or None.

    Returns:
        [..., N].
    """
    rows = weight.shape[0]
    if not rows:
        return x.new_empty(*x.shape[:-1], 0)
    flat = x.reshape(-1, x.shape[-1])
    # the kernels know no scale beside the blocks, which few files have: those weights are dequantised first
    if weight.planes.planes is None and not weight.planes.closed and weight.scale is None:
        _make_planes(flat, weight)
    return _product(flat, weight, bias).view(*x.shape[:-1], rows)


def _choose(x: Tensor, weight: QuantTensor, free: int, planes: bool, mode: str) -> dispatch.Choice:
    name, dtype = architecture(x.device), str(x.dtype).removeprefix("torch.")
    rows, width = weight.shape
    return dispatch.choose(weight.format.name, rows, width, len(x), name, free, mode, dtype, planes)


def make_planes(weight: QuantTensor, tokens: int, dtype: torch.dtype) -> None:
    """Make the planes of a weight ahead of products with so many rows of x, if those would use them."""
    if weight.scale is None and weight.planes.planes is None and not weight.planes.closed:
        name = architecture(weight.device)
        choice = dispatch.choose(
            weight.format.name,
            *weight.shape,
            tokens,
            name,
            1 << 62,
            dispatch.mode(),
            str(dtype).removeprefix("torch."),
            False,
        )
        if choice.path == "fused":
            from zimage_core.kernels.planar import repack

            weight.planes.planes = repack(weight.packed, weight.format)
            weight.planes.closed = True


def _make_planes(x: Tensor, weight: QuantTensor) -> None:
    """Make the planes of a weight if x is the first input that needs them and memory suffices."""
    if _choose(x, weight, 1 << 62, False, dispatch.mode()).path != "fused":
        return
    free = _free_bytes(x.device)
    if dispatch.mode() == "fused":
        _choose(x, weight, free, False, "fused")  # raises an error that says what is missing
    if dispatch.planar_bytes(weight.format, *weight.shape) <= free:
        from zimage_core.kernels.planar import repack

        with torch.inference_mode(False):  # the planes are used after the caller's mode ends
            weight.planes.planes = repack(weight.packed, weight.format)
    weight.planes.closed = True


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 40
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, free + unused - PLANES_MARGIN)


def _product(x: Tensor, weight: QuantTensor, bias: Tensor | None) -> Tensor:
    """x [M, K] -> [M, N] on the path that `dispatch` chooses."""
    fmt, planes = weight.format, weight.planes.planes
    choice = _choose(x, weight, 0, bool(planes), dispatch.mode() if planes else "dequantise")
    if choice.path == "fused":
        from zimage_core.kernels.matmul import matmul

        return matmul(x, planes, fmt, weight.shape[0], None if bias is None else bias.contiguous())
    own = None if bias is None else bias.to(x.dtype)
    if fmt.weights == 1:
        dense = convert(weight.packed, fmt, x.dtype if weight.scale is None else torch.float32)
        if weight.scale is not None:
            dense = (dense * weight.scale.view(-1, 1)).to(x.dtype)
        return functional.linear(x, dense, own)
    return _through_scratch(x, weight, own)


def _through_scratch(x: Tensor, weight: QuantTensor, bias: Tensor | None) -> Tensor:
    from zimage_core.kernels.dequantize import dequantize_into

    rows, width = weight.shape
    height = min(rows, max(8, SCRATCH_BYTES // (width * x.dtype.itemsize) // 8 * 8))
    dense = _scratch(x.device, height * width * x.dtype.itemsize).view(x.dtype).view(height, width)
    scale = None if weight.scale is None else weight.scale.view(-1, 1).expand(rows, 1)
    if height == rows:
        dequantize_into(dense, weight.packed, weight.format)
        return functional.linear(x, dense if scale is None else dense.mul_(scale), bias)
    out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        slab = dense[: stop - start]
        dequantize_into(slab, weight.packed[start:stop], weight.format)
        if scale is not None:
            slab.mul_(scale[start:stop])
        out[:, start:stop] = functional.linear(x, slab, None if bias is None else bias[start:stop])
    return out


def _scratch(device: torch.device, nbytes: int) -> Tensor:
    """Scratch memory that this thread reuses on the current stream; it grows on demand.

    Each stream has a buffer of its own. Work on one stream runs in order, so the next weight cannot overwrite
    one that a product still reads.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _local.scratch.get((device, stream))
    if found is None or found.numel() < nbytes:
        with torch.inference_mode(False):  # the buffer is used after the caller's mode ends
            found = _local.scratch[device, stream] = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return found[:nbytes]


def take_scratch(device: torch.device, nbytes: int) -> None:
    """Let this thread's scratch of the current stream have so many bytes from now on."""
    _scratch(device, nbytes)


def scratch_bytes(weight: QuantTensor, dtype: torch.dtype) -> int:
    """Bytes of scratch that a product with a packed weight takes, for x of a dtype."""
    if weight.format.weights == 1:
        return 0  # converted into memory of its own
    return min(SCRATCH_BYTES, weight.shape[0] * weight.shape[-1] * dtype.itemsize)


def release_scratch(device: torch.device) -> None:
    """Drop this thread's scratch of a device; the next product takes new memory."""
    for key in [key for key in _local.scratch if key[0] == device]:
        del _local.scratch[key]


def hand_over_scratch(device: torch.device, stream: int) -> Tensor | None:
    """Hand this thread's scratch of a stream over to the caller, whose graph contains its address."""
    return _local.scratch.pop((device, stream), None)
