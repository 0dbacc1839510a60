"""Weights that other programs packed are refused by name; scales beside weights are always multiplied."""

from __future__ import annotations

import json
from contextlib import closing

import numpy as np
import pytest
import torch

from tests.helpers.headers import dit, encoder, header
from tests.helpers.loaded import SPLIT, assert_same
from tests.helpers.model_files import (
    Stored,
    encoder_metadata,
    stored,
    write_gguf,
    write_json,
    write_safetensors,
)
from tests.helpers.streamed import ENCODER, encode, ringed, streamed
from zimage_core import convert_file, quantize_file
from zimage_core.config import TransformerConfig
from zimage_core.errors import BadFile, Unsupported, WrongModel
from zimage_core.export.checkpoint import Checkpoint
from zimage_core.weights import names
from zimage_core.weights.card import require
from zimage_core.weights.components import open_parts
from zimage_core.weights.identify import identify
from zimage_core.weights.inspection import inspect_file
from zimage_core.weights.load import load_text_encoder, load_transformer

SMALL = TransformerConfig(
    dim=64, n_layers=1, n_refiner_layers=1, n_heads=2, cap_feat_dim=32, hidden_dim=170, axes_dims=(8, 12, 12)
)
STATED = {
    "_class_name": "ZImageTransformer2DModel", "dim": 64, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2,
    "cap_feat_dim": 32, "axes_dims": [8, 12, 12],
}  # fmt: skip
SHAPES = names.checkpoint_shapes(names.transformer_table(SMALL, "split"))
WAY = "not supported; get the same model as GGUF, or as bf16 or fp8 safetensors"


def packed(endings: dict[str, tuple[str, str]]) -> Stored:
    """The matrices of the blocks as other tensors: ending -> (type, rank as in "nm", "n1" or "x")."""
    content = stored(SHAPES, matrix="BF16")
    for name, (_, _, shape) in list(content.tensors.items()):
        if len(shape) != 2 or (".attention." not in name and ".feed_forward." not in name):
            continue
        del content.tensors[name]
        stem, (n, m) = name.removesuffix("weight"), shape
        for ending, (fmt, rank) in endings.items():
            sides = {"nm": (n, m), "n1": (n, 1), "x": (n * m // 2,)}[rank]
            nbytes = {"F32": 4, "BF16": 2}.get(fmt, 1)
            content.tensors[stem + ending] = (
                fmt,
                np.zeros((*sides[:-1], sides[-1] * nbytes), np.uint8),
                sides,
            )
    return content


FOREIGN = {
    "sdnq": {"weight": ("U8", "x"), "scale": ("BF16", "n1"), "svd_up": ("BF16", "n1")},
    "sdnq without svd": {"weight": ("I8", "nm"), "scale": ("BF16", "n1")},
    "torchao": {"_weight_qdata": ("F8_E4M3", "nm"), "_weight_scale": ("F32", "n1")},
    "quanto": {"weight._data": ("I8", "nm"), "weight._scale": ("BF16", "n1"), "input_scale": ("BF16", "n1")},
    "hqq": {"W_q": ("U8", "nm"), "zero": ("BF16", "n1")},
    "bitsandbytes": {"weight": ("U8", "x"), "weight.absmax": ("F32", "n1")},
    "compressed-tensors": {"weight_packed": ("U8", "nm"), "weight_scale": ("BF16", "n1")},
    "zap-9000": {"zapped": ("U8", "nm"), "zap_scale": ("BF16", "n1")},  # which nobody has met
    "zap-9000 in place": {"weight": ("U8", "nm"), "zap": ("BF16", "n1")},
    "zap-9000 in floats": {"weight": ("BF16", "x"), "zap": ("BF16", "n1")},
}


@pytest.mark.parametrize("method", FOREIGN)
def test_a_method_that_config_json_names_is_named_and_never_called_damage(tmp_path, method):
    write_safetensors(tmp_path / "model.safetensors", packed(FOREIGN[method]))
    method = method.partition(" ")[0]
    write_json(tmp_path / "config.json", STATED | {"quantization_config": {"quant_method": method}})
    with pytest.raises(WrongModel, match=f"quantised by '{method}', as config.json says.*{WAY}") as caught:
        load_transformer(tmp_path)
    assert not any(word in str(caught.value) for word in ("cut", "shard", "damaged", "missing"))
    assert f"'{method}'" in inspect_file(tmp_path / "model.safetensors").problem


@pytest.mark.parametrize(
    ("place", "content", "name"),
    [
        ("quantize_config.json", {"bits": 4, "quant_method": "zap"}, "'zap', as quantize_config.json says"),
        ("hf_quant_config.json", {"producer": {"name": "modelopt"}}, "'modelopt', as hf_quant_config.json"),
        ("quantization_config.json", {"bits": 4}, "'quantization_config', as"),
        (
            "config.json",
            STATED | {"dfloat11_config": {"version": "0.2"}},
            "'dfloat11_config', as config.json",
        ),
        ("config.json", STATED | {"quantization": {"group_size": 64, "bits": 4}}, "'quantization', as"),
        ("config.json", STATED | {"quantization_config": {"load_in_4bit": True}}, "'bitsandbytes', as"),
        (None, {"quantization_config": json.dumps({"method": "zap"})}, "'zap', as its metadata says"),
        (None, {"x": '{"_type": "Int4Tensor"}'}, "'torchao', as its metadata says"),
    ],
)
def test_a_method_is_found_wherever_it_is_stated(tmp_path, place, content, name):
    file = write_safetensors(
        tmp_path / "model.safetensors", packed(FOREIGN["zap-9000"]), None if place else content
    )
    if place:
        write_json(tmp_path / place, content)
    assert name in inspect_file(file).problem


def test_plain_weights_are_read_whatever_a_config_left_over_says(tmp_path):
    content = stored(SHAPES, matrix="BF16")
    write_safetensors(tmp_path / "model.safetensors", content)
    for config in ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "sdnq"}):
        write_json(tmp_path / "config.json", STATED | {"quantization_config": config})
        with pytest.warns(
            UserWarning, match=f"quantised by '{config['quant_method']}', but they are plain"
        ) as w:
            assert_same(load_transformer(tmp_path), content.values())
        assert len(w) == 1
    # another fault of the config keeps its own name
    write_json(tmp_path / "config.json", STATED | {"quantization_config": config, "qk_norm": False})
    with pytest.raises(WrongModel, match="qk_norm is False"):
        load_transformer(tmp_path)
    # and a cut file its own
    del content.tensors["layers.0.attention.to_k.weight"]
    write_safetensors(tmp_path / "model.safetensors", content)
    assert "1 missing" in inspect_file(tmp_path / "model.safetensors").problem


def test_fp8_that_is_read_is_no_news(tmp_path, recwarn):
    content = stored(SHAPES, matrix="F8_E4M3")
    name = "layers.0.attention.to_q.weight"
    scale = np.full(1, 0.5, np.float32).view(np.uint8)
    content.tensors[name + "_scale"] = ("F32", scale, (1,))
    wanted = content.values() | {name: content.values()[name] * 0.5}
    del wanted[name + "_scale"]
    write_safetensors(tmp_path / "model.safetensors", content)
    config = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    write_json(tmp_path / "config.json", STATED | {"quantization_config": config})
    assert_same(load_transformer(tmp_path), wanted)
    assert not [w for w in recwarn if "quantised" in str(w.message)]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"format": "nvfp4"}, "ComfyUI as 'nvfp4'"),
        ({"format": "float8_e4m3fn", "convrot": True}, "ComfyUI as 'convrot'"),
        ({"format": "float8_e4m3fn"}, ""),
        ("x", "ComfyUI as 'None'"),
    ],
)
def test_layers_that_comfyui_names_in_the_metadata(layer, message):
    """Of the part's own layers: those of the text encoder say nothing of the transformer."""
    shapes = dit() | encoder("hf", prefix="te.")
    for name, at_fault in (
        ("layers.0.feed_forward.w1", "transformer"),
        ("te.layers.0.mlp.up_proj", "text_encoder"),
    ):
        metadata = {"_quantization_metadata": json.dumps({"layers": {name: layer}})}
        for part in ("transformer", "text_encoder"):
            problem = identify(header(shapes, metadata), part).problem
            assert message in problem if part == at_fault else not problem


@pytest.mark.parametrize(
    ("tensors", "style"),
    [
        ("x._weight_qdata x._weight_scale", "torchao"),
        ("x.weight:_data", "torchao"),
        ("x.weight._data x.weight._scale", "quanto"),
        ("x.W_q x.zero", "HQQ"),
        ("x.encoded_exponent x.sign_mantissa x.luts", "DFloat11"),
        ("x.svd_up x.svd_down", "SDNQ"),
        ("x.weight_quantizer._amax", "modelopt"),
        ("x.weight_packed x.weight_shape", "compressed-tensors"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_names_of_tensors_tell_the_method(tensors, style, whole):
    """Also where so little is left of the network that it is not recognised."""
    shapes = (dit() if whole else {}) | dict.fromkeys(tensors.split(), (1,))
    with pytest.raises(WrongModel, match=f"quantised by .*{style}"):
        require(identify(header(shapes), "transformer"), "transformer", "x")


def test_a_loose_folder_tells_of_weights_so_packed_that_nothing_is_recognised(tmp_path):
    content = stored({"layers.0.q._weight_qdata": (8, 8), "layers.0.q._weight_scale": (8, 1)})
    write_safetensors(tmp_path / "encoder.safetensors", content)
    with pytest.raises(BadFile, match=r"unreadable: encoder\.safetensors is an unknown model.*torchao"):
        open_parts(tmp_path)
    assert "torchao" in inspect_file(tmp_path / "encoder.safetensors").title


# --- GGUF: `.scale` beside a matrix of any type ------------------------------------------------------------

FACTOR = np.float32(1 / 32)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """A text encoder in NVFP4 with scales, and what its tensors mean."""
    content = stored(names.checkpoint_shapes(names.text_encoder_table(ENCODER, "gguf")), matrix="NVFP4")
    wanted = content.values()
    for name, (fmt, _, _) in list(content.tensors.items()):
        if fmt == "NVFP4" and name.startswith("blk."):
            wanted[name] = wanted[name] * FACTOR
            stem = name.removesuffix("weight")
            content.tensors[f"{stem}scale"] = ("F32", np.full(1, FACTOR).view(np.uint8), (1,))
            content.tensors[f"{stem}input_scale"] = ("F32", np.ones(1, np.float32).view(np.uint8), (1,))
    path = tmp_path_factory.mktemp("scaled") / "nvfp4.gguf"
    return write_gguf(path, content, encoder_metadata(ENCODER)), wanted


def dense_of(path):
    with Checkpoint(path) as source:
        return {t.name: torch.cat(list(source.dense(t))).reshape(t.shape) for t in source.targets("gguf")}


def test_a_scale_of_a_gguf_multiplies_its_matrix(scaled, tmp_path):
    path, wanted = scaled
    model = load_text_encoder(path)
    layer = model.layers[0].mlp.up_proj
    assert torch.equal(layer.weight.dequantize(), wanted["blk.0.ffn_up.weight"])
    read = encode(model)
    with closing(streamed(model, (), **ringed(slots=2))):
        assert torch.equal(encode(model), read)
    plain = Stored({n: ("F32", v.numpy().view(np.uint8), tuple(v.shape)) for n, v in wanted.items()})
    write_gguf(tmp_path / "plain.gguf", plain, encoder_metadata(ENCODER))
    torch.testing.assert_close(encode(load_text_encoder(tmp_path / "plain.gguf")), read, rtol=1e-5, atol=1e-5)


def test_what_is_written_of_a_scaled_gguf_has_its_scales_applied(scaled, tmp_path):
    path, wanted = scaled
    for out in ("a.gguf", "a.safetensors"):
        with pytest.raises(Unsupported, match="NVFP4"):
            convert_file(path, tmp_path / out)
        convert_file(path, tmp_path / out, dequantize="f32")
    quantize_file(path, tmp_path / "q.gguf", "F16", requantize=True)
    for name, tolerance in (("a.gguf", 0), ("a.safetensors", 0), ("q.gguf", 1e-3)):
        got = dense_of(tmp_path / name)
        assert not any(key.endswith("scale") for key in got)
        for key, value in got.items():
            torch.testing.assert_close(value, wanted[key], rtol=tolerance, atol=tolerance)


def test_scales_that_are_no_factor_are_refused(tmp_path):
    shapes = encoder("gguf", ENCODER) | {"blk.0.ffn_up.scale": (2,)}
    card = identify(header(shapes, encoder_metadata(ENCODER)), "text_encoder")
    assert "blk.0.ffn_up.weight has a scale of shape (2,), wanted one number" in card.problem
    shapes = SPLIT | {"layers.0.feed_forward.w1.scale": (1,)}
    assert "scale of SDNQ or another scheme" in identify(header(shapes), "transformer").problem
