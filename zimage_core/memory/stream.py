"""Blocks of a network brought to the device just before they run, and the next ones meanwhile.

The block loop asks: `with stream.block(i): run block i`. No hooks on modules, none on allocators. One thread
reads ahead in the order of the loop; a block out of order (a run was broken off) starts it anew there.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor, nn

from zimage_core.errors import BadArgument, Unsupported
from zimage_core.memory.device import ALIGN, Device, Event, Ring
from zimage_core.memory.edits import Moved, written
from zimage_core.memory.traffic import Meter, Traffic
from zimage_core.nn.linear import Linear
from zimage_core.quant.tensor import PlaneCache, QuantTensor
from zimage_core.weights.source import Source

SLOTS = 3
READER = "zimage-stream"
"""What the names of reading threads begin with."""

Weight = QuantTensor | nn.Parameter


@dataclass(frozen=True)
class Stored:
    """The bytes of a tensor on the host, where they can be read without touching a mapped page.

    Args:
        data: uint8 [n]; only its length counts where the bytes are in a file.
        source: The file that they are in; None where they have memory of their own.
        offset: First byte in that file.
    """

    data: Tensor
    source: Source | None
    offset: int

    def read(self, first: int, into: Tensor) -> None:
        """Bytes from `first` into host memory, as many as that holds.

        Raises:
            BadFile: The file was changed or cut since it was opened, or cannot be read.
        """
        if self.source is None:
            # NumPy copies in this thread alone and without the interpreter lock
            into.numpy()[:] = self.data[first : first + len(into)].numpy()
        else:
            self.source.check_unchanged()
            self.source.read_into(self.offset + first, into.numpy().data)


@dataclass(frozen=True)
class Segment:
    """One matrix of a block.

    Args:
        linear: Its layer.
        home: The weight as it lies on the host.
        stored: Its bytes there.
        scale: The scale beside an fp8 or NVFP4 weight, on the device.
        start: First byte in a slot, a multiple of ALIGN.
    """

    linear: Linear
    home: Weight
    stored: Stored
    scale: Tensor | None
    start: int

    def part(self, slot: Tensor) -> Tensor:
        """Its bytes in a slot, uint8 [n]."""
        return slot[self.start : self.start + self.home.nbytes]

    def view(self, slot: Tensor) -> Weight:
        """The weight as it lies in a slot."""
        home, held = self.home, self.part(slot)
        if not isinstance(home, QuantTensor):
            return nn.Parameter(held.view(home.dtype).view(home.shape), requires_grad=False)
        # planes would outlive the bytes that they were made of
        cache = PlaneCache(closed=True)
        return replace(home, packed=held.view(home.packed.shape), scale=self.scale, planes=cache)


@dataclass
class Block:
    """The streamed matrices of one block.

    Args:
        index: In the model's `blocks`.
        segments: The matrices, in the order of a slot.
        cached: Whether the page cache should keep its bytes from one step to the next.
    """

    index: int
    segments: Sequence[Segment]
    cached: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of a slot that holds it, gaps included."""
        if not self.segments:
            return 0
        last = self.segments[-1]
        return aligned(last.start + last.home.nbytes)

    @property
    def payload(self) -> int:
        """Bytes of its weights."""
        return sum(segment.home.nbytes for segment in self.segments)

    def bind(self, views: Sequence[Weight]) -> None:
        """Let each layer read its weight from a slot, but for weights that were replaced by others."""
        for segment, view in zip(self.segments, views, strict=True):
            if segment.linear.weight is segment.home:
                segment.linear.set_weight(view)

    def unbind(self, views: Sequence[Weight]) -> None:
        """Let each layer that was bound read its weight from the host again."""
        for segment, view in zip(self.segments, views, strict=True):
            if segment.linear.weight is view:
                segment.linear.set_weight(segment.home)

    def edited(self) -> bool:
        """Whether a weight was replaced, or written to in the map of its file, since the block was made."""
        return any(
            segment.linear.weight is not segment.home
            or (segment.stored.source is not None and written(segment.stored.data))
            for segment in self.segments
        )

    def load(self, ring: Ring, slot: Tensor, free: Event, meter: Meter) -> Event:
        """Read it into a slot that is overwritten after the event `free` -> the event behind its copies."""
        device = ring.device
        device.order("copy", free)
        begun, clock = device.record("copy"), time.perf_counter()
        for segment in self.segments:
            ring.fill(segment.part(slot), segment.stored.read)
        if not self.cached:
            for stored in (segment.stored for segment in self.segments):
                if stored.source is not None:
                    stored.source.advise_dontneed(stored.offset, len(stored.data))
        done = device.record("copy")
        meter.moved(self.index, self.payload, clock, time.perf_counter())
        meter.add("copy", self.index, begun, done)
        return done


def aligned(nbytes: int) -> int:
    """The next multiple of ALIGN."""
    return -(-nbytes // ALIGN) * ALIGN


@dataclass(frozen=True)
class _Load:
    """A block on its way into a slot, or there."""

    index: int
    slot: int
    copied: Future[Event]


class Stream:
    """A `models.block_source.BlockSource` that feeds the streamed blocks of one model.

    One block at a time is used; a second thread waits until the first one's block is done. Ring and thread
    are there from the first block that is read until `close`.

    Args:
        blocks: The streamed blocks of the model, in the order of its loop; the others are on the device.
        ring: What bytes go to the device through.
        slots: Device memory for as many blocks at a time, uint8 [bytes of the largest streamed block] each;
            with one slot nothing overlaps.
        wrap: Fetch the first blocks again behind the last one, for the next step. False for a network that
            runs once.
        visit: Brings a block that runs once to the device for the length of a `with`; None where all such
            blocks stay.
        rest: The rest of the network, which stays on the device.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        ring: Ring,
        slots: Sequence[Tensor],
        wrap: bool = True,
        visit: Callable[[nn.Module], AbstractContextManager[object]] | None = None,
        rest: Moved | None = None,
    ) -> None:
        self._blocks = {block.index: block for block in blocks}
        self.streamed = tuple(self._blocks)
        """Indices of the blocks that are moved, in order."""
        self._ring, self._device, self._meter = ring, ring.device, Meter(ring.device)
        self._wrap, self._visit, self.rest = wrap, visit, rest
        self._slots = [*slots]
        self._free = [self._device.record("compute") for _ in slots]
        self.device_bytes = sum(slot.nbytes for slot in slots)
        """Bytes of the slots."""
        self._bound: dict[int, list[Weight]] = {}  # block -> its weights that its layers read now
        self._views: dict[tuple[int, int], list[Weight]] = {}  # (block, slot) -> its weights there
        self._reader = ThreadPoolExecutor(1, thread_name_prefix=READER)
        self._submitting = threading.Lock()
        self._loads: deque[_Load] = deque()
        self._next = 0  # place in `streamed` of the block to be read after those
        self._user = threading.RLock()  # held by the thread that uses a block
        self._held: _Load | None = None
        self._begun: Event = None
        self._last = -1
        self._fault: Exception | None = None
        self.closed = False
        """Whether it feeds no more."""
        self._finalizer = weakref.finalize(self, _end, self._reader, self._device, self._free)

    def block(self, index: int) -> AbstractContextManager[object]:
        """Inside the `with`, block `index` has its weights on the device.

        Raises:
            BadFile: Its file was changed, cut, or cannot be read; the stream is closed then.
            BadArgument: The stream is closed.
        """
        return self._streaming(index) if index in self._blocks else nullcontext()

    def once(self, block: nn.Module) -> AbstractContextManager[object]:
        """Inside the `with`, a block that runs once has its weights on the device.

        Raises:
            BadFile: Its file was changed, cut, or cannot be read.
        """
        return nullcontext() if self._visit is None else self._visit(block)

    def traffic(self, clear: bool = False) -> Traffic:
        """What was moved since the start, or since it was cleared; waits for the device."""
        found = self._meter.traffic()
        if clear:
            self._meter.clear()
        return found

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled with its network."""
        raise Unsupported(
            "a network whose blocks are streamed is not copied or pickled: call limit_memory() of its "
            "pipeline without arguments first"
        )

    def close(self) -> None:
        """End the thread and let the slots go; a second call does nothing.

        A block that this thread holds reads from the host again; one of another thread does when it is done.
        """
        with self._submitting:
            self.closed = True
        _end(self._reader, self._device, self._free)
        self._finalizer.detach()
        self._release()
        self._views.clear()
        self._slots = []

    def restore(self) -> None:
        """Put the whole network back on the host, whoever holds a block."""
        for index in list(self._bound):
            self._unbind(index)
        if self.rest is not None:
            self.rest.restore()

    def _unbind(self, index: int) -> None:
        views = self._bound.pop(index, None)
        if views is not None:
            self._blocks[index].unbind(views)

    def seal(self) -> None:
        """Note what the rest of the network holds, before a user can edit it."""
        if self.rest is not None:
            self.rest.seal()

    def edited(self) -> bool:
        """Whether a weight was edited between two runs, so that the model must be streamed anew."""
        rest = self.rest is not None and bool(self.rest.edited())
        return rest or any(block.edited() for block in self._blocks.values())

    @contextmanager
    def _streaming(self, index: int) -> Iterator[None]:
        held = self._acquire(index)
        try:
            yield
        finally:
            if self._held is held:
                self._release()

    def _acquire(self, index: int) -> _Load:
        """Wait until the copy of a block is queued, let the computation wait for it, bind its layers.

        A block that this thread still holds is released: an exception that came at a bad moment left it.
        """
        self._release()
        self._user.acquire()
        try:
            begun = self._device.record("compute")
            slots = self._slots  # another thread may close the stream meanwhile
            held = self._held = self._load_for(index)
            self._device.order("compute", self._wait(held))
            self._begun = self._device.record("compute")
            self._meter.add("stall", index, begun, self._begun, index <= self._last)
            self._last = index
            segments, key = self._blocks[index].segments, (index, held.slot)
            if key not in self._views:
                with torch.inference_mode(False):  # they outlive the caller's mode
                    self._views[key] = [segment.view(slots[held.slot]) for segment in segments]
            self._bound[index] = self._views[key]
            self._blocks[index].bind(self._views[key])
        except BaseException:
            self._release()
            raise
        return held

    def _release(self) -> None:
        """Let go of the block that this thread holds and of the lock; do nothing where another thread has it.

        The computation of the block is queued: its layers go back to the host, its slot may be overwritten.
        """
        if not self._user.acquire(blocking=False):
            return
        try:
            held = self._held
            if held is not None:
                self._unbind(held.index)
                if self._begun is not None:
                    self._free[held.slot] = self._device.record("compute")
                    self._meter.add("compute", held.index, self._begun, self._free[held.slot])
                self._held = self._begun = None
                self._read_ahead()
        finally:
            with suppress(RuntimeError):  # raised when this thread has the lock no more
                while True:
                    self._user.release()

    def _load_for(self, index: int) -> _Load:
        """The load of a block, begun now if need be; what was fetched in vain before it is dropped."""
        while self._loads and self._loads[0].index != index:
            self._loads.popleft().copied.cancel()
        if not self._loads:
            self._next = self.streamed.index(index)
            self._read_ahead()
        self._raise_if_ended()
        return self._loads.popleft()

    def _wait(self, load: _Load) -> Event:
        """The event behind the copies of a block, when they are queued."""
        try:
            return load.copied.result()
        except CancelledError:
            self._raise_if_ended()
            raise
        except Exception as error:
            self._fault = error
            self.close()
            self._raise_if_ended()  # without the reader's frames, which hold on to slots
            raise

    def _read_ahead(self) -> None:
        """Fill the slots that are free with the next blocks, in the order of the loop."""
        taken = [*self._loads, *([] if self._held is None else [self._held])]
        for slot in set(range(len(self._slots))) - {load.slot for load in taken}:
            if self._next == len(self.streamed):
                if not self._wrap:
                    return
                self._next = 0
            block = self._blocks[self.streamed[self._next]]
            if any(load.index == block.index for load in taken):
                return  # with hardly more blocks than slots: wait until it is used
            with self._submitting:
                if self.closed:
                    return
                work = (self._ring, self._slots[slot], self._free[slot], self._meter)
                load = _Load(block.index, slot, self._reader.submit(block.load, *work))
            self._loads.append(load)
            taken.append(load)
            self._next += 1

    def _raise_if_ended(self) -> None:
        if self._fault is not None:
            raise self._fault.with_traceback(None)
        if self.closed:
            raise BadArgument("stream: it was closed; unstream the model, or stream it anew")


def _end(reader: ThreadPoolExecutor, device: Device, free: list[Event]) -> None:
    """Drop what was not begun, wait for the thread and for the computations that read from slots."""
    in_reader = threading.current_thread().name.startswith(READER)  # the collector may run there
    reader.shutdown(wait=not in_reader, cancel_futures=True)
    device.settle()
    with suppress(RuntimeError):  # a GPU that fails reads from no slot any more
        for event in free:
            device.wait(event)
