"""Time of streamed steps on a virtual clock: max(computation, transfer) and one block, within 2 per cent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_core.memory.clock import Machine, simulate

STEPS = 8


def spread(count, resident):
    """Indices of `resident` blocks, evenly among `count`."""
    return {int((k + 0.5) * count / resident) for k in range(resident)}


@st.composite
def plans(draw, ratios, vary=0.15):
    """(bytes, seconds, resident, machine), the link such that transfer / computation is one of ratios."""
    count = draw(st.integers(8, 48))
    resident = spread(count, draw(st.integers(0, count - 4)))
    size = draw(st.integers(20, 200)) * 1_000_000
    factors = draw(st.lists(st.floats(1 - vary, 1 + vary), min_size=count, max_size=count))
    nbytes = [int(size * factor) for factor in factors]
    seconds = [draw(st.sampled_from([0.002, 0.01, 0.1]))] * count
    moved = sum(n for i, n in enumerate(nbytes) if i not in resident)
    link = moved / (sum(seconds) * draw(ratios))
    machine = Machine(link, link * draw(st.sampled_from([2.0, 8.0])), ahead=draw(st.booleans()))
    return nbytes, seconds, resident, machine


def expected(nbytes, seconds, resident, machine):
    """Seconds of STEPS steps: what the longer lane takes, and the end where only the other one is busy."""
    streamed = [i for i in range(len(nbytes)) if i not in resident]
    transfer, compute = sum(nbytes[i] for i in streamed) / machine.link, sum(seconds)
    if transfer <= compute:  # nothing computes before the first block is there
        alone = max(0.0, nbytes[streamed[0]] / machine.link - sum(seconds[: streamed[0]]))
    else:  # nothing moves behind the last one
        alone = sum(seconds[streamed[-1] :])
    return STEPS * max(transfer, compute) + alone


def check(plan, slots):
    nbytes, seconds, resident, machine = plan
    found = simulate(nbytes, seconds, resident, slots, machine, STEPS)
    want = expected(*plan)
    assert 0.999 <= found.seconds / want <= 1.02, (found.seconds, want, plan)
    streamed = [i for i in range(len(nbytes)) if i not in resident]
    ahead = len(found.loads) - STEPS * len(streamed)
    assert list(found.loads) == [streamed[k % len(streamed)] for k in range(len(found.loads))]
    assert 0 <= ahead <= slots
    assert found.most <= slots * max(nbytes[i] for i in streamed)


@given(plans(st.floats(0.2, 2.5)))
def test_three_slots_take_the_longer_of_computation_and_transfer(plan):
    check(plan, 3)


@given(plans(st.one_of(st.floats(0.2, 0.75), st.floats(1.5, 3.0))))
def test_two_slots_do_where_the_two_differ_by_a_third(plan):
    check(plan, 2)


@given(plans(st.floats(0.2, 2.5)))
def test_two_slots_lose_less_than_a_third(plan):
    """Where transfer equals computation, two slots cannot even out blocks of unequal size."""
    nbytes, seconds, resident, machine = plan
    found = simulate(nbytes, seconds, resident, 2, machine, STEPS)
    assert found.seconds <= 4 / 3 * expected(*plan), (found.seconds / expected(*plan), plan)


@pytest.mark.parametrize("ahead", [True, False])
def test_one_slot_overlaps_nothing(ahead):
    found = simulate([100] * 4, [1.0] * 4, (), 1, Machine(100, 1e9, ahead=ahead), 3)
    assert found.seconds == pytest.approx(3 * 4 * 2.0)
    assert found.stall == pytest.approx(3 * 4 * 1.0)


def test_all_resident_moves_nothing():
    found = simulate([100] * 4, [1.0] * 4, range(4), 3, Machine(100, 100), 2)
    assert found.seconds == 8.0
    assert not found.loads
    assert found.transfer == found.stall == found.most == 0


def test_a_slow_disk_is_the_bound_where_the_link_is_fast():
    nbytes, seconds = [100_000_000] * 30, [0.01] * 30
    found = simulate(nbytes, seconds, (), 3, Machine(link=25e9, read=0.5e9), 4)
    assert found.seconds == pytest.approx(4 * 30 * 0.2, rel=0.02)


def test_residency_in_a_row_is_worse_than_spread():
    """The reason for spreading it: transfer hides behind neighbours only."""
    nbytes, seconds = [100_000_000] * 30, [0.01] * 30
    machine = Machine(link=100_000_000 / 0.0195, read=1e12)
    even = simulate(nbytes, seconds, spread(30, 15), 3, machine)
    row = simulate(nbytes, seconds, range(15), 3, machine)
    assert even.seconds < 1.03 * STEPS * 0.3
    assert row.seconds > 1.3 * even.seconds
