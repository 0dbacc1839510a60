"""A device with a virtual clock: how long streamed steps take, by the schedule that real ones follow.

No threads and no memory: a plan of any size is simulated in milliseconds, always with the same result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from zimage_core.memory.schedule import Schedule
from zimage_core.memory.traffic import Span


@dataclass(frozen=True)
class Machine:
    """Rates of a virtual device.

    Args:
        link: Bytes a second from the ring to the device.
        read: Bytes a second from the file or memory into the ring, all threads together.
        ring: Bytes of the ring.
        chunk: Bytes that are read and copied at a time.
        ahead: The host queues work for the device and goes on, as with a GPU; False computes on the host.
    """

    link: float
    read: float
    ring: int = 128 << 20
    chunk: int = 16 << 20
    ahead: bool = True


@dataclass(frozen=True)
class Simulation:
    """What happened.

    Args:
        steps: Seconds of each, from the end of the one before it.
        transfer: Seconds that blocks were on their way.
        stall: Seconds that the computation waited.
        loads: Blocks that were moved, in order.
        most: Bytes of the slots in use, at most.
        timeline: Every transfer, wait and computation.
    """

    steps: tuple[float, ...]
    transfer: float
    stall: float
    loads: tuple[int, ...]
    most: int
    timeline: tuple[Span, ...] = field(repr=False)

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(self.steps)


def simulate(
    nbytes: Sequence[int],
    compute: Sequence[float],
    resident: Collection[int],
    slots: int,
    machine: Machine,
    steps: int = 8,
) -> Simulation:
    """Run steps through blocks of which some are streamed.

    Args:
        nbytes: Of each block.
        compute: Seconds of each block.
        resident: Indices of the blocks that are on the device.
        slots: On the device.
        machine: Rates.
        steps: How many, the first with empty slots.
    """
    return _Run(nbytes, compute, resident, slots, machine).run(steps)


class _Run:
    """Two agents, feeder and consumer, that meet in a Schedule; times are maxima of what each waits for."""

    def __init__(
        self,
        nbytes: Sequence[int],
        compute: Sequence[float],
        resident: Collection[int],
        slots: int,
        machine: Machine,
    ) -> None:
        self.nbytes, self.compute, self.machine = nbytes, compute, machine
        self.streamed = [i for i in range(len(nbytes)) if i not in set(resident) and nbytes[i]]
        self.schedule = Schedule(self.streamed, slots)
        count = self.schedule.slots
        self.freed = [(0.0, 0.0)] * count  # host, device
        self.ready = [(0.0, 0.0)] * count  # queued on the host, passed on the device
        self.feeder = self.reader = self.link = self.host = self.device = 0.0
        self.chunks: deque[float] = deque(maxlen=max(1, machine.ring // machine.chunk))
        self.spans: list[Span] = []
        self.loads: list[int] = []
        self.most = 0

    def run(self, steps: int) -> Simulation:
        ends = [0.0]
        for _ in range(steps):
            for block in range(len(self.nbytes)):
                self._visit(block)
            ends.append(self.device)
        lanes = {lane: [s.end - s.start for s in self.spans if s.lane == lane] for lane in ("copy", "stall")}
        return Simulation(
            tuple(b - a for a, b in pairwise(ends)),
            sum(lanes["copy"]),
            sum(lanes["stall"]),
            tuple(self.loads),
            self.most,
            tuple(self.spans),
        )

    def _feed(self) -> None:
        while (task := self.schedule.begin()) is not None:
            self._load(*task)
            self.schedule.complete(task[0])
            busy = [block for block in self.schedule.blocks if block is not None]
            self.most = max(self.most, sum(self.nbytes[block] for block in busy))

    def _load(self, slot: int, block: int) -> None:
        host, device = self.freed[slot]
        self.feeder = max(self.feeder, host)
        begun = None
        for first in range(0, self.nbytes[block], self.machine.chunk):
            size = min(self.machine.chunk, self.nbytes[block] - first)
            room = self.chunks[0] if len(self.chunks) == self.chunks.maxlen else 0.0
            self.reader = max(self.reader, self.feeder, room) + size / self.machine.read
            start = max(self.link, self.reader, device)
            begun = start if begun is None else begun
            self.link = start + size / self.machine.link
            self.chunks.append(self.link)
        self.feeder = self.reader
        self.ready[slot] = (self.feeder, self.link)
        self.loads.append(block)
        self.spans.append(Span("copy", block, begun or self.link, self.link))

    def _visit(self, block: int) -> None:
        slot = None
        start = max(self.device, self.host)
        if block in self.streamed:
            self.schedule.ask(block)
            self._feed()
            slot = self.schedule.take(block)
            if slot is None:
                raise RuntimeError(f"block {block} never came")
            queued, arrived = self.ready[slot]
            self.host = max(self.host, queued)
            ready = max(self.device, arrived, self.host)
            if ready > self.device:
                self.spans.append(Span("stall", block, self.device, ready))
            start = ready
        self.device = start + self.compute[block]
        self.spans.append(Span("compute", block, start, self.device))
        if not self.machine.ahead:
            self.host = self.device
        if slot is not None:
            self.schedule.release(slot)
            self.freed[slot] = (self.host, self.device)
            self._feed()
