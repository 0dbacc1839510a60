"""Interface between a loop over blocks and the source of their weights, such as a stream."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import nn


class BlockSource(Protocol):
    """Makes the weights of a block available on the device of the computation."""

    def block(self, index: int) -> AbstractContextManager[object]:
        """Context in which block `index` of the model's `blocks` may run; one block at a time."""

    def once(self, block: nn.Module) -> AbstractContextManager[object]:
        """Context in which a block of the context refiner may run; it runs once per caption."""


class Resident:
    """Block source for a model whose weights are all on the device of the computation."""

    def block(self, index: int) -> AbstractContextManager[object]:
        """Nothing to do."""
        return nullcontext()

    def once(self, block: nn.Module) -> AbstractContextManager[object]:
        """Nothing to do."""
        return nullcontext()


RESIDENT: BlockSource = Resident()
"""The block source of every new model."""
