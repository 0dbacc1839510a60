"""A checkpoint compared with diffusers, block by block: `compare_with`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zimage_core.parity.compare import compare_with
    from zimage_core.parity.report import Block, Component, ParityReport

__all__ = ["Block", "Component", "ParityReport", "compare_with"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "compare" if name == "compare_with" else "report"
    return getattr(import_module(f"{__name__}.{module}"), name)
