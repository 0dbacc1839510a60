"""Values of a config.json of unknown origin, checked by kind and range before anything is made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from zimage_core.errors import BadArgument, printable

MOST = 1 << 24
"""Largest whole number in a config of any real network; it bounds what is allocated."""


class Fields:
    """Values of a config.json, checked by kind. A field that is null is absent: it has its default.

    Args:
        owner: What the config describes, for messages.
        data: The parsed file.

    Every method takes the name of a field and its default, and raises BadArgument where the value is of
    another kind; without a default it does so where the field is absent.
    """

    def __init__(self, owner: str, data: Mapping[str, Any]) -> None:
        self.owner = owner
        self.data = data

    def get(self, name: str, *default: Any) -> Any:
        """The value of any kind."""
        value = self.data.get(name)
        if value is not None:
            return value
        if default:
            return default[0]
        raise BadArgument(f"{self.owner}: the config has no {name!r}; it is not a config of this network")

    def whole(self, name: str, *default: int, low: int = 1) -> int:
        """A whole number from `low` to `MOST`."""
        value = self.get(name, *default)
        if not _is_number(value) or value != value // 1 or not low <= value <= MOST:
            self.refuse(name, f"a whole number from {low} to {MOST}")
        return int(value)

    def number(self, name: str, *default: float, low: float, high: float) -> float:
        """A number from `low` to `high`."""
        value = self.get(name, *default)
        if not _is_number(value) or not low <= value <= high:
            self.refuse(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def wholes(self, name: str, *default: tuple[int, ...], count: int = 0) -> tuple[int, ...]:
        """A list of whole numbers above 0, `count` of them if that is not 0."""
        value = self.get(name, *default)
        what = f"a list of {count or 'some'} whole numbers"
        if not isinstance(value, (list, tuple)) or not value or (count and len(value) != count):
            self.refuse(name, what)
        if not all(_is_number(n) and n == n // 1 and 0 < n <= MOST for n in value):
            self.refuse(name, what)
        return tuple(int(n) for n in value)

    def only(self, name: str, *allowed: object) -> None:
        """Refuse a value that asks for arithmetic which this library does not have."""
        value = self.get(name, None)
        if value is not None and not any(type(value) is type(each) and value == each for each in allowed):
            self.refuse(name, " or ".join(map(repr, allowed)) or "none", "; other values are not supported")

    def refuse(self, name: str, wanted: str, rest: str = "") -> NoReturn:
        """Raise BadArgument, naming the field, its value and what was wanted."""
        raise BadArgument(
            f"{self.owner}: {name} is {printable(repr(self.data.get(name)), 80)}, wanted {wanted}{rest}"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf
