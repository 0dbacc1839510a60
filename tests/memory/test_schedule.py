"""The schedule of a stream: order, no slot overwritten in use, no block twice, always a way on."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zimage_core.errors import BadArgument
from zimage_core.memory.schedule import Schedule, State


class Consumer(RuleBasedStateMachine):
    """A feeder and a consumer that do whatever they may, in any order."""

    @initialize(
        blocks=st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True).map(sorted),
        slots=st.integers(1, 4),
        wrap=st.booleans(),
    )
    def begin_anew(self, blocks, slots, wrap):
        self.order, self.wrap = blocks, wrap
        self.schedule = Schedule(blocks, slots, wrap)
        self.loading: dict[int, int] = {}  # slot -> block
        self.contents: dict[int, int] = {}  # what the bytes of a slot are
        self.held: dict[int, int] = {}  # block -> slot
        self.asked: int | None = None

    @rule()
    def begin(self):
        task = self.schedule.begin()
        if task is not None:
            slot, block = task
            assert slot not in self.loading, "loaded into a slot that is being loaded"
            assert slot not in self.held.values(), "loaded into a slot that is in use"
            assert block in self.order
            self.loading[slot] = block
            self.contents.pop(slot, None)

    @precondition(lambda self: self.loading)
    @rule(data=st.data())
    def complete(self, data):
        slot = data.draw(st.sampled_from(sorted(self.loading)))
        stale, block = self.schedule.stale(slot), self.loading.pop(slot)
        assert self.schedule.complete(slot) is not stale
        if not stale:
            self.contents[slot] = block

    @rule(data=st.data())
    def ask(self, data):
        """Mostly the next block; sometimes any other: a run broken off, another member of a batch."""
        free = [b for b in self.order if b not in self.held]
        if not free or len(self.held) == self.schedule.slots:
            return
        block = data.draw(st.sampled_from(free))
        self.schedule.ask(block)
        self.asked = block

    @precondition(lambda self: self.asked is not None and self.asked not in self.held)
    @rule()
    def take(self):
        slot = self.schedule.take(self.asked)
        if slot is not None:
            assert self.contents[slot] == self.asked, "the slot holds other bytes"
            self.held[self.asked] = slot

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        block = data.draw(st.sampled_from(sorted(self.held)))
        self.schedule.release(self.held.pop(block))

    @invariant()
    def what_is_held_stays(self):
        for block, slot in getattr(self, "held", {}).items():
            assert self.contents[slot] == block
            assert self.schedule.states[slot] is State.HELD

    @invariant()
    def no_block_is_there_twice(self):
        if hasattr(self, "schedule"):
            pairs = zip(self.schedule.blocks, self.schedule.states, strict=True)
            live = [b for b, s in pairs if s not in (State.FREE, State.STALE)]
            assert len(live) == len(set(live))
            assert len(self.loading) + len(self.contents.keys() - self.loading.keys()) <= self.schedule.slots

    def teardown(self):
        """From every state, a consumer that waits gets its block, and the blocks behind it in their order."""
        if not hasattr(self, "schedule"):
            return
        for slot in self.held.values():
            self.schedule.release(slot)
        at = self.order.index(self.asked) if self.asked is not None else 0
        order = (self.order[at:] + self.order[:at]) * 2
        for block in order:
            self.schedule.ask(block)
            for _ in range(2 * self.schedule.slots + 2):
                slot = self.schedule.take(block)
                if slot is not None:
                    break
                task = self.schedule.begin()
                if task is not None:
                    self.loading[task[0]] = task[1]
                else:
                    assert self.loading, f"block {block} is awaited and nothing moves"
                    self.schedule.complete(next(iter(self.loading)))
                    del self.loading[next(iter(self.loading))]
            assert slot is not None, f"block {block} never came"
            self.schedule.release(slot)


TestConsumer = Consumer.TestCase
TestConsumer.settings = settings(stateful_step_count=60)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_in_steady_state_every_block_is_loaded_once_a_step(count, slots):
    schedule = Schedule(range(count), slots)
    loads = []
    for _ in range(5):
        for block in range(count):
            schedule.ask(block)
            while (slot := schedule.take(block)) is None:
                task = schedule.begin()
                loads.append(task[1])
                schedule.complete(task[0])
            schedule.release(slot)
            while (task := schedule.begin()) is not None:
                loads.append(task[1])
                schedule.complete(task[0])
    ahead = schedule.slots
    assert loads == [k % count for k in range(5 * count + ahead)]


def test_without_wrap_nothing_is_fetched_behind_the_end():
    schedule = Schedule(range(3), 2, wrap=False)
    for block in range(3):
        schedule.ask(block)
        while (slot := schedule.take(block)) is None:
            schedule.complete(schedule.begin()[0])
        schedule.release(slot)
    assert schedule.begin() is None
    schedule.ask(0)
    assert schedule.begin()[1] == 0


def test_a_skipped_block_is_dropped_and_those_behind_it_are_kept():
    schedule = Schedule(range(6), 3)
    tasks = [schedule.begin() for _ in range(3)]
    for slot, _ in tasks:
        schedule.complete(slot)
    schedule.ask(1)
    assert schedule.blocks == [None, 1, 2]
    assert schedule.begin() == (0, 3)


def test_what_no_consumer_may_do_is_refused():
    schedule = Schedule([2, 5], 1)
    with pytest.raises(BadArgument, match="block 3 is not streamed"):
        schedule.ask(3)
    schedule.ask(2)
    slot, _ = schedule.begin()
    with pytest.raises(BadArgument, match="slot 0 is loading"):
        schedule.release(slot)
    schedule.complete(slot)
    schedule.take(2)
    with pytest.raises(BadArgument, match="held already"):
        schedule.ask(2)
    with pytest.raises(BadArgument, match="all 1 slots held"):
        schedule.ask(5)
    for order, slots in (([1, 1], 2), ([1], 0)):
        with pytest.raises(BadArgument, match="wanted at least 1 slot"):
            Schedule(order, slots)
