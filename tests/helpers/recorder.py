"""Records work for `zimage_core.nn.cuda_graphs` without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Recorder:
    """A graph that runs its work again in the same place: all that replaying means, without a GPU."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(
        self, work: Callable[[], torch.Tensor], device: torch.device
    ) -> tuple[Callable[[], None], torch.Tensor]:
        self.recorded += 1
        out = work()

        def replay() -> None:
            self.replayed += 1
            out.copy_(work())

        return replay, out
