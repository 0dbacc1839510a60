"""What is saved from memory is what is in memory, in the files that diffusers and transformers write."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from tests.helpers import tiny
from zimage_core import (
    BadArgument,
    BadFile,
    Unsupported,
    ZImagePipeline,
    load_text_encoder,
    load_transformer,
    quantize_file,
)
from zimage_core.export.saving import save_network, save_scheduler, save_tokenizer
from zimage_core.weights.components import open_component
from zimage_core.weights.facts import facts

PARTS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}


@pytest.fixture(scope="module")
def pipe(model) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(model)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = folder.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("part", PARTS)
def test_a_network_is_written_with_what_its_file_had(pipe, model, tmp_path, part):
    """The last layer of the text encoder, which is never run, and every field of config.json."""
    save_network(getattr(pipe, part), tmp_path / "out")
    before, after = weights(model / part), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config.pop("_zimage", None)
    assert config == json.loads((model / part / "config.json").read_text())


def test_an_edit_is_written_and_the_others_read_it(model, tmp_path):
    transformer = load_transformer(model)
    layer = transformer.layers[1].feed_forward.w2
    layer.set_weight(nn.Parameter(torch.full(tuple(layer.weight.shape), 0.25)))
    save_network(transformer, tmp_path / "out", max_shard_bytes=30_000)
    name = "layers.1.feed_forward.w2.weight"
    assert bool((weights(tmp_path / "out")[name] == 0.25).all())
    theirs = diffusers.ZImageTransformer2DModel.from_pretrained(tmp_path / "out")
    assert bool((theirs.get_parameter(name) == 0.25).all())
    assert bool((load_transformer(tmp_path / "out").get_parameter(name) == 0.25).all())


def test_a_network_without_a_file_is_written(tmp_path):
    encoder = tiny.text_encoder()
    save_network(encoder.to(torch.bfloat16), tmp_path / "out")
    again = load_text_encoder(tmp_path / "out", torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters(), strict=True))


def test_packed_weights_are_dequantised_only_when_asked(wide, tmp_path):
    quantize_file(wide, tmp_path / "q.gguf", "Q8_0")
    transformer = load_transformer(tmp_path / "q.gguf")
    with pytest.raises(Unsupported, match=r'packed as Q8_0.*dequantize="bf16"'):
        save_network(transformer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_network(transformer, tmp_path / "out", dequantize="f32")
    name = "layers.0.attention.to_k.weight"
    packed = transformer.get_submodule("layers.0.attention.to_k").weight
    assert torch.equal(weights(tmp_path / "out")[name], packed.dequantize(torch.float32))
    assert weights(tmp_path / "out")["noise_refiner.0.attention.to_q.weight"].dtype == torch.bfloat16


def test_a_variant_lies_beside_the_other_files(pipe, tmp_path):
    out = tmp_path / "out"
    save_network(pipe.transformer, out)
    save_network(pipe.transformer, out, variant="fp16", max_shard_bytes=30_000)
    assert (out / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    theirs = diffusers.ZImageTransformer2DModel.from_pretrained(out, variant="fp16")
    name = "layers.0.attention.to_q.weight"
    assert torch.equal(theirs.get_parameter(name), pipe.transformer.get_parameter(name))
    with pytest.raises(BadFile, match="exists already"):
        save_network(pipe.transformer, out, variant="fp16")
    save_network(pipe.transformer, out, variant="fp16", overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors",
    ], "no shard of before is left"  # fmt: skip


def test_a_network_is_saved_over_the_files_that_it_came_from(model, tmp_path):
    save_network(load_transformer(model), tmp_path / "out")
    transformer = load_transformer(tmp_path / "out")
    with pytest.raises(BadFile, match="a folder is never replaced"):
        save_network(transformer, tmp_path / "out")
    before = transformer.x_pad_token.clone()
    save_network(transformer, tmp_path / "out", overwrite=True)
    assert torch.equal(load_transformer(tmp_path / "out").x_pad_token, before)


def test_what_a_pipeline_knows_is_written_beside_the_network(pipe, tmp_path):
    save_network(pipe.transformer, tmp_path / "out", facts={"sample_size": 48, "shift": 6.0})
    with open_component(tmp_path / "out", "transformer").file as file:
        assert file.metadata["zimage.sample_size"] == "48"
    assert facts(open_component(tmp_path / "out", "transformer")) == {"sample_size": 48, "shift": 6.0}
    assert diffusers.ZImageTransformer2DModel.from_pretrained(tmp_path / "out").config["_zimage"]


def test_what_cannot_be_saved_is_told_in_a_sentence(pipe, tmp_path):
    with pytest.raises(BadArgument, match="wanted a network of this library"):
        save_network(nn.Linear(2, 2), tmp_path / "out")
    for options in ({"dequantize": "int8"}, {"max_shard_bytes": 0}, {"variant": "../x"}):
        with pytest.raises(BadArgument):
            save_network(pipe.vae, tmp_path / "out", **options)
    whole = tiny.transformer()
    whole.x_pad_token = nn.Parameter(whole.x_pad_token.detach().to(torch.complex64), requires_grad=False)
    with pytest.raises(Unsupported, match=r"x_pad_token is torch\.complex64"):
        save_network(whole, tmp_path / "out")
    large = tiny.vae()
    with torch.no_grad():
        large.decoder.conv_in.weight[0, 0, 0, 0] = float("nan")
    save_network(large, tmp_path / "out")
    assert weights(tmp_path / "out")["decoder.conv_in.weight"].isnan().sum() == 1, "kept as it is"


def test_scheduler_and_tokenizer_are_read_by_the_others(pipe, tmp_path):
    save_scheduler(pipe.scheduler, tmp_path / "scheduler")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    assert theirs.config.shift == pipe.scheduler.shift
    save_tokenizer(pipe.tokenizer, tmp_path / "tokenizer")
    text = "hé it's <|im_start|>a<think> 12\n\n b"
    wanted = pipe.tokenizer.encode(text)
    assert type(pipe.tokenizer).from_folder(tmp_path / "tokenizer").fingerprint == pipe.tokenizer.fingerprint
    for kind in (transformers.AutoTokenizer, transformers.Qwen2Tokenizer):
        assert kind.from_pretrained(tmp_path / "tokenizer")(text).input_ids == wanted
    with pytest.raises(BadFile, match="exists already"):
        save_tokenizer(pipe.tokenizer, tmp_path / "tokenizer")
    save_tokenizer(pipe.tokenizer, tmp_path / "tokenizer", overwrite=True)
