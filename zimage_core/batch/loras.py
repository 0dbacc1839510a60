"""Adapters that change from row to row, without loading the model again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zimage_core.run.checks import free_name

if TYPE_CHECKING:
    from zimage_core.pipeline import ZImagePipeline

MOST_LOADED = 8
"""Most adapters of rows that stay loaded for later ones."""


class Switch:
    """The adapters of a pipeline, exchanged for those of each row.

    An adapter has the name that it would have if it were the row's alone, since the name is part of an
    image's settings.

    Args:
        pipe: The pipeline. Adapters that are active stay active, before those of the rows.
    """

    def __init__(self, pipe: ZImagePipeline) -> None:
        self._pipe = pipe
        self._own: dict[str, float] = {
            each.name: each.weight for each in pipe.loras if each.weight is not None
        }
        self._taken = [each.name for each in pipe.loras]
        self._loaded: dict[str, str] = {}  # name -> file, the least recently used first
        self._active: dict[str, float] = {}

    def use(self, loras: Sequence[tuple[str, float]]) -> None:
        """Let these adapters act from the next run on, and none of an earlier row.

        Args:
            loras: Files and weights, in their order.

        Raises:
            ZImageError: A file cannot be loaded; the adapters that were loaded before it stay.
        """
        wanted: dict[str, tuple[str, float]] = {}
        for path, weight in loras:
            name = free_name(Path(path).stem or "lora", (*self._taken, *wanted))
            wanted[name] = path, weight
        weights = {name: weight for name, (_, weight) in wanted.items()}
        same = all(self._loaded.get(name) == path for name, (path, _) in wanted.items())
        if same and list(weights.items()) == list(self._active.items()):
            return
        for name, (path, weight) in wanted.items():
            if self._loaded.get(name, path) != path:
                self._unload(name)
            if name in self._loaded:
                self._loaded[name] = self._loaded.pop(name)
                continue
            self._make_room(wanted)
            self._pipe.load_lora(path, weight, name)
            self._loaded[name] = path
            self._active[name] = weight
        self._activate(weights)

    def restore(self) -> None:
        """Unload the adapters of the rows, so that the pipeline is as it was."""
        for name in list(self._loaded):
            self._unload(name)
        if self._active:
            self._activate({})

    def _activate(self, weights: dict[str, float]) -> None:
        chosen = {**self._own, **weights}
        self._pipe.set_adapters(list(chosen), list(chosen.values()) or None)
        self._active = weights

    def _make_room(self, wanted: dict[str, tuple[str, float]]) -> None:
        idle = [name for name in self._loaded if name not in wanted]
        if len(self._loaded) >= MOST_LOADED and idle:
            self._unload(idle[0])

    def _unload(self, name: str) -> None:
        self._pipe.unload_lora(name)
        del self._loaded[name]
        self._active.pop(name, None)
