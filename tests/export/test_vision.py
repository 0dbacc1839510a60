"""A vision tower is written as every other network: quantised, converted, saved; and reads back the same."""

from __future__ import annotations

import json

import pytest
import torch

from tests.helpers import omni, omni_pipeline
from tests.helpers.model_files import write_gguf
from tests.helpers.vision import mmproj_content, mmproj_keys, our_tower, safetensors_file, their_tower
from zimage_core.errors import Unsupported
from zimage_core.export.converting import convert_file
from zimage_core.export.pretrained import save_pretrained
from zimage_core.export.quantizing import quantize_file
from zimage_core.pipeline import ZImagePipeline
from zimage_core.vision.processor import Processor, processor_of
from zimage_core.weights.load import load_siglip

GRID = (4, 6)


@pytest.fixture
def folder(tmp_path):
    """transformers' folder of a tower of 64 channels, which blocks of 32 divide."""
    model = their_tower(hidden_size=64, intermediate_size=96)
    place = tmp_path / "siglip"
    place.mkdir()
    safetensors_file(place / "model.safetensors", model)
    (place / "config.json").write_text(json.dumps(model.config.to_dict()))
    return place


@torch.no_grad()
def features(tower):
    generator = torch.Generator().manual_seed(0)
    return tower(torch.randn(24, tower.config.patch_dim, generator=generator), GRID)


def test_a_quantised_tower_is_near_and_needs_no_config(folder, tmp_path):
    done = quantize_file(folder, tmp_path / "q.gguf", "Q8_0")
    assert done.types["Q8_0"] == 3 * 6
    assert not done.remarks
    tower, want = load_siglip(tmp_path / "q.gguf"), features(load_siglip(folder))
    assert tower.config == load_siglip(folder).config
    assert tower.embeddings.position_embedding.weight.dtype == torch.float32
    assert 0 < (features(tower) - want).norm() <= 0.03 * want.norm()


def test_int8_rows_are_read_again(folder, tmp_path):
    quantize_file(folder, tmp_path / "q.safetensors", "INT8_CONVROT")
    want = features(load_siglip(folder))
    assert 0 < (features(load_siglip(tmp_path / "q.safetensors")) - want).norm() <= 0.05 * want.norm()


@pytest.mark.parametrize("name", ["out.gguf", "out.safetensors", "out"])
def test_a_converted_tower_is_the_same_to_the_bit(folder, tmp_path, name):
    convert_file(folder, tmp_path / name)
    assert torch.equal(features(load_siglip(tmp_path / name)), features(load_siglip(folder)))


@pytest.mark.parity
def test_transformers_reads_what_is_saved(tmp_path):
    from transformers import Siglip2VisionModel

    model = their_tower()
    save_pretrained(our_tower(model), tmp_path / "siglip")
    theirs = Siglip2VisionModel.from_pretrained(tmp_path / "siglip")
    for name, value in model.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value)


def test_a_convolution_is_not_written_under_other_names(tmp_path):
    content = mmproj_content("F16", "mmproj conv")
    path = write_gguf(tmp_path / "m.gguf", content, mmproj_keys())
    with pytest.raises(Unsupported, match="its patch embedding is a convolution"):
        convert_file(path, tmp_path / "out")


def test_an_omni_pipeline_is_saved_with_its_tower_and_processor(tmp_path):
    pipe = ZImagePipeline.from_pretrained(omni_pipeline.write_folder(tmp_path / "source"))
    save_pretrained(pipe, tmp_path / "saved")
    again = ZImagePipeline.from_pretrained(tmp_path / "saved")
    assert processor_of(again.siglip) == processor_of(pipe.siglip) == Processor(16, omni_pipeline.PATCHES)
    assert torch.equal(
        omni.draw(again, reference_images=[omni.picture()]),
        omni.draw(pipe, reference_images=[omni.picture()]),
    )
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == "ZImageOmniPipeline"
    assert index["siglip_processor"] == ["transformers", "Siglip2ImageProcessor"]
