"""Errors of a GPU in one sentence: too little memory, or a driver that fails."""

from __future__ import annotations

import torch

from zimage_core.errors import DeviceFault, OutOfMemory, ZImageError, printable
from zimage_core.files.units import in_bytes

SIGNS = (
    "CUDA error",
    "CUDA driver error",
    "Triton Error",
    "CUBLAS_STATUS",
    "cuDNN error",
    "CUDNN_STATUS",
    "HIP error",
    "hipError",
)
"""How messages of torch and Triton on a failing driver or library begin, or what they contain."""
NO_MEMORY = ("out of memory", "ALLOC_FAILED", "hipErrorOutOfMemory")
"""What such a message contains where the driver or a library, and not torch's allocator, found no memory."""


def explained(error: RuntimeError, device: torch.device, limited: bool) -> ZImageError:
    """The error to raise instead of one of torch.

    Args:
        error: What torch or Triton raised.
        device: Where the run computed.
        limited: Whether the run had a memory budget.

    Raises:
        RuntimeError: The error itself, if it is of another kind.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfMemory(_no_memory(device, limited))
    text = printable(str(error).partition("\n")[0])
    if not any(sign in text for sign in SIGNS):
        raise error
    if any(sign in text for sign in NO_MEMORY):
        return OutOfMemory(_no_memory(device, limited))
    return DeviceFault(
        f"{device}: the GPU or its driver failed ({text}); such an error often lasts until the process ends: "
        "run the image in a new one; if it comes again, look at the driver's log (dmesg)"
    )


def _no_memory(device: torch.device, limited: bool) -> str:
    """What was free, and what to do."""
    found = "its memory is full"
    try:
        free, total = torch.cuda.mem_get_info(device)
        mine = torch.cuda.memory_reserved(device)
        found = (
            f"of {in_bytes(total)} this process holds {in_bytes(mine)} and others "
            f"{in_bytes(max(0, total - free - mine))}, {in_bytes(free)} are free"
        )
    except (RuntimeError, ValueError):  # a driver that cannot even say that, or a network on another device
        pass
    advice = (
        "end programs that use this GPU, or give a smaller vram= or 'auto'; if much is free, a larger one"
        if limited
        else "end programs that use this GPU, or open the pipeline with vram='auto', which moves weights "
        "to the GPU as they are needed"
    )
    return f"{device}: no memory for this run: {found}; {advice}"
