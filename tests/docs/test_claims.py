"""What docs/explanation/claims.md shows as output is what its examples printed."""

import pytest

from benchmarks.report import read
from tests.helpers import examples
from tests.helpers.tree import ROOT

PAGES = [
    path for path in ("explanation/claims.md", "zh/explanation/claims.md") if (ROOT / "docs" / path).exists()
]


@pytest.mark.parametrize("page", PAGES)
def test_the_outputs_of_the_page_are_the_measured_ones(page):
    blocks = examples.blocks((ROOT / "docs" / page).read_text("utf-8"))
    shown = [block.text for block in blocks if block.language == "text"]
    assert shown == read("claims.json")["printed"], "run python -m benchmarks.claims and copy its output"
