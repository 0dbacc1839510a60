"""Every way a network is stored gives the same weights in the module, bit for bit."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers.loaded import FUSED, SPLIT, assert_same, hf_to_gguf, split_names, weights
from tests.helpers.model_files import (
    TOY_DIT,
    TOY_VAE,
    encoder_metadata,
    stored,
    toy_encoder,
    write_gguf,
    write_safetensors,
)
from zimage_core.errors import BadFile
from zimage_core.formats import FORMATS
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.quant.tensor import QuantTensor
from zimage_core.weights import names
from zimage_core.weights.load import load_text_encoder, load_transformer, load_vae, opened_file

MATRIX_FORMATS = [name for name, fmt in FORMATS.items() if fmt.ggml_type is not None and not fmt.is_integer]


@pytest.mark.parametrize("fmt", MATRIX_FORMATS)
def test_fused_gguf_in_every_format(tmp_path, fmt):
    """qkv is cut by byte rows in the format it is stored in; nothing is decoded on the way."""
    content = stored(FUSED, matrix=fmt)
    path = write_gguf(tmp_path / "x.gguf", content, {"general.architecture": "lumina2"})
    model = load_transformer(path)
    assert_same(model, split_names(content.values()))
    assert model.config == TOY_DIT
    q = model.layers[1].attention.to_q
    assert (not isinstance(q.weight, QuantTensor)) == (fmt == "F32")
    if isinstance(q.weight, QuantTensor):
        assert q.weight.format is FORMATS[fmt]


PREFIXES = [
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "model.",
    "module._orig_mod.model.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", ["split", "fused", "sdcpp"])
def test_all_layouts_under_any_prefix(tmp_path, layout, prefix):
    content = stored(SPLIT if layout == "split" else FUSED, matrix="Q8_0")
    wanted = content.values() if layout == "split" else split_names(content.values())
    if layout == "sdcpp":
        for name in [n for n in content.tensors if n.endswith("qkv.weight")]:
            fmt, packed, (rows, columns) = content.tensors.pop(name)
            for i, piece in enumerate(np.split(packed, 3)):
                content.tensors[name + (f".{i}" if i else "")] = (fmt, piece, (rows // 3, columns))
    assert_same(load_transformer(write_gguf(tmp_path / "x.gguf", content.prefixed(prefix), None)), wanted)


def test_a_file_of_stable_diffusion_cpp(tmp_path):
    """No metadata, a prefix, vectors quantised, pads squeezed, norm_final kept."""
    shapes = {n: (s[-1],) if n.endswith("pad_token") else s for n, s in FUSED.items()}
    content = stored(shapes, matrix="Q4_K", vector="Q4_K")
    wanted = split_names(content.values())
    content.tensors |= stored({"norm_final.weight": (256,)}).tensors
    assert content.tensors["layers.0.attention_norm1.weight"][0] == "Q4_K"
    assert content.tensors["layers.0.attention.q_norm.weight"][0] == "BF16"
    assert content.tensors["x_pad_token"][2] == (256,)
    model = load_transformer(
        write_gguf(tmp_path / "x.gguf", content.prefixed("model.diffusion_model."), None)
    )
    assert_same(model, wanted)
    assert model.x_pad_token.shape == (1, 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fmt", ["F32", "F16", "BF16"])
def test_dense_files_at_every_compute_dtype(tmp_path, fmt, dtype):
    """Only a matrix stored in the compute dtype becomes dense; the rest stays as it is in the file."""
    content = stored(SPLIT, matrix=fmt, vector=fmt, other=fmt)
    model = load_transformer(write_safetensors(tmp_path / "x.safetensors", content), dtype=dtype)
    same = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[fmt] is dtype
    assert (not isinstance(model.layers[0].feed_forward.w1.weight, QuantTensor)) == same
    assert model.dtype is dtype
    assert model.layers[0].ffn_norm1.weight.dtype is dtype
    wanted = content.values()
    for name, value in weights(model).items():
        kept = name.endswith(".weight") and wanted[name].ndim == 2
        assert torch.equal(value, wanted[name] if kept else wanted[name].to(dtype).float()), name


def test_a_loaded_model_computes_what_the_dense_one_does(tmp_path):
    """8 relative rounding errors of float32 around the largest output: only the order of sums differs."""
    content = stored(FUSED, matrix="Q8_0")
    model = load_transformer(write_gguf(tmp_path / "x.gguf", content, None))
    dense = ZImageTransformer(TOY_DIT).eval()
    dense.load_state_dict(split_names(content.values()))
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(16, 1, 6, 10, generator=g)], torch.tensor([0.3]), [torch.randn(7, 256, generator=g)]
    with torch.no_grad():
        got, wanted = model(*inputs)[0], dense(*inputs)[0]
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_weights_are_views_of_the_file(tmp_path):
    content = stored(FUSED, matrix="Q4_K")
    path = write_gguf(tmp_path / "x.gguf", content, None)
    model = load_transformer(path)
    parts = [getattr(model.layers[0].attention, f"to_{p}").weight.packed for p in "qkv"]
    assert len({p.untyped_storage().data_ptr() for p in parts}) == 1
    assert parts[1].data_ptr() - parts[0].data_ptr() == parts[0].numel()
    apart = load_transformer(path, mmap=False)
    gc.collect()
    assert_same(apart, split_names(content.values()))


def test_the_source_of_a_model_is_watched(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", stored(FUSED, matrix="Q8_0"), None)
    model = load_transformer(path)
    opened_file(model).file.check_unchanged()
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(BadFile, match="changed while in use"):
        opened_file(model).file.check_unchanged()
    assert opened_file(nn.Linear(1, 1)) is None


# --- text encoder -------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("fmt", ["F32", "Q4_K", "IQ3_S"])
def test_text_encoder_gguf(tmp_path, arch, fmt):
    config = toy_encoder(arch)
    content = stored(names.checkpoint_shapes(names.text_encoder_table(config, "hf")), matrix=fmt)
    file = hf_to_gguf(config, content, permute=arch == "llama")
    # the last layer and the final norm: present in most files, never read
    file.tensors |= stored({"blk.2.attn_q.weight": (512, 256), "output_norm.weight": (256,)}).tensors
    model = load_text_encoder(write_gguf(tmp_path / "x.gguf", file, encoder_metadata(config)))
    assert_same(model, content.values())
    assert model.config == config
    with torch.no_grad():
        assert model(torch.tensor([1, 2, 63])).isfinite().all()


def test_the_last_layer_may_be_absent(tmp_path):
    config = toy_encoder()
    content = stored(names.checkpoint_shapes(names.text_encoder_table(config, "gguf")))
    model = load_text_encoder(write_gguf(tmp_path / "x.gguf", content, encoder_metadata(config)))
    assert len(model.layers) == 2


@pytest.mark.parametrize("prefix", ["", "model.", "text_encoders.qwen3_4b.transformer.model."])
def test_text_encoder_safetensors_without_config(tmp_path, prefix):
    config = toy_encoder()
    content = stored(names.checkpoint_shapes(names.text_encoder_table(config, "hf")), matrix="BF16")
    file = content.prefixed(prefix)
    last = {
        f"{prefix}layers.2.mlp.up_proj.weight": (512, 256),
        f"{prefix}norm.weight": (256,),
        "lm_head.weight": (64, 256),
    }
    file.tensors |= stored(last).tensors
    model = load_text_encoder(write_safetensors(tmp_path / "x.safetensors", file))
    assert model.config == config
    assert_same(model, content.values())


# --- VAE ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize("layout", names.VAE_LAYOUTS)
def test_vae_of_both_layouts(tmp_path, layout, prefix):
    table = names.autoencoder_table(TOY_VAE, layout)
    shapes = names.checkpoint_shapes(table)
    if layout == "bfl":
        shapes = {n: (*s, 1, 1) if ".attn_1." in n and len(s) == 2 else s for n, s in shapes.items()}
    content = stored(shapes)
    values = content.values()
    path = write_safetensors(
        tmp_path / "x.safetensors",
        content.prefixed(prefix),
        {"zimage.norm_num_groups": "4", "zimage.scaling_factor": "0.5"},
    )
    model = load_vae(path)
    assert model.config.norm_num_groups == 4
    assert model.config.scaling_factor == 0.5
    assert_same(model, {e.module: values[e.checkpoint] for e in table})


def test_vae_of_a_gguf_in_f16(tmp_path):
    table = names.autoencoder_table(TOY_VAE, "bfl")
    content = stored(names.checkpoint_shapes(table), matrix="F16", other="F16")
    values = content.values()
    model = load_vae(write_gguf(tmp_path / "x.gguf", content, None))
    assert_same(model, {e.module: values[e.checkpoint] for e in table})


def test_what_may_make_other_images_is_warned_of(tmp_path):
    path = write_safetensors(tmp_path / "x.safetensors", stored(SPLIT))
    (tmp_path / "config.json").write_text('{"dim": 3840}')
    with pytest.warns(UserWarning, match=r"x\.safetensors: config\.json beside the file was ignored"):
        load_transformer(path)
