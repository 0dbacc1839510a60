"""Every way a network is stored gives the same weights in the module, bit for bit."""

from __future__ import annotations

import gc
import json

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers.model_files import (
    TOY_DIT,
    TOY_VAE,
    Stored,
    encoder_metadata,
    stored,
    toy_encoder,
    write_gguf,
    write_json,
    write_safetensors,
)
from zimage_core.errors import BadArgument, BadFile, BadWeights, Unsupported, WrongModel
from zimage_core.formats import FORMATS
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.nn.linear import Embedding, Linear
from zimage_core.weights import names
from zimage_core.weights.load import load_text_encoder, load_transformer, load_vae, weight_file

FUSED = names.checkpoint_shapes(names.transformer_table(TOY_DIT, "fused"))
SPLIT = names.checkpoint_shapes(names.transformer_table(TOY_DIT, "split"))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter as float32, packed ones dequantised."""
    found = {name: p.detach().float() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, (Linear, Embedding)) and module.quant is not None:
            found[f"{name}.weight"] = module.quant.dequantize(torch.float32)
    return found


def split_names(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fused names to diffusers', written out by hand and apart from names.py."""
    out = {}
    for name, value in values.items():
        if name.endswith("attention.qkv.weight"):
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                out[name.replace("qkv", f"to_{part}")] = piece
            continue
        for old, new in (
            ("attention.out.", "attention.to_out.0."),
            ("attention.q_norm.", "attention.norm_q."),
            ("attention.k_norm.", "attention.norm_k."),
        ):
            name = name.replace(old, new)
        if name.startswith(("x_embedder.", "final_layer.")):
            head, rest = name.split(".", 1)
            name = f"all_{head}.2-1.{rest}"
        out[name] = value
    return out


def assert_same(model: nn.Module, wanted: dict[str, torch.Tensor]) -> None:
    got = weights(model)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value.reshape(got[name].shape)), name
    assert not any(t.is_meta or t.requires_grad for t in (*model.parameters(), *model.buffers()))
    assert not model.training


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
    assert (q.quant is None) == (fmt == "F32")
    if q.quant is not None:
        assert q.quant.format is FORMATS[fmt]


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
    assert (model.layers[0].feed_forward.w1.quant is None) == same
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
    parts = [getattr(model.layers[0].attention, f"to_{p}").packed for p in "qkv"]
    assert len({p.untyped_storage().data_ptr() for p in parts}) == 1
    assert parts[1].data_ptr() - parts[0].data_ptr() == parts[0].numel()
    apart = load_transformer(path, mmap=False)
    gc.collect()
    assert_same(apart, split_names(content.values()))


def test_the_source_of_a_model_is_watched(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", stored(FUSED, matrix="Q8_0"), None)
    model = load_transformer(path)
    weight_file(model).check_unchanged()
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(BadFile, match="changed while in use"):
        weight_file(model).check_unchanged()
    assert weight_file(nn.Linear(1, 1)) is None


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
    assert model.layers[0].feed_forward.w2.quant.format is FORMATS[fmt]


def test_fp8_of_comfy_quant(tmp_path):
    extra = {".comfy_quant": E4M3, ".input_scale": ("U8", b"\0")}
    content, wanted = fp8_file(tmp_path, scale=(".weight_scale", "one"), extra=extra)
    assert_same(load_transformer(write_safetensors(tmp_path / "x.safetensors", content)), wanted)


@pytest.mark.parametrize(
    ("quant", "error", "message"),
    [
        (b'{"format": "int8_tensorwise"}', Unsupported, "int8_tensorwise.*get the same model as GGUF"),
        (b'{"format": "float8_e4m3fn", "convrot": true}', Unsupported, "convrot"),
        (b'{"format": "nvfp4"}', Unsupported, "nvfp4"),
        (b"not json", BadWeights, "not JSON"),
        (b"[" * 4000, BadWeights, "not JSON"),
        (b"[1]", Unsupported, "None"),
        (b" " * 5000, BadWeights, "5000 bytes"),
    ],
)
def test_other_comfy_quants_are_refused_by_name(tmp_path, quant, error, message):
    content, _ = fp8_file(tmp_path, scale=(".weight_scale", "one"), extra={".comfy_quant": ("U8", quant)})
    with pytest.raises(error, match=message):
        load_transformer(write_safetensors(tmp_path / "x.safetensors", content))


def test_a_scale_of_blocks_is_refused(tmp_path):
    content, _ = fp8_file(tmp_path)
    content.tensors["layers.0.feed_forward.w1.weight_scale"] = (
        "F32",
        np.ones(8, np.float32).view(np.uint8),
        (4, 2),
    )
    with pytest.raises(Unsupported, match=r"scale of shape \(4, 2\)"):
        load_transformer(write_safetensors(tmp_path / "x.safetensors", content))


def test_a_scale_that_is_not_finite_is_refused(tmp_path):
    content, _ = fp8_file(tmp_path)
    nan = np.full(1, np.nan, np.float32).view(np.uint8)
    content.tensors["layers.0.feed_forward.w1.scale_weight"] = ("F32", nan, ())
    with pytest.raises(BadWeights, match=r"w1\.weight.*NaN"):
        load_transformer(write_safetensors(tmp_path / "x.safetensors", content))


# --- text encoder -------------------------------------------------------------------------


def hf_to_gguf(config, content: Stored, permute: bool) -> Stored:
    """HF names to GGUF by the package of llama.cpp; q and k of llama permuted by its formula."""
    import gguf

    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, config.arch.upper()), config.num_layers)
    out = Stored()
    for name, (fmt, packed, shape) in content.tensors.items():
        stem, _, leaf = name.rpartition(".")
        for part, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
            if permute and stem.endswith(part):
                # convert_hf_to_gguf.py, LlamaModel.permute, on rows of bytes
                swapped = packed.reshape(heads, 2, packed.shape[0] // heads // 2, -1).swapaxes(1, 2)
                packed = np.ascontiguousarray(swapped.reshape(packed.shape))
        out.tensors[f"{table.get_name('model.' + stem) or stem}.{leaf}"] = (fmt, packed, shape)
    return out


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
    with pytest.raises(BadFile, match="without the part 'vae'"):
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


def test_the_vision_branch_of_omni_is_left_out(tmp_path):
    from dataclasses import replace

    shapes = names.checkpoint_shapes(names.transformer_table(replace(TOY_DIT, siglip_feat_dim=96), "split"))
    content = stored(shapes)
    model = load_transformer(write_safetensors(tmp_path / "x.safetensors", content))
    assert_same(model, {n: v for n, v in content.values().items() if not n.startswith("siglip_")})


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
