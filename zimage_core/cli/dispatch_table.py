"""The table of `zimage doctor --paths`: how each format is multiplied, and why."""

from __future__ import annotations

from typing import Any

from zimage_core.files.units import in_bytes
from zimage_core.formats import FORMATS
from zimage_core.quant.dispatch import choose, crossover

ROWS, WIDTH = 10240, 3840
"""The widest matrix of S3-DiT, w1 and w3."""
TOKENS = {"adaptive norms": 8, "short prompt": 32, "256 px": 288, "512 px": 1056, "1024 px": 4128}
"""Rows of x: steps of a run, tokens of a caption, tokens of image and caption."""


def paths(architecture: str, free_bytes: int) -> list[dict[str, Any]]:
    """For each block format: the path at each of TOKENS, the reason at the last, and the crossover.

    Raises:
        BadArgument: The architecture is not known.
    """
    found = []
    for fmt in (each for each in FORMATS.values() if each.weights > 1):
        choices = [choose(fmt.name, ROWS, WIDTH, m, architecture, free_bytes) for m in TOKENS.values()]
        found.append(
            {
                "format": fmt.name,
                "crossover": crossover(fmt, architecture),
                "paths": dict(zip(TOKENS, (choice.path for choice in choices), strict=True)),
                "reason": choices[-1].reason,
                "nbytes": max(choice.nbytes for choice in choices),
            }
        )
    return found


def lines(architecture: str, free_bytes: int, found: list[dict[str, Any]]) -> list[str]:
    """The table as text."""
    head = [f"paths of a {ROWS} x {WIDTH} weight on {architecture}, {in_bytes(free_bytes)} free"]
    head.append(
        "  " + f"{'format':<10}" + "".join(f"{f'{what} ({m})':>21}" for what, m in TOKENS.items()) + "  why"
    )
    rows = [
        f"  {row['format']:<10}"
        + "".join(f"{path:>21}" for path in row["paths"].values())
        + f"  {row['reason']}"
        for row in found
    ]
    return head + rows
