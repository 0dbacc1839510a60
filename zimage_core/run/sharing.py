"""Runs of pipelines that share networks, as those of `from_pipe` do."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from weakref import WeakValueDictionary

from zimage_core.errors import Busy

_RAN: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""Pipelines that made a run."""


def note_run(pipe: Any) -> None:
    """Let pipelines that share networks know of a pipeline's runs."""
    _RAN[id(pipe)] = pipe


def refuse_while_running(pipe: Any, used: Collection[object]) -> None:
    """Refuse to change networks of a pipeline that it, or another pipeline, runs with.

    Raises:
        Busy: A run has not ended.
    """
    own = {id(network) for network in used}
    for each in (pipe, *(found for ref in _RAN.valuerefs() if (found := ref()) is not None)):
        if each._running and own & {id(network) for network in each._targets().values()}:
            whose = "the pipeline" if each is pipe else "a pipeline with the same networks"
            raise Busy(f"adapters cannot be changed while {whose} runs; wait until the run has ended")
