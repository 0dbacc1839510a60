"""A conversion moves every bit and changes none, there and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import tiny
from tests.helpers.gguf_writer import random_packed, write_gguf
from tests.helpers.wide import WIDE, wide_state, write_wide
from zimage_core import (
    FORMATS,
    BadArgument,
    BadFile,
    BadWeights,
    Unsupported,
    convert_file,
    load_transformer,
    open_weights,
    quantize_file,
)
from zimage_core.config import TransformerConfig
from zimage_core.weights import names

CONFIG = TransformerConfig.from_json(WIDE)


def loaded(place: Path) -> dict[str, torch.Tensor]:
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("way", [("a.safetensors",), ("a.gguf",), ("a.gguf", "b.safetensors", "c.gguf")])
def test_a_transformer_comes_back_bit_for_bit(tmp_path, dtype, way):
    state = wide_state(dtype)
    place = write_wide(tmp_path / "in", state)
    for name in way:
        convert_file(place, tmp_path / name)
        place = tmp_path / name
    convert_file(place, tmp_path / "back")
    assert_same(state, loaded(tmp_path / "back"))
    # what came from a folder's config.json passes through a GGUF, and our readers agree about it
    load_transformer(tmp_path / "back")


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_the_other_networks_come_back_bit_for_bit(model, tmp_path, part):
    state = loaded(model / part)
    name = "a.gguf" if part == "text_encoder" else "a.safetensors"
    convert_file(model, tmp_path / name, component=part)
    convert_file(tmp_path / name, tmp_path / "back")
    assert_same(state, loaded(tmp_path / "back"))


def test_the_single_file_has_comfyui_s_names(wide, tmp_path):
    convert_file(wide, tmp_path / "a.safetensors", prefix="model.diffusion_model.")
    state, found = wide_state(), load_file(tmp_path / "a.safetensors")
    assert all(name.startswith("model.diffusion_model.") for name in found)
    qkv = found["model.diffusion_model.layers.1.attention.qkv.weight"]
    assert torch.equal(qkv, torch.cat([state[f"layers.1.attention.to_{p}.weight"] for p in "qkv"]))
    assert "model.diffusion_model.final_layer.adaLN_modulation.1.weight" in found


def test_shards_and_index_are_what_hugging_face_reads(wide, tmp_path):
    done = convert_file(wide, tmp_path / "out", shard_bytes=1_500_000)
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert files == [
        f"diffusion_pytorch_model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in wide_state().values())
    assert done.nbytes == sum((tmp_path / "out" / name).stat().st_size for name in files)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (wide / "config.json").read_text()
    )
    assert_same(wide_state(), loaded(tmp_path / "out"))
    load_transformer(tmp_path / "out")


def test_a_config_is_made_where_the_source_has_none(wide, tmp_path):
    convert_file(wide, tmp_path / "a.gguf")
    convert_file(tmp_path / "a.gguf", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert TransformerConfig.from_json(written) == CONFIG
    assert {k: v for k, v in WIDE.items() if k in written} == {k: written[k] for k in WIDE if k in written}


def written_config(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


def test_a_config_says_nothing_of_a_quantisation_that_is_undone(tmp_path):
    state = wide_state(torch.bfloat16)
    weight = "layers.0.feed_forward.w1.weight"
    state[weight] = state[weight].to(torch.float8_e4m3fn)
    state[weight.removesuffix("weight") + "scale_weight"] = torch.tensor([0.5])
    place = write_wide(tmp_path / "in", state)
    stated = {**WIDE, "quantization_config": {"quant_method": "fp8"}, "torch_dtype": "float8_e4m3fn"}
    (place / "config.json").write_text(json.dumps({**stated, "note": "kept"}))
    convert_file(place, tmp_path / "out", dequantize="bf16")
    assert written_config(tmp_path / "out") == {**WIDE, "torch_dtype": "bfloat16", "note": "kept"}
    plain = write_wide(tmp_path / "plain", wide_state())
    (plain / "config.json").write_text(json.dumps({**WIDE, "dtype": "float32"}))
    convert_file(plain, tmp_path / "copy")
    assert written_config(tmp_path / "copy") == {**WIDE, "dtype": "bfloat16"}


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("stated", [False, True])
def test_a_config_says_whether_there_is_an_output_matrix(tmp_path, head, stated):
    state = {name: tensor.half() for name, tensor in tiny.text_encoder_state().items()}
    if head:
        state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    (tmp_path / "in").mkdir()
    save_file(state, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    # the contrary of what is true
    config = {**tiny.TEXT_ENCODER, "tie_word_embeddings": head}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    source = tmp_path / "in"
    if not stated:
        source = tmp_path / "a.gguf"
        convert_file(tmp_path / "in", source)
    convert_file(source, tmp_path / "out")
    found = written_config(tmp_path / "out")
    assert ("lm_head.weight" in loaded(tmp_path / "out")) == head
    assert found["tie_word_embeddings"] is not head
    assert stated or found["torch_dtype"] == "float16"


def sdcpp_file(place: Path) -> dict[str, bytes]:
    """What stable-diffusion.cpp's converter makes: prefix, q, k, v apart, pads squeezed, no metadata."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in names.checkpoint_shapes(names.transformer_table(CONFIG, "sdcpp")).items():
        shape = shape[1:] if "pad_token" in name else shape
        fmt = "Q8_0" if len(shape) == 2 and shape[-1] % 32 == 0 else "F16"
        fmt = "Q4_K" if name.endswith("attention_norm1.weight") else fmt
        tensors["model.diffusion_model." + name] = random_packed(fmt, shape, rng)
    write_gguf(place, tensors)
    return {name: tensor.data for name, tensor in tensors.items()}


def test_packed_rows_are_joined_without_being_decoded(tmp_path):
    stored = sdcpp_file(tmp_path / "sd.gguf")
    convert_file(tmp_path / "sd.gguf", tmp_path / "a.gguf")
    with open_weights(tmp_path / "a.gguf") as file, open_weights(tmp_path / "sd.gguf") as source:
        assert file.metadata["general.architecture"] == "lumina2"
        qkv = file.tensor("layers.0.attention.qkv.weight")
        parts = [f"model.diffusion_model.layers.0.attention.qkv.weight{tail}" for tail in ("", ".1", ".2")]
        assert qkv.format.name == "Q8_0"
        assert bytes(qkv.packed.flatten().numpy()) == b"".join(stored[part] for part in parts)
        norm = "layers.0.attention_norm1.weight"
        assert file.tensors[norm].format.name == "F32"
        assert torch.equal(
            file.tensor(norm).dequantize(), source.tensor("model.diffusion_model." + norm).dequantize()
        )
        assert file.tensors["x_pad_token"].shape == (1, 256)
    load_transformer(tmp_path / "a.gguf")


def test_parts_in_several_types_are_not_joined_silently(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in names.checkpoint_shapes(names.transformer_table(CONFIG, "sdcpp")).items():
        fmt = "Q8_0" if name.endswith("layers.0.attention.qkv.weight.1") else "F16"
        tensors[name] = random_packed(fmt, shape, rng)
    write_gguf(tmp_path / "a.gguf", tensors)
    with pytest.raises(Unsupported, match=r"stored as F16 and Q8_0, which cannot be carried over"):
        convert_file(tmp_path / "a.gguf", tmp_path / "b.gguf")
    convert_file(tmp_path / "a.gguf", tmp_path / "b.gguf", dequantize="f32")


def test_packed_weights_become_safetensors_only_when_asked(wide, tmp_path):
    quantize_file(wide, tmp_path / "q.gguf", "Q8_0")
    with pytest.raises(Unsupported, match=r"packed \(Q8_0\), .*--dequantize bf16 or f32"):
        convert_file(tmp_path / "q.gguf", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
    convert_file(tmp_path / "q.gguf", tmp_path / "a.safetensors", dequantize="bf16")
    found = load_file(tmp_path / "a.safetensors")
    with open_weights(tmp_path / "q.gguf") as file:
        for name, info in file.tensors.items():
            dtype = torch.float32 if info.format.name == "F32" else found[name].dtype
            assert torch.equal(found[name], file.tensor(name).dequantize(dtype)), name


def test_scaled_fp8_is_not_carried_without_its_scale(tmp_path):
    tensors = {}
    state = wide_state(torch.float32)
    for name, entries in names.sources(names.transformer_table(CONFIG, "fused")).items():
        tensors[name] = torch.cat([state[e.module] for e in entries])
    weight = "layers.0.feed_forward.w1.weight"
    tensors[weight] = tensors[weight].to(torch.float8_e4m3fn)
    tensors["layers.0.feed_forward.w1.scale_weight"] = torch.tensor([0.5])
    save_file(tensors, tmp_path / "fp8.safetensors")
    for out in ("a.safetensors", "a.gguf"):
        with pytest.raises(Unsupported, match="F8_E4M3"):
            convert_file(tmp_path / "fp8.safetensors", tmp_path / out)
    convert_file(tmp_path / "fp8.safetensors", tmp_path / "a.safetensors", dequantize="f32")
    assert torch.equal(load_file(tmp_path / "a.safetensors")[weight], tensors[weight].float() * 0.5)


def test_wrong_destinations_are_refused_and_left_alone(wide, model, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("x")
    with pytest.raises(BadFile, match="a folder is never replaced"):
        convert_file(wide, tmp_path / "folder", overwrite=True)
    assert (tmp_path / "folder" / "precious").exists()
    with pytest.raises(BadArgument, match="wanted one of diffusers, single, gguf"):
        convert_file(wide, tmp_path / "x", to="onnx")
    with pytest.raises(BadArgument, match="only a single file"):
        convert_file(wide, tmp_path / "x.gguf", prefix="p.")
    with pytest.raises(BadArgument, match="wanted one of bf16, f16, f32"):
        convert_file(wide, tmp_path / "x.gguf", dequantize="int8")
    with pytest.raises(Unsupported, match="a VAE is not kept as GGUF"):
        convert_file(model / "vae", tmp_path / "x.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_formats_of_a_gguf_are_all_carried(tmp_path):
    """Every type that fits rows of 256, in one file, byte for byte."""
    rng = np.random.default_rng(0)
    pool = [f for f in FORMATS.values() if f.ggml_type is not None and not f.is_integer and f.name != "F64"]
    tensors, number = {}, 0
    for name, shape in names.checkpoint_shapes(names.transformer_table(CONFIG, "fused")).items():
        fmt = FORMATS["F32"]
        if len(shape) == 2 and shape[-1] % 256 == 0:
            fmt, number = pool[number % len(pool)], number + 1
        tensors[name] = random_packed(fmt, shape, rng)
    assert number > len(pool) // 2
    write_gguf(tmp_path / "a.gguf", tensors)
    convert_file(tmp_path / "a.gguf", tmp_path / "b.gguf")
    with open_weights(tmp_path / "b.gguf") as file:
        for name, tensor in tensors.items():
            if "pad_token" not in name:
                assert file.tensors[name].format == tensor.format
                assert bytes(file.tensor(name).packed.flatten().numpy()) == tensor.data, name


def test_a_config_of_another_model_beside_a_file_is_not_passed_on(wide, tmp_path):
    convert_file(wide, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**WIDE, "n_layers": 7}))
    convert_file(tmp_path / "a.safetensors", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["n_layers"] == WIDE["n_layers"]


def test_what_a_gguf_says_of_its_types_holds_after_a_conversion(wide, tmp_path):
    quantize_file(wide, tmp_path / "q.gguf", "Q8_0")
    convert_file(tmp_path / "q.gguf", tmp_path / "same.gguf")
    convert_file(tmp_path / "q.gguf", tmp_path / "dense.gguf", dequantize="bf16")
    with open_weights(tmp_path / "same.gguf") as same, open_weights(tmp_path / "dense.gguf") as dense:
        assert same.metadata["general.file_type"] == 7
        assert "zimage.recipe" in same.metadata
        assert dense.metadata["general.file_type"] == 32
        assert "zimage.recipe" not in dense.metadata


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_conversion_does_not_judge_what_it_carries(tmp_path, dtype):
    """Norms are widened for a GGUF and narrowed on the way back."""
    state = wide_state(dtype)
    norm, matrix = "layers.0.attention_norm1.weight", "layers.0.attention.to_q.weight"
    for name in (norm, matrix):
        state[name].view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    convert_file(write_wide(tmp_path / "in", state), tmp_path / "a.gguf")
    convert_file(tmp_path / "a.gguf", tmp_path / "back")
    back = loaded(tmp_path / "back")
    for name, tensor in state.items():
        assert tensor.dtype == back[name].dtype, name
        assert torch.equal(tensor.isnan(), back[name].isnan()), name
        assert torch.equal(tensor.nan_to_num(), back[name].nan_to_num()), name


def q8_file(place: Path, scale: float) -> None:
    """All Q8_0 or F32; the first block has a scale of its own and the codes 127."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in names.checkpoint_shapes(names.transformer_table(CONFIG, "fused")).items():
        matrix = len(shape) == 2 and shape[-1] % 32 == 0 and "pad_token" not in name
        tensors[name] = random_packed("Q8_0" if matrix else "F32", shape, rng)
    name = "layers.0.attention.qkv.weight"
    block = np.float16(scale).tobytes() + bytes([127]) * 32
    tensors[name] = replace(tensors[name], data=block + tensors[name].data[len(block) :])
    write_gguf(place, tensors)


@pytest.mark.parametrize("dequantize", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_what_is_decoded_is_not_judged_either(tmp_path, dequantize, scale):
    q8_file(tmp_path / "q.gguf", scale)
    convert_file(tmp_path / "q.gguf", tmp_path / "a.safetensors", dequantize=dequantize)
    first = load_file(tmp_path / "a.safetensors")["layers.0.attention.qkv.weight"][0, :32].float()
    assert bool(torch.isnan(first).all() if scale != scale else (first == scale).all())


def test_what_float16_cannot_hold_is_refused_with_a_way_out(tmp_path):
    q8_file(tmp_path / "q.gguf", 65504.0)
    wanted = (
        r"has 32 numbers that are beyond the range of F16, the first at \[0, 0\]; dequantise to bf16 or f32$"
    )
    with pytest.raises(BadWeights, match=wanted):
        convert_file(tmp_path / "q.gguf", tmp_path / "a.safetensors", dequantize="f16")
    convert_file(tmp_path / "q.gguf", tmp_path / "a.safetensors", dequantize="bf16")
