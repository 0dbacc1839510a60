"""Numbers as people read them."""

from __future__ import annotations


def in_bytes(count: float) -> str:
    """3456789 -> 3.46 MB; powers of ten, as file managers show."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"


def in_count(count: float) -> str:
    """6700000 -> 6.7 M."""
    for unit in ("", " k", " M"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} G"
