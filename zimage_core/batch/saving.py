"""Saves images in a thread of its own, while the next one is drawn."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from zimage_core.batch.worker import Done, Failed

WAITING = 2
"""Most images that wait to be saved; a disk that is slower than the drawing then holds the drawing up."""

Finish = Callable[[], "Done | Failed"]
"""The last part of the work on a row, such as encoding its PNG."""


class Saver:
    """A thread that finishes images and hands them to a writer, in the order in which they came.

    Args:
        write: What takes each outcome.
    """

    def __init__(self, write: Callable[[Done | Failed], None]) -> None:
        self._write = write
        self._queue: queue.Queue[Finish | Done | Failed | None] = queue.Queue(WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="zimage-batch-saver", daemon=True)
        self._thread.start()

    def put(self, result: Finish | Done | Failed) -> None:
        """Queue the outcome of a row, or the last part of the work on it.

        Raises:
            BadFile: An earlier image could not be saved.
        """
        self._raise()
        self._queue.put(result)

    def close(self) -> None:
        """Wait until everything is saved.

        Raises:
            BadFile: An image could not be saved.
        """
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (result := self._queue.get()) is not None:
            if self._error is not None:
                continue  # the queue is emptied, so that nobody waits for a place in it
            try:
                self._write(result if isinstance(result, (Done, Failed)) else result())
            except BaseException as error:  # noqa: BLE001  raised again in the thread that puts
                self._error = error
