"""Chooses a type for each tensor so that the total cost is least within a budget of bytes.

This is the multiple-choice knapsack problem. A price per byte makes the tensors independent: each gets the
type with the least cost + price * bytes. Bisection finds the price at which the total size crosses the
budget; the best total over all prices is a lower bound of the cost (the Lagrangian dual). The choice just
below the budget is then improved until the budget is used, the one just above it is reduced until it fits,
and the better of the two is the result. With hundreds of tensors it is within one or two thousandths of the
bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zimage_core.errors import BadArgument, OverBudget
from zimage_core.files.units import in_bytes

_BISECTIONS = 100  # from 1 down to 1e-30, far below any cost of a byte


@dataclass(frozen=True)
class Option:
    """One choice for a tensor.

    Args:
        type: Name of a format.
        nbytes: Size of the tensor in this type, in bytes.
        cost: Cost of the choice, not negative, in any unit that adds up over tensors.
    """

    type: str
    nbytes: int
    cost: float


@dataclass(frozen=True)
class Assignment:
    """A type for each tensor, with the totals.

    Args:
        types: Tensor -> type.
        nbytes: Bytes of all tensors.
        cost: Cost of all tensors.
        bound: No choice within the budget costs less than this.
    """

    types: dict[str, str]
    nbytes: int
    cost: float
    bound: float


def assign(options: Mapping[str, Sequence[Option]], budget: int) -> Assignment:
    """Find types whose total cost is least, or very nearly, within `budget` bytes.

    Args:
        options: Tensor -> its choices, in any order.
        budget: Bytes for all tensors together.

    Raises:
        BadArgument: A tensor has no choices, or a cost is negative or not finite.
        OverBudget: Even the smallest choices do not fit; the message has their size.
    """
    for name, choices in options.items():
        if not choices or not all(o.cost >= 0 and np.isfinite(o.cost) and o.nbytes >= 0 for o in choices):
            raise BadArgument(
                f"{name}: wanted at least one choice, with bytes and a finite cost of 0 or more"
            )
    smallest = sum(min(option.nbytes for option in choices) for choices in options.values())
    if smallest > budget:
        raise OverBudget(
            f"the tensors do not fit {in_bytes(budget)}: the smallest possible is {smallest} bytes "
            f"({in_bytes(smallest)})"
        )
    rows = [sorted(choices, key=lambda o: (o.nbytes, o.cost)) for choices in options.values()]
    search = _Search(rows, budget)
    picked = [row[i] for row, i in zip(rows, search.best(), strict=True)]
    return Assignment(
        {name: option.type for name, option in zip(options, picked, strict=True)},
        sum(option.nbytes for option in picked),
        float(sum(option.cost for option in picked)),
        max(search.bound, 0.0),
    )


Table = NDArray[np.float64]
"""A number for each option of each tensor, [tensors, options]."""
Choice = NDArray[np.int64]
"""The number of an option for each tensor, [tensors]."""


class _Search:
    """The options as tables; short rows are padded with options of infinite cost.

    Args:
        rows: The options of each tensor, smallest first.
        budget: Bytes for all tensors together.
    """

    def __init__(self, rows: Sequence[Sequence[Option]], budget: int) -> None:
        shape = (len(rows), max(map(len, rows), default=1))
        self.nbytes, self.cost = np.zeros(shape), np.full(shape, np.inf)
        for i, row in enumerate(rows):
            self.nbytes[i, : len(row)] = [option.nbytes for option in row]
            self.cost[i, : len(row)] = [option.cost for option in row]
        self.budget = budget
        self.bound = -np.inf

    def best(self) -> Choice:
        """The cheapest choice found; sets `bound`."""
        over = self.at(0.0)
        if self.excess(over) <= 0:
            return over
        low, high = 0.0, 1.0
        while self.excess(under := self.at(high)) > 0:
            low, high, over = high, 2 * high, under
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            choice = self.at(middle)
            if self.excess(choice) > 0:
                low, over = middle, choice
            else:
                high, under = middle, choice
        found = [self.improved(under), self.improved(over)]
        return min(found, key=lambda choice: self.total(self.cost, choice))

    def at(self, price: float) -> Choice:
        """The cheapest choice if a byte costs `price`; the smallest one among equals."""
        choice: Choice = (self.cost + price * self.nbytes).argmin(1)
        self.bound = max(self.bound, self.total(self.cost, choice) + price * self.excess(choice))
        return choice

    def total(self, table: Table, choice: Choice) -> float:
        """Sum over the tensors."""
        return float(table[np.arange(len(choice)), choice].sum())

    def excess(self, choice: Choice) -> float:
        """Bytes above the budget, negative below it."""
        return self.total(self.nbytes, choice) - self.budget

    def improved(self, choice: Choice) -> Choice:
        """Change the option of one tensor at a time, as long as that helps.

        Above the budget, the next change is the one with the least cost per freed byte; within the budget,
        the one with the largest gain that fits.
        """
        choice, here = choice.copy(), np.arange(len(choice))
        while True:
            grows = self.nbytes - self.nbytes[here, choice][:, None]
            costs = self.cost - self.cost[here, choice][:, None]
            excess = self.excess(choice)
            if excess > 0:
                costs = np.where(grows < 0, costs / np.clip(-grows, 1, excess), np.inf)
            else:
                costs[grows > -excess] = 0.0
            tensor, option = np.unravel_index(costs.argmin(), costs.shape)
            if excess <= 0 and costs[tensor, option] >= 0:
                return choice
            choice[tensor] = option
