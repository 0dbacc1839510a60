"""What a stream needs of a device: memory, a lane for copies beside that of the computation, and events."""

from __future__ import annotations

import time
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from zimage_core.errors import BadArgument, Unsupported

Lane = Literal["copy", "compute"]
"""Work of one lane is done in order; the two run beside each other."""

Mark = Any
"""A point in a lane, passed when all work queued before it is done."""


class Backend(Protocol):
    """A device as a stream sees it. Every method may be called from any thread.

    Attributes:
        device: Where the slots are.
        direct: The host can write into a slot; no ring and no copy is needed.
    """

    device: torch.device
    direct: bool

    def slot(self, nbytes: int) -> Tensor:
        """Uninitialised bytes on the device, uint8 [nbytes]."""

    def ring(self, nbytes: int) -> Tensor:
        """Uninitialised bytes on the host that copies can be queued from, uint8 [nbytes]."""

    def copy(self, host: Tensor, slot: Tensor) -> None:
        """Queue a copy of bytes in the copy lane."""

    def mark(self, lane: Lane) -> Mark:
        """The end of what is queued in a lane now; of "compute", that of the calling thread."""

    def after(self, lane: Lane, mark: Mark) -> None:
        """What is queued in a lane from now on begins when `mark` is passed."""

    def wait(self, mark: Mark) -> None:
        """Block the calling thread until `mark` is passed."""

    def passed(self, mark: Mark) -> bool:
        """True when `wait` would return at once."""

    def seconds(self, mark: Mark) -> float:
        """When a mark was passed, in seconds on the clock of `now`."""

    def now(self) -> float:
        """Seconds of the host's clock, from an arbitrary beginning."""

    def close(self) -> None:
        """Wait for the copy lane."""


class HostBackend:
    """The CPU: copies are done when they are queued, by the thread that queues them.

    Args:
        direct: False sends every byte through a ring, as a GPU's would go: for tests.
    """

    def __init__(self, direct: bool = True) -> None:
        self.device = torch.device("cpu")
        self.direct = direct
        self.allocated = 0
        """Bytes handed out so far."""

    def slot(self, nbytes: int) -> Tensor:
        """See Backend, like the rest."""
        self.allocated += nbytes
        with torch.inference_mode(False):  # written by other threads, read in later runs
            return torch.empty(nbytes, dtype=torch.uint8)

    ring = slot

    def copy(self, host: Tensor, slot: Tensor) -> None:
        """At once."""
        slot.numpy()[:] = host.numpy()  # in this thread alone, without the interpreter lock

    def mark(self, lane: Lane) -> Mark:
        """The time."""
        return time.perf_counter()

    def after(self, lane: Lane, mark: Mark) -> None:
        """Passed already."""

    def wait(self, mark: Mark) -> None:
        """Passed already."""

    def passed(self, mark: Mark) -> bool:
        """Always."""
        return True

    def seconds(self, mark: Mark) -> float:
        """The mark itself."""
        return float(mark)

    def now(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def close(self) -> None:
        """Nothing is queued."""


class CudaBackend:
    """A CUDA GPU: pinned host memory, one stream for copies, timed events.

    Args:
        device: A CUDA device; "cuda" is the current one.

    Raises:
        BadArgument: It is no CUDA device.
    """

    direct = False

    def __init__(self, device: torch.device | str) -> None:
        device = torch.device(device)
        if device.type != "cuda":
            raise BadArgument(f"stream: {device} is no CUDA device; use HostBackend for the CPU")
        self.device = torch.empty(0, device=device).device  # with its number
        self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._start = self.mark("copy")
        self.wait(self._start)
        self._zero = time.perf_counter()

    def slot(self, nbytes: int) -> Tensor:
        """See Backend, like the rest."""
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def ring(self, nbytes: int) -> Tensor:
        """Pinned; torch rounds it up to a power of two and keeps it for the next stream."""
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, host: Tensor, slot: Tensor) -> None:
        """Returns before it is done."""
        with torch.cuda.stream(self._copies):
            slot.copy_(host, non_blocking=True)

    def mark(self, lane: Lane) -> Mark:
        """An event.

        Raises:
            Unsupported: The computation is being recorded as a graph, whose replays no stream could feed.
        """
        with torch.cuda.device(self.device):
            if lane == "compute" and torch.cuda.is_current_stream_capturing():
                raise Unsupported("streamed weights cannot be captured in a CUDA graph; keep them resident")
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(self._queue(lane))
        return event

    def after(self, lane: Lane, mark: Mark) -> None:
        """On the device; the calling thread goes on."""
        self._queue(lane).wait_event(mark)

    def wait(self, mark: Mark) -> None:
        """Releases the interpreter lock meanwhile."""
        mark.synchronize()

    def passed(self, mark: Mark) -> bool:
        """Asks the driver."""
        return bool(mark.query())

    def seconds(self, mark: Mark) -> float:
        """By the GPU's clock, set to the host's when the backend was made."""
        return self._zero + float(self._start.elapsed_time(mark)) / 1e3

    def now(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def close(self) -> None:
        """Waits."""
        self._copies.synchronize()

    def _queue(self, lane: Lane) -> Any:
        return self._copies if lane == "copy" else torch.cuda.current_stream(self.device)


def backend_for(device: torch.device | str) -> Backend:
    """The backend of a device.

    Raises:
        Unsupported: Nothing is streamed to devices of that kind.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return HostBackend()
    if device.type == "cuda":
        return CudaBackend(device)
    raise Unsupported(f"weights cannot be streamed to {device}; to cuda and cpu they can")
