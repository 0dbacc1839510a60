"""Multiplies packed weights on a GPU with Triton kernels, on the path that `dispatch` chooses."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zimage_core.quant import dispatch
from zimage_core.quant.dequantize import convert
from zimage_core.quant.dispatch import PLANES_MARGIN, SCRATCH_BYTES
from zimage_core.quant.tensor import QuantTensor

MOST_PATHS = 256
"""Choices that are remembered for a weight: one for each number of rows of x."""


@dataclass
class Scratch:
    """Scratch memory of a stream, and the views of it that were asked for."""

    buffer: Tensor | None = None
    views: dict[tuple[int, int, torch.dtype], Tensor] = field(default_factory=dict)


class _Local(threading.local):
    def __init__(self) -> None:
        self.scratch: dict[tuple[torch.device, int], Scratch] = {}


_local = _Local()
_runs: dict[tuple[torch.device, str | None], bool] = {}


@cache
def _kernels() -> Any:
    """The modules of kernels/, which import Triton; a statement in a function would cost 1 us each time."""
    from zimage_core.kernels import dequantize, launch, matmul, planar
    from zimage_core.kernels.decode import table

    return SimpleNamespace(dequantize=dequantize, launch=launch, matmul=matmul, planar=planar, table=table)


def kernels_run(device: torch.device) -> bool:
    """`dispatch.kernels_for`, asked once for each device."""
    key = (device, dispatch.KERNELS)
    found = _runs.get(key)
    if found is None:
        found = _runs[device, dispatch.KERNELS] = dispatch.kernels_for(device)
    return found


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
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    out: Tensor
    if _path(weight, len(flat), x.dtype) == "fused":
        own = None if bias is None else bias.contiguous()
        out = _kernels().matmul.matmul(flat, weight.planes.planes, weight.format, rows, own)
    else:
        own = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
        out = _converted(flat, weight, own) if weight.format.weights == 1 else _decoded(flat, weight, own)
    return out if x.ndim == 2 else out.view(*x.shape[:-1], rows)


def make_planes(weight: QuantTensor, tokens: int, dtype: torch.dtype, free: int | None = None) -> None:
    """Make the planes of a weight if a product with x [tokens, K] wants them and memory suffices.

    If x wants them, no later call makes any: they exist, or memory was short.

    Args:
        weight: The weight.
        tokens: Rows of x.
        dtype: Dtype of x.
        free: Bytes that planes may take; default: what is free beside `PLANES_MARGIN`.

    Raises:
        Unsupported: The mode is "fused", but weight, GPU or memory do not allow it.
    """
    cache = weight.planes
    # the kernels know no scale beside the blocks, which few files have: those weights are dequantised first
    if cache.planes is not None or cache.closed or weight.scale is not None:
        return
    mode = dispatch.mode()
    if _choose(weight, tokens, dtype, 1 << 62, mode) != "fused":
        return
    free = _room_for_planes(weight.device) if free is None else free
    if mode == "fused":
        _choose(weight, tokens, dtype, free, mode)  # raises an error that says what is missing
    if dispatch.planar_bytes(weight.format, *weight.shape) <= free:
        repack = _kernels().planar.repack
        with torch.inference_mode(False):  # the planes are used after the caller's mode ends
            cache.planes = repack(weight.packed, weight.format)
    cache.closed = True


def _path(weight: QuantTensor, tokens: int, dtype: torch.dtype) -> str:
    """The path of x [tokens, K], remembered with the weight; planes are made here if x wants them."""
    cache = weight.planes
    mode = dispatch.mode()
    found = cache.paths.get((tokens, dtype, mode, cache.planes is None, cache.closed))
    if found is None:
        make_planes(weight, tokens, dtype)
        found = _choose(weight, tokens, dtype, 0, mode if cache.planes else "dequantise")
        if len(cache.paths) >= MOST_PATHS:
            cache.paths.clear()
        cache.paths[tokens, dtype, mode, cache.planes is None, cache.closed] = found
    return found


def _choose(weight: QuantTensor, tokens: int, dtype: torch.dtype, free: int, mode: str) -> str:
    name, (rows, width) = architecture(weight.device), weight.shape
    planes, numbers = weight.planes.planes is not None, str(dtype).removeprefix("torch.")
    return dispatch.choose(weight.format.name, rows, width, tokens, name, free, mode, numbers, planes).path


def free_bytes(device: torch.device) -> int:
    """Bytes that tensors may still take on a GPU, from the driver or from what torch's allocator keeps."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _room_for_planes(device: torch.device) -> int:
    return max(0, free_bytes(device) - PLANES_MARGIN) if device.type == "cuda" else 1 << 40


def _converted(x: Tensor, weight: QuantTensor, bias: Tensor | None) -> Tensor:
    """x [M, K] -> [M, N] by a weight of plain numbers or fp8."""
    dense = convert(weight.packed, weight.format, x.dtype if weight.scale is None else torch.float32)
    if weight.scale is not None:
        dense = (dense * weight.scale.view(-1, 1)).to(x.dtype)
    return functional.linear(x, dense, bias)


def _decoded(x: Tensor, weight: QuantTensor, bias: Tensor | None) -> Tensor:
    """x [M, K] -> [M, N] by a weight of blocks, which are dequantised into scratch, slab by slab."""
    dequantize_into = _kernels().dequantize.dequantize_into
    rows, width = weight.shape
    height = min(rows, max(8, SCRATCH_BYTES // (width * x.dtype.itemsize) // 8 * 8))
    dense = scratch(x.device, height, width, x.dtype)
    scale = None if weight.scale is None else weight.scale.view(-1, 1).expand(rows, 1)
    if height == rows:
        dequantize_into(dense, words(weight), weight.format)
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


def words(weight: QuantTensor) -> Tensor:
    """The packed bytes as the kernels read them; the view is kept with the weight."""
    found: Tensor | None = weight.planes.words
    if found is None:
        with torch.inference_mode(False):  # the view is used after the caller's mode ends
            found = _kernels().table.words(weight.packed, weight.format.name)
        if found.data_ptr() == weight.packed.data_ptr():  # no copy, which later bytes would not reach
            weight.planes.words = found
    return found


def scratch(device: torch.device, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Scratch [height, width] that this thread reuses on the current stream; it grows on demand.

    Each stream has a buffer of its own. Work on one stream runs in order, so the next weight cannot overwrite
    one that a product still reads.
    """
    mine = _local.scratch.setdefault((device, _stream(device)), Scratch())
    view = mine.views.get((height, width, dtype))
    if view is None:
        nbytes = height * width * dtype.itemsize
        with torch.inference_mode(False):  # buffer and views are used after the caller's mode ends
            if mine.buffer is None or mine.buffer.numel() < nbytes:
                mine.views.clear()
                mine.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
            view = mine.views[height, width, dtype] = mine.buffer[:nbytes].view(dtype).view(height, width)
    return view


def _stream(device: torch.device) -> int:
    return _kernels().launch.current_stream(device.index) if device.type == "cuda" else 0


def hand_over_scratch(device: torch.device, stream: int) -> Scratch | None:
    """Hand this thread's scratch of a stream over to the caller, whose graph contains its address."""
    return _local.scratch.pop((device, stream), None)


def take_scratch(device: torch.device, stream: int, held: Scratch | None) -> None:
    """Use what `hand_over_scratch` gave again, for this thread's next products on the stream."""
    if held is not None:
        _local.scratch[device, stream] = held


def reserve_scratch(device: torch.device, nbytes: int) -> None:
    """Let this thread's scratch of the current stream have at least so many bytes from now on."""
    scratch(device, 1, nbytes, torch.uint8)


def scratch_bytes(weight: QuantTensor, dtype: torch.dtype) -> int:
    """Bytes of scratch that a product with a packed weight takes, for x of a dtype."""
    if weight.format.weights == 1:
        return 0  # converted into memory of its own
    return min(SCRATCH_BYTES, weight.shape[0] * weight.shape[-1] * dtype.itemsize)


def release_scratch(device: torch.device) -> None:
    """Drop this thread's scratch of a device, on all streams; the next product makes it anew.

    Without a number, "cuda" means all GPUs.
    """
    for place, stream in list(_local.scratch):
        if place.type == device.type and device.index in (None, place.index):
            del _local.scratch[place, stream]
