"""docs/kernels.md shows the committed matrix."""

from __future__ import annotations

from benchmarks import compile_table


def test_the_page_is_what_the_matrix_says():
    page = compile_table.DOCS.read_text("utf-8")
    assert compile_table.updated(page, compile_table.read()) == page, "python -m benchmarks.compile_table"


def test_a_changed_count_would_be_seen():
    rows = compile_table.read()
    changed = [{**row, "instructions": "1600"} if row["kernel"] == "dequantize" else row for row in rows]
    assert compile_table.table(rows) != compile_table.table(changed)
