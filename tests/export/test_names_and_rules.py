"""The name of the output says what is written, and a recipe fits the model: else nothing is written."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers.model_files import encoder_metadata, stored, toy_encoder, write_gguf
from tests.helpers.wide import wide_state, write_wide
from zimage_core import BadArgument, BadWeights, Unsupported, convert_file, open_weights, quantize_file
from zimage_core.export.recipes import parse_recipe
from zimage_core.weights import names


@pytest.mark.parametrize("name", ["a.safetensors", "a.SFT", "a.bin", "a", "a.gguf.tmp", "v1.0"])
def test_quantize_writes_a_gguf_under_no_other_name(wide, tmp_path, name):
    with pytest.raises(BadArgument, match=r"a GGUF is written; give it a name that ends in \.gguf"):
        quantize_file(wide, tmp_path / name, "Q8_0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("a.bin", None), ("a.pt", None), ("a.ONNX", None), ("a.ckpt", "diffusers"), ("a.gguf", "single"),
        ("a.safetensors", "gguf"), ("a.safetensors", "diffusers"), ("a", "gguf"), ("a", "single"),
    ],
)  # fmt: skip
def test_convert_refuses_a_name_for_something_else(wide, tmp_path, name, to):
    with pytest.raises(BadArgument, match=r"wanted a name that ends in \.gguf or \.safetensors"):
        convert_file(wide, tmp_path / name, to)
    assert not list(tmp_path.iterdir())


def test_names_with_dots_and_capitals_are_taken(wide, tmp_path):
    convert_file(wide, tmp_path / "v1.0")
    assert (tmp_path / "v1.0" / "config.json").is_file()
    convert_file(wide, tmp_path / "a.sft")
    with open_weights(tmp_path / "a.sft") as file:
        assert file.kind == "safetensors"
    quantize_file(wide, tmp_path / "A.GGUF", "Q8_0")


def test_an_option_for_another_kind_is_refused(wide, tmp_path):
    for name in ("a.safetensors", "a.gguf"):
        with pytest.raises(BadArgument, match="only a folder of diffusers has shards"):
            convert_file(wide, tmp_path / name, shard_bytes=1)
    with pytest.raises(BadArgument, match="shard-size"):
        convert_file(wide, tmp_path / "out", shard_bytes=0)


@pytest.mark.parametrize(
    "rule",
    [
        "layer.*.qkv.weight = Q8_0",
        "blk.*.attn_v.weight = Q8_0",
        "layers.*.qkv.weight [7-9] = Q8_0",
        "q = Q8_0",
    ],
)
def test_a_rule_that_names_no_tensor_is_refused(wide, tmp_path, rule):
    recipe = parse_recipe(f"{rule}\n* = F16\n", "mine")
    with pytest.raises(BadArgument, match="no such tensor among"):
        quantize_file(wide, tmp_path / "a.gguf", recipe=recipe)
    assert not list(tmp_path.iterdir())


def test_the_recipe_of_a_standard_mix_is_a_recipe(wide, model, tmp_path):
    """Its rules for the vision branch and the output matrix name tensors that few models have."""
    for source, part in ((wide, "transformer"), (model, "text_encoder")):
        done = quantize_file(source, tmp_path / f"{part}.gguf", "Q4_K_M", component=part)
        again = tmp_path / f"{part}2.gguf"
        quantize_file(source, again, recipe=parse_recipe(done.recipe.text(), "again"), component=part)
    with pytest.raises(BadArgument, match="no such tensor"):
        quantize_file(wide, tmp_path / "x.gguf", recipe=done.recipe)


@pytest.mark.parametrize(
    ("dtype", "value", "type", "message"),
    [
        (torch.bfloat16, 1e38, "Q8_0", "holds 9.96921e[+]37, beyond the range of Q8_0; choose BF16 or F32"),
        (torch.bfloat16, -1e8, "Q4_0", "holds -1.00139e[+]08, beyond the range of Q4_0"),
        (torch.float32, 3.4e38, "BF16", "1 numbers that are beyond the range of BF16, .*choose F32 for it"),
        (torch.float64, 1e300, "Q8_0", "holds numbers beyond the range of float32"),
    ],
)
def test_a_number_too_large_for_its_new_type_is_named(tmp_path, dtype, value, type, message):
    """Scales of most blocks are float16: the number would come back a thousand times smaller, or infinite."""
    state, name = wide_state(dtype), "layers.0.feed_forward.w1.weight"
    state[name][3, 5] = value
    source = write_wide(tmp_path / "in", state)
    with pytest.raises(BadWeights, match=f"{name} .*{message}"):
        quantize_file(source, tmp_path / "a.gguf", type)
    assert not (tmp_path / "a.gguf").exists()


def test_a_scale_beside_packed_blocks_is_applied_or_the_file_refused(tmp_path):
    """NVFP4 of llama.cpp's converter: `.scale` multiplies the matrix, and no block could take it up."""
    config = toy_encoder()
    content = stored(names.checkpoint_shapes(names.text_encoder_table(config, "gguf")), matrix="NVFP4")
    plain = content.values()
    for i, name in enumerate([n for n in plain if n.startswith("blk.") and plain[n].ndim == 2]):
        scale = np.array([0.25 + i], np.float32)
        content.tensors[name.replace(".weight", ".scale")] = ("F32", scale.view(np.uint8), (1,))
        plain[name] = plain[name] * float(scale[0])
    write_gguf(tmp_path / "in.gguf", content, encoder_metadata(config))
    with pytest.raises(Unsupported, match=r"stored as NVFP4, which cannot be carried over .*--dequantize"):
        convert_file(tmp_path / "in.gguf", tmp_path / "a.gguf")
    convert_file(tmp_path / "in.gguf", tmp_path / "a.gguf", dequantize="f32")
    quantize_file(tmp_path / "in.gguf", tmp_path / "b.gguf", "F32", requantize=True)
    for name in ("a.gguf", "b.gguf"):
        with open_weights(tmp_path / name) as file:
            assert file.tensors.keys() == plain.keys(), "scales are in the numbers now"
            assert all(torch.equal(file.tensor(n).dequantize(), plain[n]) for n in plain)


def test_dequantising_floats_is_told_to_change_nothing(wide, tmp_path):
    done = convert_file(wide, tmp_path / "a.safetensors", dequantize="f32")
    assert set(done.types) == {"BF16"}
    assert "nothing is packed" in done.remarks[0]
