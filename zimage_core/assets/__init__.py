"""The embedded nano model, as data files."""

from __future__ import annotations

import os
from pathlib import Path

NANO = Path(__file__).parent / "nano"
"""The folder of the embedded model."""

DEFAULT = "default"
"""The name of the embedded model, wherever a folder is wanted; a file or folder of this name comes first."""


def named(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The folder of the embedded model for its name, and any other path as it is."""
    return NANO if os.fspath(path) == DEFAULT and not os.path.lexists(path) else path
