"""Types under a budget: never over it, never far from the best, and an honest lower bound."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_core.errors import BadArgument, OverBudget
from zimage_core.export.budget import Option, assign

TYPES = ("A", "B", "C", "D")
tensors = st.lists(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 100)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


def table(rows):
    return {
        f"t{n}": [Option(TYPES[i], nbytes, float(cost)) for i, (nbytes, cost) in enumerate(row)]
        for n, row in enumerate(rows)
    }


def brute_force(options, budget):
    return min(
        sum(o.cost for o in picked)
        for picked in itertools.product(*options.values())
        if sum(o.nbytes for o in picked) <= budget
    )


@given(tensors, st.integers(0, 150))
def test_small_cases_are_close_to_brute_force(rows, extra):
    """A few tensors with arbitrary steps are the hardest case for moves of single tensors.

    The gap is bounded by the largest step that one tensor can take, the integrality gap of this knapsack.
    """
    options = table(rows)
    budget = sum(min(o.nbytes for o in row) for row in options.values()) + extra
    found = assign(options, budget)
    best = brute_force(options, budget)
    by_type = {name: {o.type: o for o in row} for name, row in options.items()}
    picked = [by_type[name][fmt] for name, fmt in found.types.items()]
    assert sum(o.nbytes for o in picked) == found.nbytes <= budget
    assert sum(o.cost for o in picked) == found.cost
    assert found.bound <= best + 1e-9
    largest = max(max(o.cost for o in row) - min(o.cost for o in row) for row in options.values())
    assert best <= found.cost <= best + largest


def test_the_solver_beats_the_greedy_walk_where_an_exchange_is_needed():
    """Greedy takes the steep small step of a; the best leaves it and takes b's large one."""
    options = {
        "a": [Option("A", 0, 10.0), Option("B", 2, 7.0)],
        "b": [Option("A", 0, 10.0), Option("B", 5, 3.0)],
    }
    found = assign(options, 5)
    assert found.types == {"a": "A", "b": "B"}
    assert found.cost == brute_force(options, 5) == 13.0


def test_hundreds_of_tensors_come_within_two_thousandths_of_the_bound():
    import numpy as np

    rng = np.random.default_rng(0)
    bits = {
        "Q2_K": (2.625, 0.088),
        "Q3_K": (3.4375, 0.0227),
        "Q4_K": (4.5, 0.0051),
        "Q6_K": (6.5625, 0.00031),
    }
    options = {}
    for n in range(180):
        weights = int(rng.choice([983040, 14745600, 39321600, 44236800]))
        scale = float(rng.lognormal()) * weights
        options[f"t{n}"] = [Option(t, int(weights * b / 8), scale * e) for t, (b, e) in bits.items()]
    low = sum(row[0].nbytes for row in options.values())
    high = sum(row[-1].nbytes for row in options.values())
    for share in (0.1, 0.35, 0.7):
        budget = int(low + share * (high - low))
        found = assign(options, budget)
        assert found.nbytes <= budget
        assert found.bound <= found.cost <= 1.002 * found.bound


def test_an_impossible_budget_names_the_smallest_size():
    options = {"a": [Option("A", 7, 1.0), Option("B", 9, 0.0)], "b": [Option("A", 5, 1.0)]}
    with pytest.raises(OverBudget, match="smallest possible is 12 bytes"):
        assign(options, 11)
    assert assign(options, 12).types == {"a": "A", "b": "A"}


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
def test_a_cost_that_does_not_add_up_is_refused(cost):
    with pytest.raises(BadArgument, match="finite cost"):
        assign({"a": [Option("A", 1, cost)]}, 10)
    with pytest.raises(BadArgument, match="at least one"):
        assign({"a": []}, 10)
