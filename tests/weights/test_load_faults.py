"""fp8 with its scales, folders with their configs, and every fault that a file can have at loading."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from tests.helpers.loaded import FUSED, SPLIT, assert_same
from tests.helpers.model_files import (
    TOY_DIT,
    TOY_VAE,
    Stored,
    stored,
    toy_encoder,
    write_json,
    write_safetensors,
)
from zimage_core.errors import BadArgument, BadFile, BadWeights, WrongModel
from zimage_core.formats import FORMATS
from zimage_core.weights import names
from zimage_core.weights.inspection import inspect_file
from zimage_core.weights.load import load_text_encoder, load_transformer, load_vae

# --- fp8 ----------------------------------------------------------------------------------


def fp8_file(tmp_path, fmt="F8_E4M3", scale=None, extra=None):
    """Matrices in fp8, and a scale for each: none, one number, or one a row."""
    content = stored(SPLIT, matrix=fmt)
    wanted = content.values()
    rng = np.random.default_rng(1)
    for name, (kind, _, shape) in list(content.tensors.items()):
        if kind != fmt or scale is None or not name.endswith(".weight"):
            continue
        suffix, rows = scale
        size = {"one": (), "row": (shape[0],), "column": (shape[0], 1)}[rows]
        numbers = rng.uniform(0.5, 2, size).astype(np.float32)
        stem = name.removesuffix(".weight")
        content.tensors[stem + suffix] = ("F32", np.atleast_1d(numbers).view(np.uint8), size)
        wanted[name] = wanted[name] * torch.from_numpy(np.asarray(numbers)).view(-1, 1)
        for label, (dtype, data) in (extra or {}).items():
            content.tensors[stem + label] = (dtype, np.frombuffer(data, np.uint8).copy(), (len(data),))
    return content, wanted


E4M3 = ("U8", json.dumps({"format": "float8_e4m3fn"}).encode())


@pytest.mark.parametrize("fmt", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize(
    "scale", [None, (".scale_weight", "one"), (".weight_scale", "row"), (".weight_scale", "column")]
)
def test_fp8_with_and_without_scales(tmp_path, fmt, scale):
    content, wanted = fp8_file(tmp_path, fmt, scale)
    content.tensors["scaled_fp8"] = (fmt, np.zeros(2, np.uint8), (2,))
    model = load_transformer(
        write_safetensors(tmp_path / "x.safetensors", content.prefixed("diffusion_model."))
    )
    assert_same(model, wanted)
    assert model.layers[0].feed_forward.w2.weight.format is FORMATS[fmt]


def test_fp8_of_comfy_quant(tmp_path):
    extra = {".comfy_quant": E4M3, ".input_scale": ("U8", b"\0")}
    content, wanted = fp8_file(tmp_path, scale=(".weight_scale", "one"), extra=extra)
    assert_same(load_transformer(write_safetensors(tmp_path / "x.safetensors", content)), wanted)


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        (b'{"format": "int8_tensorwise"}', "is F8_E4M3, and ComfyUI.*int8_tensorwise.*get the same model"),
        (b'{"format": "float8_e4m3fn", "convrot": true}', "convrot"),
        (b'{"format": "nvfp4"}', "nvfp4"),
        (b"not json", "not JSON"),
        (b"[" * 4000, "not JSON"),
        (b"[1]", "None"),
        (b" " * 5000, "5000 bytes"),
    ],
)
def test_other_comfy_quants_are_refused_by_name(tmp_path, quant, message):
    content, _ = fp8_file(tmp_path, scale=(".weight_scale", "one"), extra={".comfy_quant": ("U8", quant)})
    path = write_safetensors(tmp_path / "x.safetensors", content)
    with pytest.raises(WrongModel, match=message) as caught:
        load_transformer(path)
    assert str(caught.value).count("get ") == 1
    found = inspect_file(path)
    assert not found.usable
    assert re.search(message, found.problem)


def test_a_scale_beside_a_bf16_layer_is_a_factor(tmp_path):
    content, wanted = fp8_file(tmp_path, "BF16", (".scale_weight", "one"))
    assert_same(load_transformer(write_safetensors(tmp_path / "x.safetensors", content)), wanted)


def test_mxfp8_is_named_though_its_scales_have_a_type_of_their_own(tmp_path):
    content, _ = fp8_file(
        tmp_path, extra={".comfy_quant": ("U8", b'{"format": "mxfp8"}')}, scale=(".weight_scale", "one")
    )
    name = "layers.0.feed_forward.w1.weight_scale"
    content.tensors[name] = ("F8_E8M0", np.zeros(8, np.uint8), (8,))
    with pytest.raises(WrongModel, match="mxfp8"):
        load_transformer(write_safetensors(tmp_path / "x.safetensors", content))


def test_a_scale_of_blocks_is_refused(tmp_path):
    content, _ = fp8_file(tmp_path)
    content.tensors["layers.0.feed_forward.w1.weight_scale"] = (
        "F32",
        np.ones(8, np.float32).view(np.uint8),
        (4, 2),
    )
    with pytest.raises(WrongModel, match=r"scale of shape \(4, 2\)"):
        load_transformer(write_safetensors(tmp_path / "x.safetensors", content))


def test_a_scale_that_is_not_finite_is_refused(tmp_path):
    content, _ = fp8_file(tmp_path)
    nan = np.full(1, np.nan, np.float32).view(np.uint8)
    content.tensors["layers.0.feed_forward.w1.scale_weight"] = ("F32", nan, ())
    with pytest.raises(BadWeights, match=r"w1\.weight.*NaN"):
        load_transformer(write_safetensors(tmp_path / "x.safetensors", content))


# --- folders ------------------------------------------------------------------------------


def folder_config():
    return {
        "dim": 256,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 4,
        "cap_feat_dim": 256,
        "in_channels": 16,
        "axes_dims": [16, 24, 24],
        "axes_lens": [64, 32, 32],
        "all_patch_size": [2],
        "all_f_patch_size": [1],
    }


def test_a_diffusers_folder_of_shards(tmp_path):
    content = stored(SPLIT)
    part = tmp_path / "transformer"
    part.mkdir()
    half = len(content.tensors) // 2
    weight_map = {}
    for i, group in enumerate((list(content.tensors)[:half], list(content.tensors)[half:])):
        name = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        write_safetensors(part / name, Stored({n: content.tensors[n] for n in group}))
        weight_map |= dict.fromkeys(group, name)
    write_json(
        part / "diffusion_pytorch_model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map}
    )
    write_json(part / "config.json", folder_config())
    write_json(tmp_path / "model_index.json", {"_class_name": "ZImagePipeline"})
    for path in (tmp_path, part):
        model = load_transformer(path)
        assert model.config.axes_lens == (64, 32, 32)
        assert_same(model, content.values())
    with pytest.raises(BadFile, match="has no folder vae; download"):
        load_vae(tmp_path)


def test_a_folder_whose_config_is_another_models_is_refused(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", stored(SPLIT))
    write_json(tmp_path / "config.json", folder_config() | {"n_layers": 30})
    with pytest.raises(WrongModel, match="says n_layers = 30, the tensors say 2"):
        load_transformer(tmp_path)
    # named alone, the file counts, whatever lies beside it
    assert load_transformer(tmp_path / "model.safetensors").config == TOY_DIT


@pytest.mark.parametrize(
    "text", ["{", "[]", "[" * 100_000, '{"dim": "x"}', '{"dim": 256, "axes_dims": 7}', "{}"]
)
def test_a_folder_with_a_broken_config_is_refused(tmp_path, text):
    write_safetensors(tmp_path / "model.safetensors", stored(SPLIT))
    (tmp_path / "config.json").write_text(text)
    with pytest.raises((BadFile, WrongModel), match=r"JSON|config\.json"):
        load_transformer(tmp_path)


# --- faults -------------------------------------------------------------------------------


def test_all_missing_unexpected_and_misshapen_tensors_are_listed(tmp_path):
    content = stored(SPLIT)
    for part in ("w1", "w2", "w3"):
        del content.tensors[f"layers.1.feed_forward.{part}.weight"]
    content.tensors |= stored({"intruder.weight": (4, 4), "layers.0.ffn_norm1.weight": (255,)}).tensors
    with pytest.raises(BadWeights) as caught:
        load_transformer(write_safetensors(tmp_path / "x.safetensors", content))
    message = str(caught.value)
    assert "3 missing: layers.1.feed_forward.w1.weight, layers.1.feed_forward.w3.weight" in message
    assert "1 unexpected: intruder.weight" in message
    assert "1 misshapen: layers.0.ffn_norm1.weight is (255,), wanted (256,)" in message


def test_a_long_list_is_cut_with_a_count(tmp_path):
    content = stored(SPLIT)
    for name in [n for n in content.tensors if n.startswith("layers.1.")]:
        del content.tensors[name]
    content.tensors |= stored({"layers.1.ffn_norm1.weight": (256,)}).tensors
    with pytest.raises(BadWeights, match=r"14 missing: .*, \.\.\.; get"):
        load_transformer(write_safetensors(tmp_path / "x.safetensors", content))


@pytest.mark.parametrize("name", ["layers.1.ffn_norm2.weight", "x_pad_token", "t_embedder.mlp.0.bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_dense_tensor_that_is_not_finite_is_named(tmp_path, name, value):
    content = stored(SPLIT)
    content.tensors[name][1].view(np.float32).flat[3] = value
    with pytest.raises(BadWeights, match=f"{name} holds 1 NaN or infinite"):
        load_transformer(write_safetensors(tmp_path / "x.safetensors", content))


def test_a_norm_beyond_float16_is_named(tmp_path):
    content = stored(SPLIT)
    content.tensors["layers.1.ffn_norm2.weight"][1].view(np.float32)[3] = 1e5
    path = write_safetensors(tmp_path / "x.safetensors", content)
    with pytest.raises(BadWeights, match=r"ffn_norm2\.weight holds 100000.*bfloat16"):
        load_transformer(path, dtype=torch.float16)
    load_transformer(path, dtype=torch.bfloat16)


def test_a_wrong_dtype_is_refused(tmp_path):
    with pytest.raises(BadArgument, match=r"torch\.float64, wanted one of torch\.float32"):
        load_transformer(tmp_path, dtype=torch.float64)


@pytest.mark.parametrize("width", [96, None])
def test_a_transformer_with_a_vision_branch_is_loaded_as_omni(tmp_path, width):
    from dataclasses import replace

    from zimage_core.models.omni import OmniTransformer

    config = replace(TOY_DIT, siglip_feat_dim=width)
    content = stored(names.checkpoint_shapes(names.transformer_table(config, "split")))
    model = load_transformer(write_safetensors(tmp_path / "x.safetensors", content))
    assert isinstance(model, OmniTransformer) == (width is not None)
    assert_same(model, content.values())


def test_an_all_in_one_checkpoint_gives_each_part(tmp_path):
    encoder = toy_encoder()
    parts = {
        "model.diffusion_model.": FUSED,
        "text_encoders.qwen3_4b.transformer.model.": names.checkpoint_shapes(
            names.text_encoder_table(encoder, "hf")
        ),
        "vae.": names.checkpoint_shapes(names.autoencoder_table(TOY_VAE, "bfl")),
    }
    whole = Stored()
    for prefix, shapes in parts.items():
        whole.tensors |= stored(shapes).prefixed(prefix).tensors
    path = write_safetensors(tmp_path / "x.safetensors", whole)
    assert load_transformer(path).config == TOY_DIT
    assert load_text_encoder(path).config.hidden_size == 256
    assert load_vae(path).config.block_out_channels == TOY_VAE.block_out_channels
