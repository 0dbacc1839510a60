"""The threads of a stream: one that follows the schedule, and readers that fill the ring for it.

They know nothing of the `Stream` in front of them, so that it can be collected while they run.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from queue import SimpleQueue

import torch
from torch import Tensor

from zimage_core.memory.blocks import ALIGN, Block
from zimage_core.memory.device import Backend, Mark
from zimage_core.memory.schedule import Schedule
from zimage_core.memory.traffic import Meter

CHUNK = 16 << 20
"""Bytes that are read and copied at a time, at most: 0.7 ms on PCIe 4 x16."""
CHUNKS = 8
"""Of the ring, at least."""

_Job = tuple["Future[int]", Callable[[], int]]


class Life:
    """Memory and threads from one start to its stop. A thread touches only what is of its own life.

    Args:
        backend: Of the device.
        slots: How many, and the bytes of each.
        ring: Bytes of the ring, and of its chunks.
    """

    def __init__(self, backend: Backend, slots: tuple[int, int], ring: tuple[int, int]) -> None:
        self.alive = True
        self.slots = [backend.slot(slots[1]) for _ in range(slots[0])]
        # memory that was freed on this lane may still be read there
        self.freed: list[Mark] = [backend.mark("compute")] * slots[0]
        """When the computation has done with each slot."""
        self.copied: list[Mark] = [None] * slots[0]
        """When each slot's block is there."""
        self.chunk = CHUNK if backend.direct else ring[1]
        self.ring = [] if backend.direct else list(torch.split(backend.ring(ring[0]), self.chunk))
        self.marks: list[Mark] = [None] * len(self.ring)
        self.turn = 0
        self.jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self.threads: list[threading.Thread] = []


class Feeder:
    """Loads blocks into slots as the schedule says, until it is stopped or fails.

    Args:
        blocks: By index.
        slots: See `Schedule`, like the next one.
        wrap: See there.
        backend: Of the device.
        meter: Is told what was moved.
        ring: Bytes of host memory between file and device, a power of two.
        readers: Threads that read.
    """

    def __init__(
        self,
        blocks: Mapping[int, Block],
        slots: int,
        wrap: bool,
        backend: Backend,
        meter: Meter,
        ring: int,
        readers: int,
    ) -> None:
        self.changed = threading.Condition()
        """Guards every attribute that more than one thread uses."""
        self.schedule = Schedule(sorted(blocks), slots, wrap)
        self.fault: Exception | None = None
        self.life: Life | None = None
        self._blocks, self._backend, self._meter = blocks, backend, meter
        self._ring = (ring, min(CHUNK, ring // CHUNKS))
        self._readers = readers

    def start(self) -> Life:
        """The life that runs, or a new one; `changed` is held, the slots are the caller's compute lane's."""
        if self.life is not None and self.life.alive:
            return self.life
        old = self.schedule
        self.schedule = Schedule(old.order, old.slots, old.wrap)
        size = max(block.nbytes for block in self._blocks.values())
        life = self.life = Life(self._backend, (old.slots, size), self._ring)
        targets = [(self._feed, "feeder"), *[(self._read, f"reader-{k}") for k in range(self._readers)]]
        life.threads = [
            threading.Thread(target=target, args=(life,), name=f"zimage-{name}", daemon=True)
            for target, name in targets
        ]
        try:
            for thread in life.threads:
                thread.start()
        except BaseException:
            self._end(life)
            raise
        return life

    def stop(self) -> None:
        """End the threads and let slots and ring go; again is allowed, and so is any thread."""
        with self.changed:
            life = self.life
            if life is None:
                return
            self._end(life)
        if threading.current_thread() in life.threads:
            return  # the collector ran in one of them: they end by themselves
        for thread in life.threads:
            if thread.ident is not None:
                thread.join()
        self._backend.close()
        for mark in life.freed:
            self._backend.wait(mark)
        with self.changed:
            if self.life is life:
                self.life = None
                for block in self._blocks.values():
                    block.forget()

    def _end(self, life: Life) -> None:
        life.alive = False
        self.changed.notify_all()
        if not life.threads or life.threads[0].ident is None:
            self._dismiss(life)

    def _dismiss(self, life: Life) -> None:
        """Readers end behind the jobs that they have."""
        for _ in range(self._readers):
            life.jobs.put(None)

    def _feed(self, life: Life) -> None:
        try:
            while (task := self._next(life)) is not None:
                self._load(life, *task)
        except Exception as error:  # noqa: BLE001 - whatever it is, the thread that waits must have it
            with self.changed:
                if life.alive:
                    self.fault, life.alive = error, False
                    self.changed.notify_all()
        finally:
            self._dismiss(life)

    def _next(self, life: Life) -> tuple[int, int] | None:
        """(slot, block) to load, when there is one; None at the end."""
        with self.changed:
            while life.alive:
                task = self.schedule.begin()
                if task is not None:
                    return task
                self.changed.wait()
        return None

    def _load(self, life: Life, slot: int, index: int) -> None:
        backend, block, memory = self._backend, self._blocks[index], life.slots[slot]
        backend.after("copy", life.freed[slot])
        begun, clock = backend.mark("copy"), backend.now()
        pending: deque[tuple[Future[int], Tensor, int]] = deque()
        for first in range(0, block.nbytes, life.chunk):
            if not self._wanted(life, slot):
                break
            last = min(first + life.chunk, block.nbytes)
            turn, host = -1, memory[first:last]
            if not backend.direct:
                turn = self._room(life)
                host = life.ring[turn][: last - first]
            pending.append((self._submit(life, block, first, last, host), memory[first:last], turn))
            if len(pending) > self._readers:
                self._pass_on(life, *pending.popleft())
        while pending:
            self._pass_on(life, *pending.popleft())
        self._meter.add_host("read", index, clock, backend.now())
        block.loaded()
        done = backend.mark("copy")
        self._meter.add("copy", index, begun, done)
        with self.changed:
            if life.alive:
                life.copied[slot] = done
                self.schedule.complete(slot)
                self.changed.notify_all()

    def _wanted(self, life: Life, slot: int) -> bool:
        with self.changed:
            return life.alive and not self.schedule.stale(slot)

    def _room(self, life: Life) -> int:
        """The part of the ring that was used longest ago, when its copy is done."""
        turn = life.turn
        life.turn = (turn + 1) % len(life.ring)
        if life.marks[turn] is not None:
            self._backend.wait(life.marks[turn])
        return turn

    def _submit(self, life: Life, block: Block, first: int, last: int, host: Tensor) -> Future[int]:
        future: Future[int] = Future()
        life.jobs.put((future, lambda: block.read(first, last, host)))
        return future

    def _pass_on(self, life: Life, read: Future[int], target: Tensor, turn: int) -> None:
        """Queue the copy of a chunk that was read into the ring."""
        self._meter.count(read.result())
        if turn >= 0:
            self._backend.copy(life.ring[turn][: len(target)], target)
            life.marks[turn] = self._backend.mark("copy")

    def _read(self, life: Life) -> None:
        while (job := life.jobs.get()) is not None:
            future, work = job
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
                future.set_exception(error)


def ring_bytes(wanted: int) -> int:
    """The largest power of two up to `wanted`, and at least one that holds CHUNKS chunks."""
    return max(1 << (wanted.bit_length() - 1) if wanted > 0 else 0, CHUNKS * ALIGN)
