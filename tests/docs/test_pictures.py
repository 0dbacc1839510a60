"""Pictures in the docs can be read without seeing them."""

import re
from xml.etree import ElementTree

import pytest

from tests.helpers.examples import pages
from tests.helpers.tree import ROOT

SVG = "{http://www.w3.org/2000/svg}"
DRAWINGS = sorted((ROOT / "docs" / "images").rglob("*.svg"))


def name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", DRAWINGS, ids=name)
def test_a_drawing_has_a_title_and_a_description(path):
    tree = ElementTree.parse(path).getroot()
    assert tree.get("role") == "img"
    assert tree.get("aria-labelledby").split() == [
        tree.find(f"{SVG}title").get("id"),
        tree.find(f"{SVG}desc").get("id"),
    ]
    assert len(tree.find(f"{SVG}title").text) > 10
    assert len(tree.find(f"{SVG}desc").text) > 40


@pytest.mark.parametrize("page", pages(), ids=name)
def test_every_image_of_a_page_has_a_text(page):
    for text in re.findall(r"!\[(.*?)\]\(", page.read_text("utf-8"), re.S):
        assert len(text) > 10, f"{name(page)}: say what the image shows"
