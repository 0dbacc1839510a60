"""Adapters from the command line, and what is saved of a pipeline that has some."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.helpers import adapters, tiny
from zimage_core import ZImagePipeline
from zimage_core.cli.main import main
from zimage_core.errors import Unsupported
from zimage_core.files.png import read_metadata


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("model") / "tiny")


def lora_file(path, seed=0):
    layer = tiny.transformer().layers[0].attention.to_q
    pair = adapters.split_lora(layer.out_features, layer.in_features, seed=seed)[0]
    save_file(adapters.file_of({"diffusion_model.layers.0.attention.to_q": pair}), path)
    return path


def test_generate_takes_several_with_their_weights(folder, tmp_path, capsys):
    one, two = (lora_file(tmp_path / f"{name}.safetensors", i) for i, name in enumerate(("one", "two")))
    words = ["generate", "a", "--model", str(folder), "--steps", "2", "-W", "32", "-H", "32"]
    words += ["--seed", "5", "--quiet"]
    target = tmp_path / "a.png"
    assert main([*words, "--lora", str(one), "--lora", f"{two}:-0.5", "-o", str(target)]) == 0
    pipe = ZImagePipeline.from_pretrained(folder)
    pipe.load_lora(one)
    pipe.load_lora(two, -0.5)
    wanted = pipe("a", num_inference_steps=2, width=32, height=32, seed=5)
    assert np.array_equal(np.asarray(Image.open(target)), np.asarray(wanted.images[0]))
    settings = read_metadata(target).settings
    assert settings["loras"] == wanted.settings[0]["loras"]
    assert [(each["name"], each["weight"]) for each in settings["loras"]] == [("one", 1.0), ("two", -0.5)]
    assert str(tmp_path).encode() not in target.read_bytes()


def test_the_embedded_model_has_a_lora_by_name(tmp_path):
    pipe, target = ZImagePipeline.from_default(), tmp_path / "a.png"
    run = {"num_inference_steps": 2, "width": 32, "height": 32, "seed": 5}
    before = np.asarray(pipe("a red circle", **run).images[0])
    assert pipe.load_lora("outline", 0.5) == "outline"
    result = pipe("a red circle", **run)
    assert not np.array_equal(np.asarray(result.images[0]), before)
    words = ["generate", "a red circle", "--steps", "2", "-W", "32", "-H", "32", "--seed", "5", "--quiet"]
    words += ["--compute", "exact", "--device", "cpu", "--lora", "outline:0.5"]
    assert main([*words, "-o", str(target)]) == 0
    assert np.array_equal(np.asarray(Image.open(target)), np.asarray(result.images[0]))


def test_a_wrong_weight_or_file_is_told_before_the_model_is_loaded(tmp_path, capsys):
    lora_file(tmp_path / "a.safetensors")
    for text, message in (
        ("a.safetensors:x", "'x' is no number"),
        ("b.safetensors", "there is no such file"),
    ):
        words = [
            "generate",
            "a",
            "--model",
            "/none",
            "--lora",
            f"{tmp_path}/{text}",
            "-o",
            f"{tmp_path}/a.png",
        ]
        assert main(words) != 0
        assert message in capsys.readouterr().err


def test_what_is_saved_has_the_adapters_or_is_refused(tmp_path):
    pipe = tiny.pipeline()
    pipe.load_lora(lora_file(tmp_path / "one.safetensors"))
    for saved in (pipe, pipe.transformer):
        with pytest.raises(Unsupported, match="'one' is an adapter beside the weights and would be lost"):
            saved.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipe.fuse_lora()
    pipe.transformer.save_pretrained(tmp_path / "saved")
    stored = load_file(next((tmp_path / "saved").glob("*.safetensors")))
    name = "layers.0.attention.to_q.weight"
    assert torch.equal(stored[name], pipe.transformer.state_dict()[name])
    assert not torch.equal(stored[name], tiny.transformer().state_dict()[name])
