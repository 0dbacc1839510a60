"""A hook on the steps of a transformer, like torch's hooks on calls of modules."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from zimage_core.models import transformer as s3_dit
from zimage_core.models.transformer import Predict, Prepared, ZImageTransformer

Before = Callable[[Tensor, Prepared, int, int], object]
After = Callable[[Tensor, Prepared, int, int, Tensor], object]


class StepHook:
    """Calls functions before and after each `step` of a transformer, until it is removed.

    Args:
        transformer: The transformer, which must have no other StepHook.
        before: Called before a step as before(latent, prepared, step, caption).
        after: Called after a step as after(latent, prepared, step, caption, estimate).
    """

    def __init__(
        self, transformer: ZImageTransformer, before: Before | None = None, after: After | None = None
    ) -> None:
        step, begin, end = transformer.step, before, after

        def watched(
            latent: Tensor,
            prepared: Prepared,
            i: int,
            caption: int = 0,
            predict: Predict | None = None,
            after: s3_dit.After | None = None,
        ) -> Tensor:
            if begin is not None:
                begin(latent, prepared, i, caption)
            out = step(latent, prepared, i, caption, predict, after)
            if end is not None:
                end(latent, prepared, i, caption, out)
            return out

        self._transformer = transformer
        transformer.step = watched  # type: ignore[method-assign]  # hides the method of the class

    def remove(self) -> None:
        """Restore the transformer's own method."""
        del self._transformer.step
