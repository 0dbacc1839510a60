"""What a stream moved and what it cost: counted while it runs, summed up and drawn when asked."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape

from zimage_core.files.units import in_bytes, in_seconds
from zimage_core.memory.device import Device, Event

KEPT = 20_000
"""Spans of the timeline; the oldest go first. An image of 8 steps with 32 streamed blocks has about 1,000."""
RECENT = 1_000
"""Spans whose ends may lie in the future of the device; the device has long passed the ones before."""
LANES = {"read": "#9db8d9", "copy": "#3b6ea8", "stall": "#d1495b", "compute": "#6aa56a"}
"""Lane of a timeline -> colour, from top to bottom."""
WIDTH, ROW, LEFT = 1200, 26, 80
"""Pixels of the drawing, of a lane, of its name."""


@dataclass(frozen=True)
class Span:
    """Something that took time.

    Args:
        lane: "read" (from the file or memory), "copy" (from its first byte read to its last one on the
            device), "stall" (the computation waits), "compute".
        block: Index in the model's `blocks`.
        start: Seconds on the clock of time.perf_counter.
        end: Seconds on that clock.
    """

    lane: str
    block: int
    start: float
    end: float


@dataclass(frozen=True)
class Traffic:
    """What a stream did since its start, or since it was cleared.

    Args:
        bytes_moved: Weights of streamed blocks that reached the device, also in vain; not those that stay,
            nor the context refiner's, which visit it for each caption.
        loads: Blocks that were loaded.
        transfer_seconds: While a block was on its way.
        stall_seconds: While the computation waited for one.
        step_stalls: Seconds of each pass through the blocks; the last one may not be over yet.
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

    def __init__(self, device: Device) -> None:
        self._device, self._lock = device, threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        with self._lock:
            self._open: deque[tuple[str, int, Event, Event, bool]] = deque()
            self._spans: deque[Span] = deque(maxlen=KEPT)
            self._moved = self._loads = 0
            self._transfer = self._stall = 0.0
            self._stalls: deque[float] = deque(maxlen=KEPT)

    def moved(self, block: int, nbytes: int, start: float, end: float) -> None:
        """A block of so many bytes was read, in seconds of the host's clock."""
        with self._lock:
            self._moved += nbytes
            self._spans.append(Span("read", block, start, end))

    def add(self, lane: str, block: int, start: Event, end: Event, new_pass: bool = False) -> None:
        """A span between two events of one queue, perhaps the first of a new pass through the blocks."""
        with self._lock:
            self._open.append((lane, block, start, end, new_pass))
            if len(self._open) > RECENT:
                self._settle()

    def traffic(self) -> Traffic:
        """Everything so far; waits until the device has passed what was queued."""
        with self._lock:
            while self._open:
                self._settle()
            spans = tuple(sorted(self._spans, key=lambda span: span.end))
            return Traffic(self._moved, self._loads, self._transfer, self._stall, tuple(self._stalls), spans)

    def _settle(self) -> None:
        lane, block, begun, ended, new_pass = self._open.popleft()
        self._device.wait(ended)
        # a wait that a thread began and a device ended may be shorter than the clocks agree
        start = self._device.seconds(begun)
        end = max(start, self._device.seconds(ended))
        self._spans.append(Span(lane, block, start, end))
        if lane == "copy":
            self._loads += 1
            self._transfer += end - start
        if lane == "stall":
            self._stall += end - start
            if new_pass or not self._stalls:
                self._stalls.append(0.0)
            self._stalls[-1] += end - start


def summary(name: str, traffic: Traffic) -> str:
    """One line on a network: bytes, rate, what of it was hidden."""
    return (
        f"{name.replace('_', ' ')}: {in_bytes(traffic.bytes_moved)} streamed at {in_bytes(traffic.rate)}/s, "
        f"{traffic.overlap:.0%} behind the computation, waited {in_seconds(traffic.stall_seconds)}"
    )


def page(traffic: Mapping[str, Traffic], reasons: tuple[str, ...] = ()) -> str:
    """A page of HTML that needs nothing else, with a drawing for each network; time goes to the right.

    Args:
        traffic: Network -> what was moved of it.
        reasons: Sentences of the plan, printed below.
    """
    drawings = "".join(_drawing(name, each) for name, each in traffic.items() if each.timeline)
    body = drawings or "<p>Nothing was streamed: all weights were on the device.</p>"
    notes = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>streamed weights</title>'
        "<style>body{font:14px sans-serif;margin:2em}svg{border:1px solid #ccc}</style>"
        f"{body}<ul>{notes}</ul></html>\n"
    )


def _drawing(name: str, traffic: Traffic) -> str:
    """A heading and a drawing with a lane each for reading, copying, waiting and computing."""
    start, end = min(s.start for s in traffic.timeline), max(s.end for s in traffic.timeline)
    length = max(end - start, 1e-9)
    drawn, top = [], {lane: ROW * i for i, lane in enumerate(LANES)}
    for lane, y in top.items():
        drawn.append(f'<text x="4" y="{y + 18}">{lane}</text>')
    for span in traffic.timeline:
        seconds = span.end - span.start
        drawn.append(
            f'<rect x="{LEFT + WIDTH * (span.start - start) / length:.1f}" y="{top[span.lane] + 4}" '
            f'width="{max(0.5, WIDTH * seconds / length):.1f}" height="{ROW - 8}" fill="{LANES[span.lane]}">'
            f"<title>{span.lane} of block {span.block}: {1000 * seconds:.1f} ms</title></rect>"
        )
    bottom, right = ROW * len(LANES) + 15, WIDTH + LEFT
    return (
        f"<h2>{escape(summary(name, traffic))}</h2>"
        f'<svg width="{right}" height="{bottom + 5}" font-size="12">{"".join(drawn)}'
        f'<text x="{LEFT}" y="{bottom}">0 s</text>'
        f'<text x="{right}" y="{bottom}" text-anchor="end">{length:.2f} s</text></svg>'
    )
