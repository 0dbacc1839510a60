"""The page of what was moved: every span is there, inside the drawing, and names cannot break it."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from zimage_core.memory import traffic as timeline
from zimage_core.memory.traffic import Span, Traffic


def traffic():
    spans = (
        Span("read", 0, 10.0, 10.5), Span("copy", 0, 10.0, 11.0), Span("stall", 0, 10.0, 11.0),
        Span("compute", 0, 11.0, 14.0), Span("copy", 1, 11.0, 12.0), Span("compute", 1, 14.0, 20.0),
    )  # fmt: skip
    return Traffic(3_000_000_000, 2, 2.0, 1.0, (1.0,), spans)


def test_every_span_is_drawn_to_scale():
    page = timeline.page({"transformer": traffic()}, ("so & so",))
    svg = ElementTree.fromstring(re.search(r"<svg.*</svg>", page)[0])
    bars = [(float(r.get("x")), float(r.get("width")), r[0].text) for r in svg if r.tag == "rect"]
    assert len(bars) == 6
    assert all(x >= timeline.LEFT and x + w <= timeline.LEFT + timeline.WIDTH + 1 for x, w, _ in bars)
    widths = {text: w for _, w, text in bars}
    assert widths["compute of block 1: 6000.0 ms"] == 2 * widths["compute of block 0: 3000.0 ms"]
    assert "so &amp; so" in page


def test_the_summary_counts_what_was_hidden():
    assert timeline.summary("text_encoder", traffic()) == (
        "text encoder: 3 GB streamed at 1.5 GB/s, 50% behind the computation, waited 1 s"
    )


def test_nothing_streamed_is_said():
    assert "Nothing was streamed" in timeline.page({"transformer": Traffic()})
