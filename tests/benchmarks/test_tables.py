"""The generated tables of the docs are those of the committed results."""

from __future__ import annotations

import pytest

from benchmarks.quality import full_bytes, recipe
from benchmarks.report import compiled_rows, with_tables
from benchmarks.tables import PAGES, counts


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_has_the_tables_of_the_results(page):
    text = page.read_text("utf-8")
    assert with_tables(text, PAGES[page]()) == text, "python -m benchmarks.tables"


def test_a_changed_count_would_be_seen():
    rows = compiled_rows()
    changed = [{**row, "instructions": "1600"} if row["kernel"] == "dequantize" else row for row in rows]
    assert counts(rows) != counts(changed)


def test_a_page_without_the_place_is_refused():
    page = "<!-- begin a: python -m x -->\nold\n<!-- end a -->\n<!-- begin ab -->\n<!-- end ab -->\n"
    filled = with_tables(page, {"a": "| new |"})
    assert filled.startswith("<!-- begin a: python -m x -->\n\n| new |\n\n<!-- end a -->\n<!-- begin ab -->")
    assert with_tables(filled, {"a": "| new |"}) == filled
    for bad in (page.replace("end a ", "end b "), page * 2):
        with pytest.raises(SystemExit, match="places for the table a where"):
            with_tables(bad, {"a": ""})


def test_a_6b_file_is_as_large_as_its_types_say():
    """The 34 blocks have 6.03e9 weights in matrices; floats around them are 0.02e9 in BF16."""
    assert full_bytes("BF16") == pytest.approx(12.3e9, rel=0.02)
    assert full_bytes("Q4_K") / full_bytes("BF16") == pytest.approx(4.5 / 16, rel=0.02)
    assert recipe("Q4_K").type_of("layers.3.attention.qkv.weight", 30) == "Q4_K"
    assert recipe("Q4_K").type_of("x_embedder.weight", 30) == "source"
