"""The table of `zimage doctor --paths`: which way each format takes to a product, and why."""

from __future__ import annotations

from typing import Any

from zimage_core.errors import Unsupported
from zimage_core.files.units import in_bytes
from zimage_core.formats import FORMATS
from zimage_core.quant.dispatch import Choice, choose, crossover

ROWS, WIDTH = 10240, 3840
"""The widest matrix of S3-DiT, w1 and w3."""
TOKENS = {"adaptive norms": 8, "short prompt": 32, "256 px": 288, "512 px": 1056, "1024 px": 4128}
"""Rows of x: steps of a run, tokens of a caption, tokens of picture and caption."""


def paths(architecture: str, free_bytes: int, mode: str = "auto") -> list[dict[str, Any]]:
    """For each block format: the path at each of TOKENS, the reason at the last, and the crossover.

    Raises:
        BadArgument: The architecture or the mode is not known.
    """
    found = []
    for fmt in FORMATS.values():
        if fmt.weights == 1:
            continue
        choices = [_choose(fmt.name, tokens, architecture, free_bytes, mode) for tokens in TOKENS.values()]
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


def _choose(name: str, tokens: int, architecture: str, free_bytes: int, mode: str) -> Choice:
    try:
        return choose(name, ROWS, WIDTH, tokens, architecture, free_bytes, mode)
    except Unsupported as error:
        return Choice("refused", str(error))


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
