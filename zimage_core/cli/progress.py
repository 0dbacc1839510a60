"""Progress bars on stderr: one line that is redrawn on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from zimage_core.files.units import in_count

WIDTH = 24


class Progress:
    """Steps of one or more images, with the time a step takes.

    Args:
        quiet: Show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._out = None if quiet else sys.stderr
        self._terminal = not quiet and sys.stderr.isatty()
        self._label = ""
        self._started = self._first = 0.0

    def say(self, text: str) -> None:
        """One plain line, such as what is being loaded."""
        if self._out is not None:
            self._clear()
            self._out.write(f"{text}\n")
            self._out.flush()

    def start(self, label: str) -> None:
        """A new image begins."""
        self._label = label
        self._started = self._first = time.perf_counter()
        if self._terminal and self._out is not None:
            self._out.write(f"\r\x1b[K{label} ...")
            self._out.flush()

    def step(self, done: int, total: int, what: str = "steps", each: str = "a step") -> None:
        """`done` of `total` steps (or what they are called) are finished."""
        if self._out is None:
            return
        now = time.perf_counter()
        if done == 1:
            self._first = now  # the first step carries the text encoder and warm-up: not typical
        pace = (now - self._first) / (done - 1) if done > 1 else now - self._started
        text = f"{self._label} {done}/{total} {what}, {pace:.2f} s {each}"
        if self._terminal:
            filled = WIDTH * done // max(total, 1)
            bar = "#" * filled + "." * (WIDTH - filled)
            self._out.write(f"\r\x1b[K[{bar}] {text}, {pace * (total - done):.0f} s left")
        elif done == total or done % max(1, total // 4) == 0:
            self._out.write(f"{text}\n")
        self._out.flush()

    def finish(self) -> None:
        """The image is done; the bar makes room."""
        self._clear()

    def _clear(self) -> None:
        if self._terminal and self._out is not None:
            self._out.write("\r\x1b[K")
            self._out.flush()


class Work(Progress):
    """A long job that is measured in weights.

    Args:
        quiet: Show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        super().__init__(quiet)
        self._shown = 0.0
        self._quarter = 0
        self._skipped = -1

    def work(self, done: int, total: int, name: str) -> None:
        """`done` of `total` weights are finished, the last of them in tensor `name`."""
        if self._out is None:
            return
        now = time.perf_counter()
        if self._skipped < 0:
            self._skipped = done  # what was there already says nothing about the pace
            self._first = now
        if self._terminal:
            if now - self._shown < 0.1 and done < total:
                return
            self._shown = now
            filled = WIDTH * done // max(total, 1)
            bar = "#" * filled + "." * (WIDTH - filled)
            pace = (done - self._skipped) / max(now - self._first, 1e-9)
            left = f", {(total - done) / pace:.0f} s left" if pace else ""
            text = f"{self._label} {in_count(done)} of {in_count(total)} weights{left}  {name[-40:]}"
            self._out.write(f"\r\x1b[K[{bar}] {text}")
        elif 4 * done // max(total, 1) > self._quarter:
            self._quarter = 4 * done // max(total, 1)
            self._out.write(f"{self._label} {in_count(done)} of {in_count(total)} weights\n")
        self._out.flush()
