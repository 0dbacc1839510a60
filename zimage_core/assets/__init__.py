"""The embedded nano model, as data files."""

from __future__ import annotations

from pathlib import Path

NANO = Path(__file__).parent / "nano"
"""The folder of the embedded model."""
