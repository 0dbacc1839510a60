"""How many threads a run on a CPU is worth, and whether the user chose their number."""

from __future__ import annotations

import os

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user chooses the number; torch reads them when it is loaded."""
SMALL_STEP = 5e9
"""Operations of a step below which one thread is quicker than several that wait for each other at each
layer. A step of the embedded model has 1e9, one of Z-Image at 256 x 256 has 5e12."""


def chosen() -> bool:
    """Whether the user chose the number of threads."""
    return any(name in os.environ for name in VARIABLES)
