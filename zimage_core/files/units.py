"""Formats bytes, counts and seconds for display, and parses amounts such as "6GiB"."""

from __future__ import annotations

import re

from zimage_core.errors import BadArgument, printable

_UNITS = {
    "": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "kib": 1 << 10, "mib": 1 << 20,
    "gib": 1 << 30, "tib": 1 << 40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_AMOUNT = re.compile(r"\s*(\d{1,18}(?:\.\d{0,9})?|\.\d{1,9})\s*([a-z]{0,3})\s*", re.IGNORECASE)
MOST_BYTES = 1 << 50


def in_bytes(count: float) -> str:
    """Bytes with a unit of a power of ten, as file managers show: 3456789 -> 3.46 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def in_count(count: float) -> str:
    """A count with a unit of a power of ten: 6700000 -> 6.7 M."""
    for unit in ("", " k", " M"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} G"


def in_seconds(seconds: float) -> str:
    """Seconds with two digits: 0.0123 -> 12 ms; 3.14 -> 3.1 s."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.2g} ms"
    return f"{seconds:.2g} s" if seconds < 99.5 else f"{seconds:.0f} s"


def parse_bytes(name: str, value: object) -> int:
    """Parse a number of bytes: 6442450944, "6GiB", "6GB", "6g"; a bare G means GiB, as for memory sizes.

    Args:
        name: Name of the argument, for the message.
        value: Whole number or text.

    Raises:
        BadArgument: The value is neither, or not between 1 byte and 1 PiB.
    """
    count = 0
    if isinstance(value, int) and not isinstance(value, bool):
        count = value
    elif isinstance(value, str) and (match := _AMOUNT.fullmatch(value)):
        unit = _UNITS.get(match[2].lower())
        count = 0 if unit is None else int(float(match[1]) * unit)
    if not 1 <= count <= MOST_BYTES:
        shown = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else printable(value, 60)
        raise BadArgument(f"{name}: got {shown}, wanted bytes up to 1 PiB, such as 6GiB, 6GB or 6442450944")
    return count
