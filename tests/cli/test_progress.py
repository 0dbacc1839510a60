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
    """A clock that advances when told to, beside a wide terminal."""
    monkeypatch.setattr(progress, "_columns", lambda: 200)
    monkeypatch.setenv("TERM", "xterm")
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


@pytest.mark.parametrize("columns", [200, 100, 40, 10, 2])
def test_a_line_is_cut_to_the_terminal(monkeypatch, columns):
    """A line that wraps leaves its upper part behind when it is redrawn."""
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr(progress, "_columns", lambda: columns)
    bar = Progress()
    bar.start("quantise")
    bar.weights(3, 4, "model.diffusion_model.layers.29.feed_forward.w2.weight")
    bar.start("图像" * 60)
    shown = out.getvalue().split("\r\x1b[K")[1:]
    width = [len(line) + sum(character > "\u2e80" for character in line) for line in shown]
    assert max(width) < columns
    assert columns < 200 or shown[1].endswith(".feed_forward.w2.weight")


def test_a_dumb_terminal_sees_plain_lines(clock, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    shown = run(Terminal(), clock, monkeypatch)
    assert "\x1b" not in shown
    assert "\r" not in shown


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
