"""Keeps what the driver of a GPU gives to this library within a budget.

torch's caching allocator asks the driver for a segment whenever no free block is large enough, and keeps the
segment afterwards. With sizes that change from layer to layer, a run collects more than twice the memory that
it uses. Here each phase takes one segment for all its temporary tensors, which the allocator divides among
them, and gives it back at its end. Meanwhile the allocator may not ask for more than the budget.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from zimage_core.quant.gpu import free_bytes


@dataclass
class _Limit:
    """The limit of a device while phases run there.

    Args:
        before: Fraction of the device's memory that torch was allowed.
        allowed: Bytes that it is allowed now.
        phases: How many run, each in a thread of its own.
    """

    before: float
    allowed: int
    phases: int = 0


_limits: dict[torch.device, _Limit] = {}
_lock = threading.Lock()


class Segments:
    """Segments of one device; on a CPU, which has no such allocator, nothing is done.

    Args:
        device: Where the computation runs, with its number.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._on_gpu = device, device.type == "cuda"
        self._workspace = 0  # bytes of it that this object asked for first

    @property
    def reserved(self) -> int:
        """Bytes that torch's allocator holds of the device."""
        return torch.cuda.memory_reserved(self.device) if self._on_gpu else 0

    def free(self) -> int:
        """Bytes of a GPU that tensors may still take, within the part of it that the program allows torch."""
        total = torch.cuda.get_device_properties(self.device).total_memory
        with _lock:
            most = int(self._fraction() * total)
        return min(free_bytes(self.device), most - torch.cuda.memory_allocated(self.device))

    def give_back(self) -> None:
        """Return the segments in which no tensor lies to the driver."""
        if self._on_gpu:
            torch.cuda.empty_cache()

    @contextmanager
    def limit(self, nbytes: int | None, held: int) -> Iterator[None]:
        """Inside, torch's allocator takes at most so much from the driver, beside what others hold by now.

        torch has one limit for the process. Phases of several pipelines add up; what other threads of the
        program ask for meanwhile competes with them.

        Args:
            nbytes: Bytes for this object's pipeline; None for no limit.
            held: Bytes of them that it holds already.
        """
        if nbytes is None or not self._on_gpu:
            yield
            return
        self.give_back()
        own = held + self._workspace
        with _lock:
            found = _limits.get(self.device)
            if found is None:
                allowed = max(0, self.reserved - own) + own
                found = _limits[self.device] = _Limit(self._fraction(), allowed)
            self._allow(found, nbytes - own, 1)
        try:
            yield
        finally:
            with _lock:
                self._allow(found, own - nbytes, -1)
            self.give_back()

    def take_workspace(self, dtype: torch.dtype) -> int | None:
        """Let the library of products take its workspace, which it keeps, outside of our segments.

        Args:
            dtype: Dtype of the products.

        Returns:
            Bytes that the driver gave for it; None on a CPU, or if it was there before.
        """
        if not self._on_gpu:
            return None
        self.give_back()
        before = self.reserved
        x = torch.zeros(16, 16, dtype=dtype, device=self.device)
        torch.nn.functional.linear(x, x, x[0])
        torch.mm(x, x)
        del x
        self.give_back()
        self._workspace += max(0, self.reserved - before)
        return self._workspace or None

    def reserve(self, nbytes: int) -> None:
        """Take one segment from the driver, which the allocator divides among the tensors to come.

        Args:
            nbytes: Bytes of those tensors that are alive at once, gaps between them included.

        Raises:
            torch.OutOfMemoryError: The device, or the limit, has not so much left.
        """
        if self._on_gpu and nbytes:
            # freed at once; the allocator keeps the segment
            torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _fraction(self) -> float:
        """Fraction of the device's memory that torch is allowed outside of phases; _lock is held."""
        if (found := _limits.get(self.device)) is not None:
            return found.before
        told = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # older torch lacks it
        # without a limit, torch's backend cudaMallocAsync tells a number that it does not take back
        return 1.0 if told is None else min(1.0, told(self.device))

    def _allow(self, limit: _Limit, nbytes: int, phases: int) -> None:
        """Change the limit of the device by so many bytes and phases."""
        limit.allowed += nbytes
        limit.phases += phases
        fraction = limit.before
        if limit.phases:
            total = torch.cuda.get_device_properties(self.device).total_memory
            fraction = min(limit.before, limit.allowed / total)
        else:
            del _limits[self.device]
        torch.cuda.set_per_process_memory_fraction(fraction, self.device)
