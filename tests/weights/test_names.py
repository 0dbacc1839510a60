"""Name tables: one-to-one both ways, complete for our modules, and the same maps as other projects make."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.errors import BadArgument
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.weights import names

TOY_DIT = TransformerConfig(
    dim=48, n_layers=3, n_heads=3, cap_feat_dim=20, hidden_dim=128, axes_dims=(4, 6, 6)
)
TOY_VAE = AutoencoderConfig(block_out_channels=(16, 16, 32, 48), norm_num_groups=8)


def toy_encoder(arch: str, layers: int = 4) -> TextEncoderConfig:
    return TextEncoderConfig(
        arch=arch, hidden_size=48, num_layers=layers, num_heads=4, num_kv_heads=2, head_dim=16,
        intermediate_size=96, vocab_size=100, qk_norm=arch == "qwen3", attention_bias=arch == "qwen2",
    )  # fmt: skip


TABLES = [
    pytest.param(table, network, config, layout, id=f"{network.__name__}-{layout}-{label}")
    for table, network, layouts, configs in (
        (
            names.transformer_table,
            ZImageTransformer,
            names.TRANSFORMER_LAYOUTS,
            {"full": TransformerConfig(), "toy": TOY_DIT},
        ),
        (
            names.text_encoder_table,
            TextEncoder,
            names.TEXT_ENCODER_LAYOUTS,
            {
                "full": TextEncoderConfig(),
                **{arch: toy_encoder(arch) for arch in ("qwen3", "qwen2", "llama")},
            },
        ),
        (
            names.autoencoder_table,
            Autoencoder,
            names.VAE_LAYOUTS,
            {
                "full": AutoencoderConfig(),
                "toy": TOY_VAE,
                "one": AutoencoderConfig((32,), layers_per_block=1),
            },
        ),
    )
    for layout in layouts
    for label, config in configs.items()
]

every_table = pytest.mark.parametrize(("table", "network", "config", "layout"), TABLES)


@every_table
def test_every_parameter_has_exactly_one_entry_of_its_shape(table, network, config, layout):
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in network(config).named_parameters()}
    entries = table(config, layout)
    assert len({e.module for e in entries}) == len(entries)
    assert {e.module: e.shape for e in entries} == wanted


@every_table
def test_checkpoint_to_module_is_the_inverse(table, network, config, layout):
    """Each checkpoint row belongs to exactly one parameter: the cuts of a tensor touch and cover it."""
    entries = table(config, layout)
    back = names.sources(entries)
    assert sorted((e for group in back.values() for e in group), key=str) == sorted(entries, key=str)
    for name, group in back.items():
        assert {e.checkpoint for e in group} == {name}
        if len(group) == 1:
            assert group[0].rows is None
            continue
        assert group[0].rows[0] == 0
        assert group[-1].rows[1] == group[0].total_rows
        assert all(a.rows[1] == b.rows[0] for a, b in pairwise(group))
        assert len({e.stored_shape for e in group}) == 1


@pytest.mark.parametrize(
    ("layout", "tensors", "omni"), [("split", 521, 551), ("fused", 453, None), ("sdcpp", 521, None)]
)
def test_full_transformer_has_the_known_tensor_count(layout, tensors, omni):
    assert len(names.checkpoint_shapes(names.transformer_table(TransformerConfig(), layout))) == tensors
    if omni:
        table = names.transformer_table(TransformerConfig(siglip_feat_dim=1152), layout)
        assert len(names.checkpoint_shapes(table)) == omni


@pytest.mark.parametrize("layout", names.TEXT_ENCODER_LAYOUTS)
def test_full_text_encoder_is_the_checkpoint_less_one_layer_and_the_norm(layout):
    assert len(names.text_encoder_table(TextEncoderConfig(), layout)) == 398 - 11 - 1


@pytest.mark.parametrize("layout", names.VAE_LAYOUTS)
def test_full_vae_has_the_known_tensor_count(layout):
    assert len(names.checkpoint_shapes(names.autoencoder_table(AutoencoderConfig(), layout))) == 244


def test_an_unknown_layout_is_refused_by_name():
    with pytest.raises(BadArgument, match="'nunchaku' is not one of split, fused"):
        names.transformer_table(TOY_DIT, "nunchaku")


def numbered(table: names.Table) -> dict[str, torch.Tensor]:
    """A checkpoint in which every row of every tensor is a number of its own."""
    out, start = {}, 0
    for name, shape in names.checkpoint_shapes(table).items():
        out[name] = (start + torch.arange(shape[0], dtype=torch.float64)).view(-1, *[1] * (len(shape) - 1))
        out[name] = out[name].expand(shape).contiguous()
        start += shape[0]
    return out


def through(table: names.Table, checkpoint: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {e.module: checkpoint[e.checkpoint][slice(*(e.rows or (None, None)))] for e in table}


@pytest.mark.parity
def test_fused_names_are_those_of_diffusers_converter():
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

    table = names.transformer_table(TOY_DIT, "fused")
    checkpoint = numbered(table)
    wanted = convert_z_image_transformer_checkpoint_to_diffusers(dict(checkpoint))
    got = through(table, checkpoint)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in got)


@pytest.mark.parity
@pytest.mark.parametrize("config", [AutoencoderConfig(), TOY_VAE], ids=["full", "toy"])
def test_bfl_names_are_those_of_diffusers_converter(config):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    table = names.autoencoder_table(config, "bfl")
    checkpoint = numbered(table)
    # a size diffusers uses to tell 1x1 convolutions from linear layers, as in the real file
    for name in checkpoint:
        if ".attn_1." in name and ".norm." not in name and name.endswith("weight"):
            checkpoint[name] = checkpoint[name][..., None, None]
    plan = {
        "down_block_types": ["DownEncoderBlock2D"] * len(config.block_out_channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
    }
    wanted = convert_ldm_vae_checkpoint(dict(checkpoint), plan)
    got = {
        name: t.view(t.shape[:2]) if ".to_" in name and t.ndim == 4 else t
        for name, t in through(table, checkpoint).items()
    }
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name].view(got[name].shape)) for name in got)


@pytest.mark.parametrize("arch", ["qwen3", "qwen2", "llama"])
def test_gguf_names_are_those_of_llama_cpp(arch):
    import gguf

    config = toy_encoder(arch)
    tensor_names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), config.num_layers)
    for entry in names.text_encoder_table(config, "gguf"):
        stem, _, leaf = entry.module.rpartition(".")
        assert f"{tensor_names.get_name('model.' + stem)}.{leaf}" == entry.checkpoint


def test_only_q_and_k_of_llama_ggufs_are_permuted():
    for arch in ("qwen3", "qwen2"):
        assert not any(e.heads for e in names.text_encoder_table(toy_encoder(arch), "gguf"))
    assert not any(e.heads for e in names.text_encoder_table(toy_encoder("llama"), "hf"))
    heads = {
        e.module.split(".", 2)[2]: e.heads for e in names.text_encoder_table(toy_encoder("llama"), "gguf")[1:]
    }
    assert {part for part, count in heads.items() if count} == {
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
    }
    assert heads["self_attn.q_proj.weight"] == 4
    assert heads["self_attn.k_proj.weight"] == 2
