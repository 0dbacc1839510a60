"""Scratch memory of one thread, which is reused.

Allocating megabytes for each of ten operations on each tile costs more than the arithmetic, because the pages
are not in the cache or have to be mapped again. A workspace hands out parts of one buffer instead.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_ALIGN = 64


class Workspace:
    """A bump allocator over one byte buffer; a tensor that it hands out is valid until it is released.

    The buffer grows on demand. A tensor that was handed out keeps its own storage alive, so growing in the
    middle of a tile is safe.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Size of the buffer in bytes."""
        return self._buffer.numel()

    @property
    def mark(self) -> int:
        """Number of bytes handed out, for `release`."""
        return self._used

    def release(self, mark: int = 0) -> None:
        """Take back everything that was handed out since `mark()` returned this number."""
        self._used = mark

    def take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """An uninitialised contiguous tensor, aligned to 64 bytes."""
        nbytes = math.prod(shape) * dtype.itemsize
        start, end = self._used, self._used + nbytes
        if end > self._buffer.numel():
            with torch.inference_mode(False):  # the buffer outlives the caller's mode and must stay writable
                self._buffer = torch.empty(max(2 * end, 1 << 16), dtype=torch.uint8, device=self.device)
        self._used = -(-end // _ALIGN) * _ALIGN
        return self._buffer[start:end].view(dtype).view(shape)


class _Local(threading.local):
    def __init__(self) -> None:
        self.by_use: dict[tuple[str, torch.device], Workspace] = {}


_local = _Local()


def workspace(use: str, device: torch.device) -> Workspace:
    """This thread's workspace for one use ("tile", "slab"); threads never share one."""
    found = _local.by_use.get((use, device))
    if found is None:
        found = _local.by_use[(use, device)] = Workspace(device)
    return found
