"""The image processor: transformers' patches to the bit, odd images, settings beside a tower, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.vision import CONFIG, image, safetensors_file, their_inputs, their_processor, their_tower
from zimage_core.errors import BadArgument, BadFile, BadShape, Unsupported
from zimage_core.models.vision_tower import VisionTower
from zimage_core.vision.processor import MOST_PIXELS, Processor, encode, processor_of
from zimage_core.weights.load import load_siglip

SIZES = [(64, 64), (300, 200), (17, 333), (1, 4000), (4000, 1), (1, 1), (7, 5), (256, 256), (700, 1300)]


@pytest.mark.parity
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_patches_are_those_of_transformers_to_the_bit(size):
    for options in ({}, {"max_num_patches": 100, "patch_size": 8}):
        pixels = image(*size)
        inputs = their_inputs(their_processor(**options), pixels)
        got, grid = Processor(**options).patches(pixels)
        assert grid == tuple(inputs.spatial_shapes[0].tolist())
        assert torch.equal(got, inputs.pixel_values[0, : len(got)])


@given(st.integers(1, 1 << 20), st.integers(1, 1 << 20), st.integers(1, 1024), st.integers(2, 32))
@settings(max_examples=200, deadline=None)
def test_any_image_has_one_patch_or_more_and_at_most_the_wanted_number(height, width, most, size):
    rows, columns = Processor(patch_size=size, max_num_patches=most).grid(height, width)
    assert rows >= 1
    assert columns >= 1
    assert rows * columns <= most


def test_an_image_that_is_too_long_and_thin_is_refused_before_anything_is_made():
    thin = np.broadcast_to(np.uint8(0), (MOST_PIXELS // 16 + 1, 1, 3))
    with pytest.raises(Unsupported, match=r"too long and thin for 1 x 25. patches"):
        Processor().patches(thin)


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 0, 3), np.uint8), torch.zeros(3, 4, 4)],
    ids=["floats", "grey", "empty", "tensor"],
)
def test_other_arrays_are_refused(pixels):
    with pytest.raises(BadShape, match=r"wanted uint8 \[H, W, 3\]"):
        Processor().patches(pixels)


@pytest.mark.parity
def test_a_config_file_of_transformers_is_read():
    options = {"max_num_patches": 100, "patch_size": 8, "image_mean": [0.1, 0.2, 0.3]}
    found = Processor.from_json(json.loads(their_processor(**options).to_json_string()))
    assert found == Processor(8, 100, (0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    "field",
    [
        {"image_processor_type": "SiglipImageProcessor"},
        {"do_resize": False},
        {"do_normalize": False},
        {"resample": 3},
        {"rescale_factor": 1.0},
        {"max_num_patches": 0},
        {"max_num_patches": 1 << 20},
        {"patch_size": "16"},
        {"image_mean": [0.5]},
        {"image_std": [0.5, 0.0, 0.5]},
        {"image_std": ["a", 1, 1]},
    ],
    ids=str,
)
def test_another_processor_is_refused_by_the_field(field):
    with pytest.raises(BadArgument, match=next(iter(field))):
        Processor.from_json(field)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "siglip").mkdir()
    (tmp_path / "siglip_processor").mkdir()
    safetensors_file(tmp_path / "siglip" / "model.safetensors", their_tower())
    (tmp_path / "siglip" / "config.json").write_text(json.dumps(their_tower().config.to_dict()))
    return tmp_path


@pytest.mark.parametrize("place", ["siglip", "siglip_processor"])
def test_the_processor_of_a_tower_is_what_lies_beside_it(folder, place):
    config = {"patch_size": 4, "max_num_patches": 30, "image_processor_type": "Siglip2ImageProcessor"}
    (folder / place / "preprocessor_config.json").write_text(json.dumps(config))
    tower = load_siglip(folder)
    assert processor_of(tower) == Processor(4, 30)
    rows, columns, width = encode(tower, image(40, 50)).shape
    assert rows * columns <= 30
    assert width == CONFIG.hidden_size


def test_without_a_file_the_patches_are_the_towers(folder):
    assert processor_of(load_siglip(folder)) == Processor(4)
    assert processor_of(VisionTower(CONFIG)) == Processor(4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"do_rescale": false}', "do_rescale is False"),
        ('{"patch_size": 8}', "patch_size is 8, that of the vision tower is 4"),
    ],
)
def test_a_file_of_another_processor_is_refused_by_its_path(folder, text, said):
    (folder / "siglip_processor" / "preprocessor_config.json").write_text(text)
    with pytest.raises(BadFile, match=f"preprocessor_config.json.*{said}"):
        processor_of(load_siglip(folder))


def test_a_processor_of_other_patches_is_refused():
    with pytest.raises(BadShape, match="vision tower: got patches"):
        encode(VisionTower(CONFIG), image(20, 20), replace(Processor(), patch_size=8))
