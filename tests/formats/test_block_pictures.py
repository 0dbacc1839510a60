"""The pictures of blocks in the docs are what the descriptors and the reference say."""

from xml.etree import ElementTree

import pytest

from tests.helpers import block_pictures
from zimage_core.formats import FORMATS

formats = pytest.mark.parametrize("name", block_pictures.PICTURES)
SVG = "{http://www.w3.org/2000/svg}"


@formats
def test_a_committed_picture_is_up_to_date(name):
    path = block_pictures.FOLDER / f"{name.lower()}.svg"
    assert path.read_text("utf-8") == block_pictures.draw(name), "run python -m tests.helpers.block_pictures"


@formats
def test_a_picture_has_a_cell_for_each_byte_and_words_for_a_screen_reader(name):
    tree = ElementTree.parse(block_pictures.FOLDER / f"{name.lower()}.svg").getroot()
    size = str(block_pictures.CELL)
    cells = [r for r in tree.iter(f"{SVG}rect") if (r.get("width"), r.get("height")) == (size, size)]
    assert len(cells) == FORMATS[name].nbytes
    assert tree.get("role") == "img"
    assert tree.find(f"{SVG}title").text.startswith(f"{name}: ")
    assert tree.find(f"{SVG}desc").text == block_pictures.describe(name)


@pytest.mark.parametrize(
    ("name", "weight", "bits"),
    [
        # Q4_0, the layout by hand: d, then weight 20 is the high nibble of byte 2 + 4
        ("Q4_0", 20, [*range(16), *range(8 * 6 + 4, 8 * 7)]),
        ("Q8_0", 20, [*range(16), *range(8 * 22, 8 * 23)]),
    ],
)
def test_the_bits_of_a_weight_are_found(name, weight, bits):
    assert block_pictures.bits_of(FORMATS[name], weight) == bits
