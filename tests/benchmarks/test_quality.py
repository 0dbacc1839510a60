"""The tables of docs/quality.md come from the results, a row a type, between their markers."""

from __future__ import annotations

import pytest

from benchmarks.quality import full_bytes, recipe, variants
from benchmarks.quality_table import fill, full, nano

RESULT = {
    "bytes": 6_340_000, "weights": 0.07033, "velocity": 0.0486, "psnr": 40.88, "ssim": 0.99678,
    "right": 59, "of": 60,
}  # fmt: skip
REPORT = {
    "results": {"Q4_K": RESULT, "Q4_K+imatrix": {**RESULT, "psnr": None, "right": 60}, "F16": RESULT},
    "random": {"Q4_K": {"gauss": 0.0692, "student": 0.0803, "bytes": 3_480_000_000}},
}


def test_rows_fall_by_bits_and_cells_hold_both_files():
    lines = nano(REPORT).splitlines()
    assert lines[2].startswith("| F16 | 16 | 6.34 MB | 7.03 % |")
    assert "| 4.5 | 6.34 MB | 7.03 % / 7.03 % | 4.86 % / 4.86 % | 40.9 / equal |" in lines[3]
    assert lines[3].endswith("| 98 % / 100 % |")
    assert full(REPORT).splitlines()[2] == "| Q4_K | 4.5 | 3.48 GB | 6.92 % | 8.03 % |"


def test_tables_are_put_between_their_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- begin nano -->\nold\n<!-- end nano -->\n<!-- begin full -->\n<!-- end full -->\nafter\n"
    )
    fill(page, REPORT)
    once = page.read_text()
    assert "old" not in once
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    fill(page, REPORT)
    assert page.read_text() == once
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="no place for the table nano"):
        fill(page, REPORT)


def test_a_6b_file_is_as_large_as_its_types_say():
    """The 34 blocks have 6.03e9 weights in matrices; floats around them are 0.02e9 in BF16."""
    assert full_bytes("BF16") == pytest.approx(12.3e9, rel=0.02)
    assert full_bytes("Q4_K") / full_bytes("BF16") == pytest.approx(4.5 / 16, rel=0.02)
    assert recipe("Q4_K").type_of("layers.3.attention.qkv.weight", 30) == "Q4_K"
    assert recipe("Q4_K").type_of("x_embedder.weight", 30) == "source"


def test_plain_numbers_take_no_importance():
    assert list(variants(["F16", "Q4_K"])) == [("F16", False), ("Q4_K", False), ("Q4_K", True)]
