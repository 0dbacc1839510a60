"""Progress on stderr: one line that is redrawn on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
import unicodedata

from zimage_core.files.units import in_count

WIDTH = 24
"""Characters of the bar."""
PAUSE = 0.1
"""Seconds between two bars of a job that is counted in weights."""


class Progress:
    """Progress of one job after another, each counted in steps or in weights, with the time that is left.

    Args:
        quiet: Show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._out = None if quiet else sys.stderr
        self._terminal = not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._label = ""
        self._started = self._first = self._shown = 0.0
        self._quarter = 0

    def say(self, text: str) -> None:
        """Write one plain line, such as what is being loaded."""
        self.finish()
        self._write(f"{text}\n")

    def start(self, label: str) -> None:
        """Begin a job, such as the next image."""
        self._label = label
        self._started = self._first = time.perf_counter()
        self._shown = 0.0
        self._quarter = 0
        if self._terminal:
            self._redraw(f"{label} ...")

    def step(self, done: int, total: int, what: str = "steps", each: str = "a step") -> None:
        """Show that `done` of `total` steps, or whatever `what` names, are finished."""
        now = time.perf_counter()
        if done == 1:
            self._first = now  # the first step carries the text encoder and warm-up: not typical
        pace = (now - self._first) / (done - 1) if done > 1 else now - self._started
        text = f"{self._label} {done}/{total} {what}, {pace:.2f} s {each}"
        self._draw(done, total, text, f", {pace * (total - done):.0f} s left")

    def weights(self, done: int, total: int, name: str) -> None:
        """Show that `done` of `total` weights are finished, the last of them in tensor `name`."""
        now = time.perf_counter()
        if self._terminal and done < total and now - self._shown < PAUSE:
            return
        self._shown = now
        left = (now - self._started) * (total - done) / max(done, 1)
        text = f"{self._label} {in_count(done)} of {in_count(total)} weights"
        self._draw(done, total, text, f", {left:.0f} s left  {name[-40:]}")

    def count(self, done: int, total: int, text: str, rest: str) -> None:
        """Show a text of the caller's, and on a terminal `rest` behind it."""
        self._draw(done, total, text, rest)

    def finish(self) -> None:
        """Clear the bar for what is written next."""
        if self._terminal:
            self._write("\r\x1b[K")

    def _draw(self, done: int, total: int, text: str, rest: str) -> None:
        """Show `text` at each quarter of a job, or, on a terminal, the bar with `text` and `rest`."""
        if self._terminal:
            filled = "#" * (WIDTH * done // max(total, 1))
            self._redraw(f"[{filled:.<{WIDTH}}] {text}{rest}")
        elif 4 * done // max(total, 1) > self._quarter:
            self._quarter = 4 * done // max(total, 1)
            self._write(f"{text}\n")

    def _redraw(self, text: str) -> None:
        """Show text in place of the line that is there, cut to the terminal: what wraps is never cleared."""
        self._write(f"\r\x1b[K{_cut(text, _columns() - 1)}")

    def _write(self, text: str) -> None:
        if self._out is not None:
            self._out.write(text)
            self._out.flush()


def _columns() -> int:
    """Width of the terminal on stderr, which may change at any time."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _cut(text: str, columns: int) -> str:
    """Text that takes at most so many columns, of which wide characters take two."""
    if len(text) * 2 <= columns:
        return text
    for end, character in enumerate(text):
        columns -= 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if columns < 0:
            return text[:end]
    return text
