"""Bytes, counts and seconds written for people."""

from __future__ import annotations


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
