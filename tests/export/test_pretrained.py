"""save_pretrained: a folder that this library and diffusers load, with the weights as they are in memory."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from torch import nn

from tests.helpers import tiny
from zimage_core import BadArgument, BadFile, Unsupported, ZImagePipeline, save_pretrained
from zimage_core.models.transformer import ZImageTransformer

RUN = {"seed": 1, "guidance_scale": 0.0,
       "height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("pretrained") / "m", shift=6.0)


def test_an_edited_pipeline_gives_the_same_image_in_both_libraries(folder, tmp_path):
    pipe = ZImagePipeline.from_pretrained(folder)
    pipe.sample_size = 32
    layer = pipe.transformer.layers[0].attention.to_v
    layer.weight = nn.Parameter(-layer.weight.detach())
    mine = pipe("a", **RUN)
    pipe.save_pretrained(tmp_path / "out")
    again = ZImagePipeline.from_pretrained(tmp_path / "out")
    assert again.sample_size == 32
    assert again.scheduler == pipe.scheduler
    assert again.limits == pipe.limits
    assert torch.equal(mine.images, again("a", **RUN).images)
    theirs = diffusers.ZImagePipeline.from_pretrained(tmp_path / "out")
    theirs.set_progress_bar_config(disable=True)
    there = theirs(
        "a", 32, 32, 2, guidance_scale=0.0, generator=torch.Generator().manual_seed(1), output_type="latent"
    ).images
    assert float((mine.images - there).abs().max()) < 1e-4


def test_a_component_that_is_none_stays_none(tmp_path):
    pipe = tiny.pipeline()
    part = ZImagePipeline(pipe.scheduler, transformer=pipe.transformer)
    part.save_pretrained(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["vae"] == index["tokenizer"] == [None, None]
    none = {"text_encoder": None, "vae": None}
    again = ZImagePipeline.from_pretrained(tmp_path / "out", **none)
    assert again.vae is None
    assert torch.equal(again.transformer.x_pad_token, pipe.transformer.x_pad_token)


def test_a_network_is_a_component_of_a_folder(tmp_path):
    transformer = tiny.transformer()
    transformer.save_pretrained(tmp_path / "transformer", max_shard_size="30KB", safe_serialization=True)
    assert len(list((tmp_path / "transformer").glob("*-of-*.safetensors"))) > 1
    again = ZImageTransformer.from_pretrained(tmp_path, subfolder="transformer")
    assert torch.equal(again.x_pad_token, transformer.x_pad_token)
    theirs = diffusers.ZImageTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    assert torch.equal(theirs.x_pad_token, transformer.x_pad_token)
    with pytest.raises(BadFile, match="never replaced"):
        transformer.save_pretrained(tmp_path / "transformer")
    transformer.save_pretrained(tmp_path / "transformer", overwrite=True)


def test_a_replaced_layer_is_refused_rather_than_left_out(folder, tmp_path):
    pipe = ZImagePipeline.from_pretrained(folder)
    attention = pipe.transformer.layers[0].attention
    attention.to_q = nn.Sequential(attention.to_q)
    with pytest.raises(Unsupported, match=r"layers\.0\.attention\.to_q.*was replaced"):
        pipe.transformer.save_pretrained(tmp_path / "a")
    attention.to_q = nn.Linear(32, 32, bias=False)
    pipe.transformer.save_pretrained(tmp_path / "b")
    attention.to_q = nn.Linear(32, 32)
    with pytest.raises(Unsupported, match=r"to_q\.bias"):
        pipe.transformer.save_pretrained(tmp_path / "c")
    del pipe.transformer.layers[1]
    with pytest.raises(Unsupported, match=r"layers\.1"):
        pipe.transformer.save_pretrained(tmp_path / "d")


def test_what_is_not_written_is_one_sentence(tmp_path):
    packed = ZImagePipeline.from_default()
    with pytest.raises(Unsupported, match="dequantize="):
        packed.transformer.save_pretrained(tmp_path / "a")
    with pytest.raises(Unsupported, match="push_to_hub"):
        packed.save_pretrained(tmp_path / "b", push_to_hub=True)
    with pytest.raises(BadArgument, match="max_shard_size"):
        packed.save_pretrained(tmp_path / "b", max_shard_size="much")
    with pytest.raises(BadArgument, match="wanted a network"):
        save_pretrained(3, tmp_path / "c")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x").write_text("mine")
    with pytest.raises(BadFile, match="exists already"):
        tiny.pipeline().save_pretrained(tmp_path / "d")
