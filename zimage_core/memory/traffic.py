"""What a stream moved and what it cost: counted while it runs, summed up when asked."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

from zimage_core.memory.device import Backend, Mark

KEPT = 20_000
"""Spans of the timeline; the oldest go first. An image of 8 steps with 32 streamed blocks has about 1,000."""


@dataclass(frozen=True)
class Span:
    """Something that took time.

    Args:
        lane: "read" (from the file or memory into the ring), "copy" (from its first byte read to its last one
            on the device), "stall" (the computation waits), "compute".
        block: Index in the model's `blocks`.
        start: Seconds on the clock of the backend.
        end: Likewise.
    """

    lane: str
    block: int
    start: float
    end: float


@dataclass(frozen=True)
class Traffic:
    """Of a stream since its start, or since it was cleared.

    Args:
        bytes_moved: Weights of streamed blocks that reached the device, broken loads included; not those that
            stay, nor the context refiner's, which visit it for each caption.
        loads: Blocks.
        transfer_seconds: While a block was on its way.
        stall_seconds: While the computation waited for one.
        step_stalls: Of each pass through the blocks, seconds; the last one may not be over yet.
        timeline: In the order of their ends, a bounded number.
    """

    bytes_moved: int = 0
    loads: int = 0
    transfer_seconds: float = 0.0
    stall_seconds: float = 0.0
    step_stalls: tuple[float, ...] = ()
    timeline: tuple[Span, ...] = field(default=(), repr=False)

    @property
    def overlap(self) -> float:
        """Part of the transfer that the computation hid: 1 - stall / transfer, 1 where nothing moved."""
        if self.transfer_seconds <= 0:
            return 1.0
        return max(0.0, 1 - self.stall_seconds / self.transfer_seconds)

    @property
    def rate(self) -> float:
        """Bytes a second while a block was on its way; 0 where nothing moved."""
        return self.bytes_moved / self.transfer_seconds if self.transfer_seconds > 0 else 0.0


class Meter:
    """Collects spans whose ends may lie in the future of the device."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        with self._lock:
            self._open: deque[tuple[str, int, Mark, Mark, int]] = deque()
            self._spans: deque[Span] = deque(maxlen=KEPT)
            self._moved = self._loads = self._passes = self._counted = 0
            self._seconds = {"copy": 0.0, "stall": 0.0}
            self._stalls: deque[float] = deque(maxlen=KEPT)

    def count(self, nbytes: int) -> None:
        """Weights that were moved."""
        with self._lock:
            self._moved += nbytes

    def add(self, lane: str, block: int, start: Mark, end: Mark, first: bool = False) -> None:
        """A span between two marks of one lane; `first` of a new pass through the blocks."""
        with self._lock:
            self._passes += first
            self._open.append((lane, block, start, end, self._passes))
            while self._open and self._backend.passed(self._open[0][3]):
                self._fold()

    def add_host(self, lane: str, block: int, start: float, end: float) -> None:
        """A span of the host's clock that is over."""
        with self._lock:
            self._spans.append(Span(lane, block, start, end))

    def traffic(self) -> Traffic:
        """So far; waits until the device has passed what was queued."""
        with self._lock:
            while self._open:
                self._backend.wait(self._open[0][3])
                self._fold()
            stalls = tuple(self._stalls)
            spans = tuple(sorted(self._spans, key=lambda span: span.end))
            seconds = self._seconds
            return Traffic(self._moved, self._loads, seconds["copy"], seconds["stall"], stalls, spans)

    def _fold(self) -> None:
        lane, block, begun, ended, step = self._open.popleft()
        # a wait that a thread began and a device ended may be shorter than the clocks agree
        start = self._backend.seconds(begun)
        end = max(start, self._backend.seconds(ended))
        self._spans.append(Span(lane, block, start, end))
        if lane in self._seconds:
            self._seconds[lane] += end - start
        if lane == "copy":
            self._loads += 1
        if lane == "stall":
            if not self._stalls or step > self._counted:
                self._counted = step
                self._stalls.append(0.0)
            self._stalls[-1] += end - start
