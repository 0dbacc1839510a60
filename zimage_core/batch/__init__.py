"""Many prompts from a table: rows in, datasets out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zimage_core.batch.dataset import Report, generate_dataset

__all__ = ["Report", "generate_dataset"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from zimage_core.batch import dataset

        return getattr(dataset, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
