"""What a run moved and when, as one page of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from zimage_core.files.units import in_bytes, in_seconds
from zimage_core.memory.traffic import Span, Traffic

LANES = {"read": "#9db8d9", "copy": "#3b6ea8", "stall": "#d1495b", "compute": "#6aa56a"}
"""Lane -> colour, from top to bottom."""
WIDTH, ROW, LEFT = 1200, 26, 80
"""Pixels of the drawing, of a lane, of its name."""


def page(traffic: Mapping[str, Traffic], reasons: tuple[str, ...] = ()) -> str:
    """A drawing for each network: time to the right, a lane each for reading, copying, waiting and computing.

    Args:
        traffic: Network -> what was moved of it.
        reasons: Sentences of the plan, printed below.
    """
    parts = [_network(name, each) for name, each in traffic.items() if each.timeline]
    notes = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    body = "".join(parts) or "<p>Nothing was streamed: all weights were on the device.</p>"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>streamed weights</title>'
        "<style>body{font:14px sans-serif;margin:2em}svg{border:1px solid #ccc}</style>"
        f"{body}<ul>{notes}</ul></html>\n"
    )


def summary(name: str, traffic: Traffic) -> str:
    """One line: bytes, rate, what of it was hidden."""
    return (
        f"{name.replace('_', ' ')}: {in_bytes(traffic.bytes_moved)} streamed at {in_bytes(traffic.rate)}/s, "
        f"{traffic.overlap:.0%} behind the computation, waited {in_seconds(traffic.stall_seconds)}"
    )


def _network(name: str, traffic: Traffic) -> str:
    start = min(span.start for span in traffic.timeline)
    length = max(max(span.end for span in traffic.timeline) - start, 1e-9)
    rows = list(LANES)
    bars = "".join(_bar(span, start, length, rows.index(span.lane)) for span in traffic.timeline)
    names = "".join(f'<text x="4" y="{ROW * i + 18}">{lane}</text>' for i, lane in enumerate(rows))
    height = ROW * len(rows)
    return (
        f"<h2>{escape(summary(name, traffic))}</h2>"
        f'<svg width="{WIDTH + LEFT}" height="{height + 20}" font-size="12">{names}{bars}'
        f'<text x="{LEFT}" y="{height + 15}">0 s</text>'
        f'<text x="{WIDTH + LEFT}" y="{height + 15}" text-anchor="end">{length:.2f} s</text></svg>'
    )


def _bar(span: Span, start: float, length: float, row: int) -> str:
    left = LEFT + WIDTH * (span.start - start) / length
    width = max(0.5, WIDTH * (span.end - span.start) / length)
    return (
        f'<rect x="{left:.1f}" y="{ROW * row + 4}" width="{width:.1f}" height="{ROW - 8}" '
        f'fill="{LANES[span.lane]}"><title>{span.lane} of block {span.block}: '
        f"{1000 * (span.end - span.start):.1f} ms</title></rect>"
    )
