"""Where a network's blocks have their weights while they run: the seam between a block loop and a stream."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import nn


class BlockSource(Protocol):
    """Whoever brings the weights of a block to the device of the computation."""

    def block(self, index: int) -> AbstractContextManager[object]:
        """Inside the `with`, block `index` of the model's `blocks` may run; one block at a time."""

    def once(self, block: nn.Module) -> AbstractContextManager[object]:
        """Inside the `with`, a block that runs once for each caption may run: one of the context refiner."""


class Resident:
    """All weights are where the computation is, always."""

    def block(self, index: int) -> AbstractContextManager[object]:
        """Nothing to do."""
        return nullcontext()

    def once(self, block: nn.Module) -> AbstractContextManager[object]:
        """Nothing to do."""
        return nullcontext()


RESIDENT: BlockSource = Resident()
"""What every model starts with."""
