"""A hook on the steps of a transformer, like torch's hooks on calls of modules."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

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
        step = transformer.step

        def watched(
            latent: Tensor, prepared: Prepared, i: int, caption: int = 0, predict: Predict | None = None
        ) -> Tensor:
            if before is not None:
                before(latent, prepared, i, caption)
            out = step(latent, prepared, i, caption, predict)
            if after is not None:
                after(latent, prepared, i, caption, out)
            return out

        self._transformer = transformer
        transformer.step = watched  # type: ignore[method-assign]  # hides the method of the class

    def remove(self) -> None:
        """Restore the transformer's own method."""
        del self._transformer.step
