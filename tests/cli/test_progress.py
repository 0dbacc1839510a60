"""The bar redraws one line on a terminal and writes plain lines elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from zimage_core.cli import progress
from zimage_core.cli.progress import Progress
from zimage_core.files.units import in_bytes, in_count


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances when told to."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def run(out, clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", out)
    bar = Progress()
    bar.start("drawing")
    for step, duration in enumerate([5.0, 2.0, 2.0, 2.0], 1):
        clock[0] += duration
        bar.step(step, 4)
    bar.finish()
    return out.getvalue()


def test_a_terminal_sees_one_line_with_pace_and_rest(clock, monkeypatch):
    shown = run(Terminal(), clock, monkeypatch)
    assert "\n" not in shown
    frames = shown.split("\r\x1b[K")
    assert frames[2] == "[######..................] drawing 1/4 steps, 5.00 s a step, 15 s left"
    # the first step carries the text encoder: the pace is that of the others
    assert frames[4] == "[##################......] drawing 3/4 steps, 2.00 s a step, 2 s left"
    assert frames[-1] == ""


def test_a_file_sees_plain_lines(clock, monkeypatch):
    lines = run(io.StringIO(), clock, monkeypatch).splitlines()
    assert lines[-1] == "drawing 4/4 steps, 2.00 s a step"
    assert "\x1b" not in "".join(lines)


def test_quiet_shows_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = Progress(quiet=True)
    bar.start("drawing")
    bar.step(1, 1)
    bar.say("done")
    bar.finish()
    assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (3_456_789, "3.46 MB"), (5e15, "5e+03 TB")],
)
def test_bytes_are_shown_in_powers_of_ten(count, shown):
    assert in_bytes(count) == shown


@pytest.mark.parametrize(
    ("count", "shown"), [(1, "1"), (2048, "2.05 k"), (6_700_000, "6.7 M"), (6.15e9, "6.15 G")]
)
def test_counts_are_short(count, shown):
    assert in_count(count) == shown
