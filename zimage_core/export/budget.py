"""Which type for which tensor, so that the total cost is least under a total of bytes.

This is the multiple-choice knapsack. Lines through each tensor's (bytes, cost) points that no other point
undercuts, its convex hull, are walked in order of gain per byte: that is the optimum of the relaxed problem
and gives a lower bound. What the last step left free is then filled, and pairs of tensors are exchanged,
until neither finds anything; with hundreds of tensors the gap to the bound is a thousandth or two.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from zimage_core.errors import BadArgument, OverBudget
from zimage_core.files.units import in_bytes

MOST_EXCHANGES = 10_000


@dataclass(frozen=True)
class Option:
    """One choice for a tensor.

    Args:
        type: Name of a format.
        nbytes: Bytes that the tensor then takes.
        cost: What it then costs, in any unit that adds up over tensors; not negative.
    """

    type: str
    nbytes: int
    cost: float


@dataclass(frozen=True)
class Assignment:
    """The answer of `assign`.

    Args:
        types: Tensor -> type.
        nbytes: Total.
        cost: Total.
        bound: No choice within the budget costs less than this.
    """

    types: dict[str, str]
    nbytes: int
    cost: float
    bound: float


def assign(options: Mapping[str, Sequence[Option]], budget: int) -> Assignment:
    """The types that cost least in total within `budget` bytes, or very nearly.

    Args:
        options: Tensor -> its choices, in any order.
        budget: Bytes for all tensors together.

    Raises:
        BadArgument: A tensor without choices, or a cost that is negative or not finite.
        OverBudget: Even the smallest choices do not fit; the message has their size.
    """
    for name, choices in options.items():
        if not choices or not all(o.cost >= 0 and np.isfinite(o.cost) and o.nbytes >= 0 for o in choices):
            raise BadArgument(
                f"{name}: wanted at least one choice, with bytes and a finite cost of 0 or more"
            )
    tables = {name: _undercutting(choices) for name, choices in options.items()}
    smallest = sum(table[0].nbytes for table in tables.values())
    if smallest > budget:
        raise OverBudget(
            f"the tensors do not fit {in_bytes(budget)}: the smallest possible is {smallest} bytes "
            f"({in_bytes(smallest)})"
        )
    names = list(tables)
    rows = [tables[name] for name in names]
    chosen, bound = _walk_hulls(rows, budget)
    _repair(rows, chosen, budget)
    picked = [row[i] for row, i in zip(rows, chosen, strict=True)]
    return Assignment(
        {name: option.type for name, option in zip(names, picked, strict=True)},
        sum(option.nbytes for option in picked),
        float(sum(option.cost for option in picked)),
        bound,
    )


def _undercutting(choices: Sequence[Option]) -> list[Option]:
    """The choices that no other one beats in both bytes and cost, smallest first: costs fall strictly."""
    kept: list[Option] = []
    for option in sorted(choices, key=lambda o: (o.nbytes, o.cost)):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept


def _hull(row: Sequence[Option]) -> list[int]:
    """Indices of the choices on the lower convex hull of (bytes, cost)."""
    hull: list[int] = []
    for i, option in enumerate(row):
        while len(hull) > 1:
            first, last = row[hull[-2]], row[hull[-1]]
            # `last` lies on or above the line from `first` to `option`
            rise = (last.cost - first.cost) * (option.nbytes - first.nbytes)
            if rise < (option.cost - first.cost) * (last.nbytes - first.nbytes):
                break
            hull.pop()
        hull.append(i)
    return hull


def _walk_hulls(rows: Sequence[Sequence[Option]], budget: int) -> tuple[list[int], float]:
    """Steps along all hulls, steepest first, while they fit; and the bound of the relaxed problem."""
    steps: list[tuple[float, int, int, int]] = []
    for number, row in enumerate(rows):
        hull = _hull(row)
        for before, after in itertools.pairwise(hull):
            nbytes = row[after].nbytes - row[before].nbytes
            steps.append(((row[after].cost - row[before].cost) / nbytes, number, before, after))
    chosen = [0] * len(rows)
    left = budget - sum(row[0].nbytes for row in rows)
    cost = bound = float(sum(row[0].cost for row in rows))
    open_end = True
    for slope, number, before, after in sorted(steps):
        nbytes = rows[number][after].nbytes - rows[number][before].nbytes
        if open_end:
            bound = cost + slope * min(nbytes, left)
        if chosen[number] == before and nbytes <= left:
            chosen[number] = after
            left -= nbytes
            cost += rows[number][after].cost - rows[number][before].cost
        else:
            open_end = False
    return chosen, max(bound, 0.0)


def _repair(rows: Sequence[Sequence[Option]], chosen: list[int], budget: int) -> None:
    """Fill what is left, then exchange: one tensor moves, another pays, as long as the total cost falls."""
    # every move of every tensor as one table, so that NumPy searches the pairs
    owner = np.array([n for n, row in enumerate(rows) for _ in row])
    nbytes = np.array([o.nbytes for row in rows for o in row], np.int64)
    costs = np.array([o.cost for row in rows for o in row])
    first = np.cumsum([0, *(len(row) for row in rows)])[:-1]
    for _ in range(MOST_EXCHANGES):
        now = first + np.array(chosen)
        grows, gains = nbytes - nbytes[now][owner], costs[now][owner] - costs
        left = budget - int(nbytes[now].sum())
        best, moves = _best_move(owner, grows, gains, left)
        if best <= 1e-12 * float(costs[now].sum()):
            return
        for move in moves:
            chosen[owner[move]] = int(move - first[owner[move]])


def _best_move(owner: np.ndarray, grows: np.ndarray, gains: np.ndarray, left: int) -> tuple[float, list[int]]:
    """The move, or pair of moves of two tensors, that gains most within `left` bytes."""
    single = np.where(grows <= left, gains, -np.inf)
    index = int(single.argmax())
    best, moves = float(single[index]), [index]
    # a pair: an upgrade that does not fit alone, and the cheapest way to free enough for it
    frees = np.flatnonzero(grows < 0)
    order = frees[np.argsort(-grows[frees])]  # the least freed first
    for up in np.flatnonzero((grows > left) & (gains > max(best, 0.0))):
        start = int(np.searchsorted(-grows[order], grows[up] - left))
        payers = order[start:]
        payers = payers[owner[payers] != owner[up]]
        if len(payers):
            payer = int(payers[gains[payers].argmax()])
            gain = float(gains[up] + gains[payer])
            if gain > best:
                best, moves = gain, [int(up), payer]
    return best, moves
