"""The vision tower is transformers' Siglip2VisionModel; the limits are derived in tests/helpers/parity.py."""

import pytest

from tests.helpers.vision import GRIDS, IMAGES, picture_difference, vision_differences

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_hidden_states_without_padding_are_those_with_padding_and_mask(grid):
    for difference in vision_differences(grid):
        assert difference.passes, difference
        assert difference.float32 <= 1e-5, difference


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_features_of_an_image_file_are_those_of_transformers(path):
    difference = picture_difference(path)
    assert difference.passes, difference
    assert difference.float32 <= 1e-5, difference
