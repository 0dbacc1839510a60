"""What streaming needs of a device: memory, a queue of copies beside that of the computation, and events."""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from zimage_core.errors import BadArgument, Unsupported

Queue = Literal["copy", "compute"]
"""Work of one queue is done in order; the two run beside each other."""
Event = Any
"""A point in a queue, passed when all work queued before it is done."""
CHUNK = 16 << 20
"""Bytes that are read and copied at a time, at most: 0.7 ms on PCIe 4 x16."""
CHUNKS = 8
"""Parts of the ring: one is read into while others are copied from."""
ALIGN = 256
"""Bytes; matrices and chunks begin at multiples of it, as the allocator of a GPU would have it."""


class Device:
    """The CPU: copies are done when they are queued, by the thread that queues them.

    Args:
        staged: Send every byte through a ring, as a GPU's go: for tests.
    """

    def __init__(self, staged: bool = False) -> None:
        self.device = torch.device("cpu")
        self.staged = staged

    def memory(self, nbytes: int) -> Tensor:
        """Uninitialised bytes on the device, uint8 [nbytes]; call `settle` before they are freed."""
        with torch.inference_mode(False):  # written by other threads, read in later runs
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def host_memory(self, nbytes: int) -> Tensor:
        """Uninitialised bytes on the host that copies can be queued from, uint8 [nbytes]."""
        return self.memory(nbytes)

    def free_host_memory(self) -> None:
        """Let go of what `host_memory` gave last."""

    def copy(self, host: Tensor, target: Tensor) -> None:
        """Queue a copy of bytes to the device."""
        target.numpy()[:] = host.numpy()  # in this thread alone, without the interpreter lock

    def record(self, queue: Queue) -> Event:
        """The end of what is in a queue now; of "compute", that of the calling thread."""
        return time.perf_counter()

    def order(self, queue: Queue, event: Event) -> None:
        """Work that is queued from now on begins when `event` is passed; the calling thread goes on."""

    def wait(self, event: Event) -> None:
        """Block the calling thread until `event` is passed."""

    def settle(self) -> None:
        """Block the calling thread until no copy is on its way, before memory that they write into is freed.

        `Tensor.record_stream` would do the same, but ends the process where the GPU has failed.
        """
        self.wait(self.record("copy"))

    def seconds(self, event: Event) -> float:
        """When an event was passed, on the clock of time.perf_counter."""
        return float(event)


class CudaDevice(Device):
    """A CUDA GPU: pinned host memory, one stream for copies, timed events.

    Args:
        device: A CUDA device; "cuda" is the current one.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(staged=True)
        self.device = torch.empty(0, device=device).device  # with its number
        self._pinned = torch.empty(0)
        self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._start = self.record("copy")
        self.wait(self._start)
        self._zero = time.perf_counter()

    def host_memory(self, nbytes: int) -> Tensor:
        """Pinned memory; torch rounds it up to a power of two and keeps it for the next ring."""
        with torch.inference_mode(False):
            self._pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        return self._pinned

    def free_host_memory(self) -> None:
        """Forget the memory of the latest ring."""
        self._pinned = torch.empty(0)

    def settle(self) -> None:
        """Wait; a GPU that fails copies no more."""
        try:
            super().settle()
        except RuntimeError:
            # torch would end the process where pinned memory of a GPU that failed is freed
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._pinned))

    def copy(self, host: Tensor, target: Tensor) -> None:
        """Queue a copy; returns before it is done."""
        with torch.cuda.stream(self._copies):
            target.copy_(host, non_blocking=True)

    def record(self, queue: Queue) -> Event:
        """An event.

        Raises:
            Unsupported: The computation is being recorded as a graph, whose replays no stream could feed.
        """
        with torch.cuda.device(self.device):
            if queue == "compute" and torch.cuda.is_current_stream_capturing():
                raise Unsupported("streamed weights cannot be captured in a CUDA graph; keep them resident")
            # a thread that waits for it sleeps, it would else keep a core busy
            event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
            event.record(self._queue(queue))
        return event

    def order(self, queue: Queue, event: Event) -> None:
        """The GPU waits, the calling thread goes on."""
        self._queue(queue).wait_event(event)

    def wait(self, event: Event) -> None:
        """Block the calling thread; the interpreter lock is released meanwhile."""
        event.synchronize()

    def seconds(self, event: Event) -> float:
        """By the GPU's clock, set to the host's when this object was made."""
        return self._zero + float(self._start.elapsed_time(event)) / 1e3

    def _queue(self, queue: Queue) -> Any:
        return self._copies if queue == "copy" else torch.cuda.current_stream(self.device)


def device_for(device: torch.device | str) -> Device:
    """What copies to a device.

    Raises:
        Unsupported: Nothing is streamed to devices of that kind.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise Unsupported(f"weights cannot be streamed to {device}; to cuda and cpu they can")
    return Device() if device.type == "cpu" else CudaDevice(device)


class Ring:
    """Host memory that bytes pass through on their way to a device, chunk by chunk.

    The CPU needs none: bytes are read to where they are wanted.

    Args:
        device: Where the bytes go.
        nbytes: Size of the ring, rounded down to a power of two.

    Raises:
        BadArgument: nbytes is not positive.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        if nbytes < 1:
            raise BadArgument(f"stream: ring={nbytes}, wanted 1 byte or more")
        self.device = device
        self._nbytes = max(1 << (nbytes.bit_length() - 1), CHUNKS * ALIGN)
        self._chunk = min(CHUNK, self._nbytes // CHUNKS)
        self._chunks: deque[tuple[Tensor, Event]] = (
            deque()
        )  # those not in use, with the end of the copy from it
        self._made = False
        self._changed = threading.Condition()

    def fill(self, target: Tensor, read: Callable[[int, Tensor], None]) -> None:
        """Read bytes and queue their copies; on return those into device memory may still be on their way.

        Several threads may call it at a time.

        Args:
            target: uint8 [n] on the device.
            read: Called with the first byte wanted and host memory for as many as are wanted.
        """
        if not self.device.staged:
            for first in range(0, len(target), CHUNK):
                read(first, target[first : first + CHUNK])
            return
        for first in range(0, len(target), self._chunk):
            part, host = target[first : first + self._chunk], self._take()
            copied: Event = None
            try:
                read(first, host[: len(part)])
                self.device.copy(host[: len(part)], part)
            finally:  # even if the copy failed, a part of it may be on its way
                try:
                    copied = self.device.record("copy")
                finally:
                    with self._changed:
                        self._chunks.append((host, copied))
                        self._changed.notify()

    def _take(self) -> Tensor:
        """A chunk that no copy reads any more."""
        with self._changed:
            if not self._made:
                memory = self.device.host_memory(self._nbytes)
                self._chunks.extend((chunk, None) for chunk in torch.split(memory, self._chunk))
                self._made = True
            self._changed.wait_for(lambda: bool(self._chunks))
            chunk, copied = self._chunks.popleft()
        if copied is not None:
            self.device.wait(copied)
        return chunk

    def free(self) -> None:
        """Let the memory go; the next bytes take new memory. No thread may be filling."""
        with self._changed:
            self._chunks.clear()
            self._made = False
            self.device.free_host_memory()
