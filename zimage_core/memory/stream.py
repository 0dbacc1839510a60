"""Blocks of a network brought to the device just before they run, and the next ones meanwhile.

The block loop asks: `with stream.block(i): run block i`. No hooks on modules, none on allocators.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

from torch import nn

from zimage_core.errors import BadArgument, Busy
from zimage_core.memory.blocks import Block
from zimage_core.memory.device import Backend, Mark
from zimage_core.memory.feeder import CHUNKS, Feeder, Life, ring_bytes
from zimage_core.memory.job import RING
from zimage_core.memory.traffic import Meter, Traffic

READERS = 3
"""Threads: one fills PCIe 3 from the page cache, three PCIe 4."""
SLOTS = 3


class Stream:
    """A `models.block_source.BlockSource` that feeds the streamed blocks of one model.

    Memory and threads are there from the first `acquire` or `prefetch` to `park` or `close`. One block at a
    time is used; a second thread waits until the first one's block is done.

    Args:
        blocks: Of the model, in the order of its loop.
        resident: Indices of blocks that are on the device already; those without matrices are too.
        backend: The device.
        slots: On the device, at least 1; with 1 nothing overlaps. Each has the size of the largest
            streamed block.
        ring: Host memory in bytes, rounded down to a power of two; the CPU as a device needs none.
        readers: Threads that read files.
        wrap: Fetch the first blocks again behind the last one, for the next step. False for a network that
            runs once.
        visit: Brings a block that runs once to the device for the length of a `with`; None where all such
            blocks stay.

    Raises:
        BadArgument: slots, ring or readers are out of range, or a resident index is no block's.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        resident: Collection[int],
        backend: Backend,
        slots: int = SLOTS,
        ring: int = RING,
        readers: int = READERS,
        wrap: bool = True,
        visit: Callable[[nn.Module], AbstractContextManager[object]] | None = None,
    ) -> None:
        if slots < 1 or ring < 1 or not 1 <= readers <= CHUNKS - 2:
            raise BadArgument(
                f"stream: slots={slots}, ring={ring}, readers={readers}; wanted 1 slot or more, 1 byte or "
                f"more, and 1 to {CHUNKS - 2} readers"
            )
        unknown = sorted(set(resident) - {block.index for block in blocks})
        if unknown:
            raise BadArgument(f"stream: resident names block {unknown[0]}, blocks are 0 to {len(blocks) - 1}")
        self._blocks = {b.index: b for b in blocks if b.nbytes and b.index not in set(resident)}
        self.backend = backend
        self._visit = visit
        self._meter = Meter(backend)
        order = sorted(self._blocks)
        self.host_bytes = 0 if backend.direct or not order else ring_bytes(ring)
        """Of the ring."""
        self._feeder = Feeder(self._blocks, slots, wrap, backend, self._meter, ring_bytes(ring), readers)
        largest = max((block.nbytes for block in self._blocks.values()), default=0)
        self.device_bytes = self._feeder.schedule.slots * largest
        """Of the slots."""
        self._owner: int | None = None
        self._held: int | None = None
        self._begun: Mark | None = None
        self._last = -1
        self._closed = False
        self._finalizer = weakref.finalize(self, Feeder.stop, self._feeder)

    @property
    def streamed(self) -> tuple[int, ...]:
        """Indices of the blocks that are moved, in order."""
        return self._feeder.schedule.order

    @property
    def closed(self) -> bool:
        """True when it feeds no more."""
        return self._closed

    def block(self, index: int) -> AbstractContextManager[object]:
        """Inside the `with`, block `index` has its weights on the device.

        Raises:
            As `acquire`.
        """
        return _Visit(self, index) if index in self._blocks else nullcontext()

    def once(self, block: nn.Module) -> AbstractContextManager[object]:
        """Inside the `with`, a block that runs once has its weights on the device.

        Raises:
            BadFile: Its file was changed, cut, or cannot be read.
        """
        return nullcontext() if self._visit is None else self._visit(block)

    def acquire(self, index: int) -> None:
        """Wait until the copy of a block is queued, let the computation wait for it, bind its layers.

        A block that this thread still holds is released: an exception that came at a bad moment left it.

        Raises:
            BadFile: Its file was changed, cut, or cannot be read; the stream is closed then.
            BadArgument: The stream is closed.
        """
        if index not in self._blocks:
            return
        feeder, backend = self._feeder, self.backend
        try:
            self._enter(index)
            begun = backend.mark("compute")
            with feeder.changed:
                life = self._start()
                feeder.schedule.ask(index)
                feeder.changed.notify_all()
                while (slot := feeder.schedule.take(index)) is None:
                    feeder.changed.wait()
                    self._check()
                memory, copied = life.slots[slot], life.copied[slot]
            backend.after("compute", copied)
            self._meter.add("stall", index, begun, backend.mark("compute"), index <= self._last)
            self._last = index
            self._blocks[index].bind(memory)
            self._begun = backend.mark("compute")
        except BaseException:
            self.release(index)
            if feeder.fault is not None:
                self.close()
            raise

    def release(self, index: int) -> None:
        """The computation of a block is queued: its layers go back to the host, its slot may be overwritten.

        Does nothing for a block that is not held.
        """
        feeder = self._feeder
        if self._owner != threading.get_ident() or self._held != index:
            return
        self._blocks[index].unbind()
        with feeder.changed:
            slot, life = feeder.schedule.held(index), feeder.life
            if slot is not None and life is not None and life.alive:
                mark = self.backend.mark("compute")
                life.freed[slot] = mark
                feeder.schedule.release(slot)
                if self._begun is not None:
                    self._meter.add("compute", index, self._begun, mark)
            self._begun = self._held = self._owner = None
            feeder.changed.notify_all()

    def prefetch(self) -> None:
        """Begin to load the first blocks, before they are asked for.

        Raises:
            BadArgument: The stream is closed.
        """
        with self._feeder.changed:
            self._check()
            if self._blocks and self._owner is None:
                self._start()
                self._feeder.schedule.ask(self.streamed[0])
                self._feeder.changed.notify_all()

    def park(self) -> None:
        """Let slots, ring and threads go until the next block is asked for: another network needs the memory.

        Raises:
            Busy: A block is in use.
        """
        with self._feeder.changed:
            if self._owner not in (None, threading.get_ident()):
                raise Busy("stream: a block is in use by another thread; wait for its run to end")
        if self._held is not None:
            self.release(self._held)
        self._feeder.stop()

    def close(self) -> None:
        """End the threads; all layers read from the host again. Again is allowed."""
        self._closed = True
        self._feeder.stop()
        for block in self._blocks.values():
            block.unbind()
        self._finalizer.detach()

    def traffic(self, clear: bool = False) -> Traffic:
        """What was moved since the start, or since it was cleared; waits for the device."""
        found = self._meter.traffic()
        if clear:
            self._meter.clear()
        return found

    def _enter(self, index: int) -> None:
        """Wait for the other thread that uses a block, if there is one."""
        me, feeder = threading.get_ident(), self._feeder
        if self._owner == me and self._held is not None:
            self.release(self._held)
        with feeder.changed:
            while self._owner not in (None, me):
                feeder.changed.wait()
            self._check()
            self._begun, self._held, self._owner = None, index, me

    def _start(self) -> Life:
        self._check()
        return self._feeder.start()

    def _check(self) -> None:
        if self._feeder.fault is not None:
            raise self._feeder.fault.with_traceback(None)
        if self._closed:
            raise BadArgument("stream: it was closed; unstream the model, or stream it anew")

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "parked" if self._feeder.life is None else "running"
        where = self.backend.device
        return f"Stream({len(self._blocks)} blocks, {self.device_bytes} bytes on {where}, {state})"


class _Visit:
    """One block for the length of a `with`."""

    def __init__(self, stream: Stream, index: int) -> None:
        self._stream, self._index = stream, index

    def __enter__(self) -> None:
        self._stream.acquire(self._index)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.release(self._index)
