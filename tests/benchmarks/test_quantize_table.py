"""The tables of docs/quantizing.md are those of the raw figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import quantize_table
from benchmarks.report import RESULTS, fill_tables

ROOT = Path(__file__).parents[2]


def rows(name, key):
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))[key]


def test_the_page_has_the_tables_of_the_figures():
    page = (ROOT / quantize_table.PAGE).read_text("utf-8")
    assert quantize_table.errors(rows("quantize_errors", "errors")) in page
    assert quantize_table.ones(rows("quantize_errors", "errors")) in page
    assert quantize_table.speed(rows("quantize_speed", "speed")) in page
    found = json.loads((RESULTS / "recipe_search.json").read_text("utf-8"))
    assert quantize_table.recipes(found) in page


def test_a_page_without_the_place_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- begin a -->\nold\n<!-- end a -->\n")
    fill_tables(page, {"a": "| new |"})
    assert page.read_text() == "<!-- begin a -->\n\n| new |\n\n<!-- end a -->\n"
    with pytest.raises(SystemExit, match="no place for the table b"):
        fill_tables(page, {"b": ""})


def test_searched_recipes_beat_the_mixes_at_equal_size():
    for size in rows("recipe_search", "sizes").values():
        mix = size["choices"]["mix"]
        for how in ("tensors of the mixes", "every tensor"):
            found = size["choices"][how]
            assert found["bytes"] <= mix["bytes"]
            assert found["velocity"] < mix["velocity"]
            assert found["psnr"] > mix["psnr"]
