"""Which block goes into which slot, and when: the decisions of a stream, without threads or time.

A consumer walks the blocks in a fixed cyclic order and holds each while it computes. A feeder fills free
slots with what comes next in that order. A consumer that asks for another block than the next (a run that was
broken off, another member of a batch) redirects the feeder; what was fetched in vain is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import Enum

from zimage_core.errors import BadArgument


class State(Enum):
    """Of a slot."""

    FREE = "free"
    LOADING = "loading"
    STALE = "loading, and no longer wanted"
    READY = "ready"
    HELD = "held by the consumer"


class Schedule:
    """A state machine; the caller makes sure that one method runs at a time.

    A slot goes FREE -> `begin` -> LOADING -> `complete` -> READY -> `take` -> HELD -> `release` -> FREE.
    Slots are used in the order in which they became free.

    Args:
        order: Indices of the streamed blocks in the order of the computation, each once.
        slots: At least 1; more than one a block is of no use and becomes one a block.
        wrap: Fetch the first blocks behind the last one. False waits until they are asked for: a network
            that runs once.
    """

    def __init__(self, order: Sequence[int], slots: int, wrap: bool = True) -> None:
        if slots < 1 or len(set(order)) != len(order):
            raise BadArgument(f"schedule: wanted at least 1 slot and each block once, got {slots}, {order}")
        self.order = tuple(order)
        self.wrap = wrap
        self._place = {block: place for place, block in enumerate(self.order)}
        count = min(slots, len(self.order))
        self.states = [State.FREE] * count
        self.blocks: list[int | None] = [None] * count
        self._turns = [0] * count  # when each slot's block was begun
        self._turn = 0
        self._free = deque(range(count))
        self._next = 0

    @property
    def slots(self) -> int:
        """How many there are."""
        return len(self.states)

    def begin(self) -> tuple[int, int] | None:
        """(slot, block) to load now; None where no slot is free or nothing is to be fetched."""
        if not self._free or self._next >= len(self.order):
            return None
        block = self.order[self._next]
        if self._slot_of(block, State.LOADING, State.READY, State.HELD) is not None:
            return None  # with hardly more blocks than slots: wait until it is used
        slot = self._free.popleft()
        self.states[slot], self.blocks[slot] = State.LOADING, block
        self._turn += 1
        self._turns[slot] = self._turn
        self._next += 1
        if self.wrap:
            self._next %= len(self.order)
        return slot, block

    def complete(self, slot: int) -> bool:
        """The slot's block is loaded; False where nobody wants it any more and the slot is free again."""
        if self.states[slot] is State.STALE:
            self._clear(slot)
            return False
        self._expect(slot, State.LOADING)
        self.states[slot] = State.READY
        return True

    def stale(self, slot: int) -> bool:
        """True while a block is loaded in vain; the load may be broken off and completed."""
        return self.states[slot] is State.STALE

    def ask(self, block: int) -> None:
        """The consumer waits for `block`: make sure that it comes next."""
        if block not in self._place:
            raise BadArgument(f"block {block} is not streamed; streamed are {self.order}")
        if self._slot_of(block, State.HELD) is not None:
            raise BadArgument(f"block {block} is held already; release it first")
        found = self._slot_of(block, State.LOADING, State.READY)
        if found is None and all(state is State.HELD for state in self.states):
            raise BadArgument(f"block {block} finds all {self.slots} slots held; release one first")
        for slot, state in enumerate(self.states):
            if found is not None and self._turns[slot] >= self._turns[found]:
                continue  # comes after it
            if state is State.READY:
                self._clear(slot)
            elif state is State.LOADING:
                self.states[slot] = State.STALE
        if found is None:
            self._next = self._place[block]

    def take(self, block: int) -> int | None:
        """The slot that holds `block`, the consumer's until it is released; None while it is not ready."""
        slot = self._slot_of(block, State.READY)
        if slot is not None:
            self.states[slot] = State.HELD
        return slot

    def held(self, block: int) -> int | None:
        """The slot in which the consumer holds `block`, if it does."""
        return self._slot_of(block, State.HELD)

    def release(self, slot: int) -> None:
        """The consumer has done with the slot."""
        self._expect(slot, State.HELD)
        self._clear(slot)

    def _slot_of(self, block: int, *states: State) -> int | None:
        for slot, (held, state) in enumerate(zip(self.blocks, self.states, strict=True)):
            if held == block and state in states:
                return slot
        return None

    def _expect(self, slot: int, state: State) -> None:
        if self.states[slot] is not state:
            raise BadArgument(f"slot {slot} is {self.states[slot].value}, wanted one that is {state.value}")

    def _clear(self, slot: int) -> None:
        self.states[slot], self.blocks[slot] = State.FREE, None
        self._free.append(slot)
