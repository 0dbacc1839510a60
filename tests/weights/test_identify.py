"""Components of Z-Image are identified by their tensors at any size; those that do not fit are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.helpers.headers import (
    FLUX_VAE,
    FULL_DIT,
    QWEN3_1_7B,
    QWEN3_4B,
    QWEN3_8B,
    dit,
    encoder,
    header,
    vae,
)
from tests.helpers.model_files import TOY_DIT, TOY_VAE, encoder_metadata, toy_encoder
from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.errors import WrongModel
from zimage_core.weights import names
from zimage_core.weights.card import check_compatible, require
from zimage_core.weights.identify import identify


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "a.b.c."])
@pytest.mark.parametrize("layout", names.TRANSFORMER_LAYOUTS)
@pytest.mark.parametrize(
    "config",
    [
        TransformerConfig(),
        TOY_DIT,
        TransformerConfig(
            dim=384, n_layers=4, n_refiner_layers=1, n_heads=3, cap_feat_dim=256, hidden_dim=1024
        ),
        replace(TransformerConfig(), siglip_feat_dim=1152),
    ],
    ids=["full", "toy", "nano", "omni"],
)
def test_transformers_of_any_size(config, layout, prefix):
    card = identify(header(dit(layout, config, prefix)))
    assert (card.kind, card.layout, card.prefix, card.config) == ("transformer", layout, prefix, config)
    assert card.sound
    assert card.needs == ("text_encoder", "vae")
    assert card.variant == ("omni" if config.siglip_feat_dim else "")
    require(card, "transformer", "x")


@pytest.mark.parametrize("layout", names.TEXT_ENCODER_LAYOUTS)
@pytest.mark.parametrize("config", [TextEncoderConfig(), QWEN3_8B, toy_encoder()], ids=["4B", "8B", "toy"])
def test_text_encoders_of_any_size(config, layout):
    metadata = encoder_metadata(config) if layout == "gguf" else {}
    shapes = encoder(layout, config, "" if layout == "gguf" else "model.")
    if layout == "hf":  # without metadata, the layers that are there are all there are
        shapes |= {n.replace("layers.0.", f"layers.{config.num_layers - 1}."): s for n, s in shapes.items()}
    card = identify(header(shapes, metadata))
    assert (card.kind, card.config) == ("text_encoder", config)
    assert card.sound


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize("layout", names.VAE_LAYOUTS)
def test_vaes(layout, prefix):
    card = identify(header(vae(layout, prefix=prefix)))
    assert (card.kind, card.layout, card.config) == ("vae", layout, AutoencoderConfig())
    assert card.sound


def test_a_derivative_of_qwen3_4b_is_noted():
    metadata = encoder_metadata(TextEncoderConfig()) | {"qwen3.rope.freq_base": 5e6}
    assert "2507" in identify(header(encoder(), metadata)).cautions[0]


def test_turbo_is_told_by_the_files_own_name_only():
    assert identify(header(dit(), {"general.name": "Z Image Turbo"})).variant == "turbo"


def test_a_card_is_json():
    for shapes in (dit(), encoder(), vae(), {"a": (1,)}):
        assert json.loads(json.dumps(identify(header(shapes)).to_json()))["title"]


def test_an_all_in_one_file_tells_all_its_parts():
    both = dit(prefix="model.diffusion_model.") | vae(prefix="vae.")
    card = identify(header(both))
    assert (card.kind, card.also, card.needs) == ("transformer", ("vae",), ("text_encoder",))
    assert card.sound
    assert identify(header(both), "vae").kind == "vae"


@pytest.mark.parametrize("nested", ["", "model."])
def test_a_part_is_judged_by_its_own_tensors(nested):
    """The encoder's nvfp4 is no fault of the parts beside it, even where its prefix encloses theirs."""
    packed = {f"{nested}layers.0.mlp.up_proj.weight_scale_2": (1,), "spare.qweight": (4, 4)}
    both = encoder("hf", prefix=nested) | packed | vae(prefix="model.vae.")
    assert not identify(header(both), "vae").problem
    assert "nvfp4" in identify(header(both), "text_encoder").problem
    aio = dit(prefix="model.diffusion_model.") | encoder("hf", prefix="te.") | {"te.x.SCB": (1,)}
    assert not identify(header(aio), "transformer").problem
    assert "bitsandbytes" in identify(header(aio), "text_encoder").problem


# --- compatibility ------------------------------------------------------------------------


def test_parts_that_belong_together_pass():
    check_compatible(TransformerConfig(), TextEncoderConfig(), AutoencoderConfig())
    check_compatible(TOY_DIT, toy_encoder(), TOY_VAE)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (QWEN3_8B, r"Qwen3-8B text encoder \(width 4096\)"),
        (QWEN3_1_7B, r"Qwen3-1\.7B text encoder \(width 2048\)"),
    ],
)
def test_a_wrong_encoder_is_refused_before_any_matrix_is(config, what):
    with pytest.raises(
        WrongModel, match=rf"te\.gguf: this is a {what}; the .* needs width 2560; get Qwen3-4B"
    ):
        check_compatible(TransformerConfig(), config, paths={"text_encoder": "te.gguf"})


def test_a_toy_transformer_names_no_real_encoder():
    with pytest.raises(WrongModel, match="needs width 256; get the text encoder it was trained with"):
        check_compatible(TOY_DIT, TextEncoderConfig())


def test_a_wrong_vae_is_refused():
    with pytest.raises(
        WrongModel, match=r"4 latent channels; the Z-Image transformer needs 16; get ae\.safetensors"
    ):
        check_compatible(TransformerConfig(), vae=AutoencoderConfig(latent_channels=4))


def test_a_cut_qwen3_4b_is_refused_and_a_cut_transformer_warned_of():
    cut = replace(QWEN3_4B, num_layers=20)
    assert "19 layers, Qwen3-4B has 36" in identify(header(encoder("hf", cut))).problem
    assert identify(header(encoder("hf"))).sound
    card = identify(header(dit(config=replace(FULL_DIT, n_layers=29))))
    assert card.sound
    assert "29 layers where Z-Image has 30" in card.cautions[0]


def test_a_flux2_vae_in_either_naming_is_named():
    shapes = vae(config=replace(FLUX_VAE, latent_channels=32)) | {"encoder.quant_conv.weight": (64, 64, 1, 1)}
    assert "FLUX.2" in identify(header(shapes)).title
