"""Another model is recognised, and the message says which file to get."""

from __future__ import annotations

import re

import pytest

from tests.helpers.headers import dit, encoder, header, vae
from zimage_core.config import AutoencoderConfig, TransformerConfig
from zimage_core.errors import WrongModel
from zimage_core.weights.card import require
from zimage_core.weights.identify import identify

LUMINA = {
    n.replace("adaLN_modulation.0", "adaLN_modulation.1"): s
    for n, s in dit(config=TransformerConfig(dim=2304, n_heads=18, n_layers=26, cap_feat_dim=2304)).items()
    if not n.endswith("pad_token")
}
SD_VAE = vae(config=AutoencoderConfig(latent_channels=4)) | {
    "quant_conv.weight": (8, 8, 1, 1),
    "post_quant_conv.weight": (4, 4, 1, 1),
}
VL = encoder("hf", prefix="model.language_model.") | {"model.visual.blocks.0.attn.qkv.weight": (3456, 1152)}

LOOKALIKES = {
    "Lumina-Image-2": (LUMINA, {"general.architecture": "lumina2"}, "transformer", r"Lumina-Image-2.*2304"),
    "Lumina-Image-2 of diffusers": (
        {
            "time_caption_embed.caption_embedder.0.weight": (2304,),
            "context_refiner.0.attn.to_q.weight": (2304, 2304),
        },
        {},
        "transformer",
        "Lumina-Image-2",
    ),
    "FLUX": (
        {"double_blocks.0.img_attn.qkv.weight": (9216, 3072), "single_blocks.0.linear1.weight": (1, 1)},
        {"general.architecture": "flux"},
        "transformer",
        r"FLUX\.1",
    ),
    "a GGUF of FLUX known by its tag": (
        {"x.weight": (2, 2)},
        {"general.architecture": "flux"},
        "transformer",
        r"FLUX\.1",
    ),
    "SDXL": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
            "model.diffusion_model.label_emb.0.0.weight": (1, 1),
        },
        {},
        "transformer",
        "Stable Diffusion XL",
    ),
    "SD 1": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
            "model.diffusion_model.output_blocks.0.0.w": (1,),
        },
        {},
        "transformer",
        "Stable Diffusion 1 or 2",
    ),
    "SD 3": ({"joint_blocks.0.x_block.attn.qkv.weight": (1, 1)}, {}, "transformer", "Stable Diffusion 3"),
    "Qwen-Image": (
        {"transformer_blocks.0.img_mlp.net.0.proj.weight": (1, 1)},
        {},
        "transformer",
        "Qwen-Image",
    ),
    "CLIP": ({"text_model.encoder.layers.0.self_attn.q_proj.weight": (768, 768)}, {}, "text_encoder", "CLIP"),
    "T5": ({"encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096)}, {}, "text_encoder", "T5"),
    "T5 GGUF": (
        {f"enc.{n}": s for n, s in encoder().items()},
        {"general.architecture": "t5encoder"},
        "text_encoder",
        "T5",
    ),
    "a VL encoder": (VL, {}, "text_encoder", "vision-language"),
    "a VL GGUF": (encoder(), {"general.architecture": "qwen3vl"}, "text_encoder", "vision-language"),
    "an mmproj": (
        {"v.blk.0.attn_q.weight": (1, 1)},
        {"general.architecture": "clip"},
        "text_encoder",
        "mmproj",
    ),
    "Gemma": (
        encoder() | {"blk.0.post_ffw_norm.weight": (2560,)},
        {"general.architecture": "gemma3"},
        "text_encoder",
        "Gemma",
    ),
    "another language model": (encoder(), {"general.architecture": "stablelm"}, "text_encoder", "stablelm"),
    "a mixture of experts": (
        {"model.layers.0.mlp.experts.0.up_proj.weight": (1, 1)},
        {},
        "text_encoder",
        "mixture-of-experts",
    ),
    "an SD VAE": (SD_VAE, {}, "vae", "Stable Diffusion 1, 2 or XL VAE"),
    "a FLUX.2 VAE": (
        vae(config=AutoencoderConfig(latent_channels=32)) | {"post_quant_conv.weight": (32, 32, 1, 1)},
        {},
        "vae",
        r"FLUX\.2 VAE",
    ),
    "TAESD": ({"taesd_decoder.1.weight": (64, 4, 3, 3)}, {}, "vae", "tiny autoencoder"),
    "a video VAE": ({"decoder.middle.0.residual.2.weight": (1, 1)}, {}, "vae", "video VAE"),
    "nothing known": (
        {"linear.weight": (3, 3)},
        {},
        "vae",
        r"an unknown model \(1 tensors: linear\.weight\)",
    ),
    "no tensors": ({}, {}, "transformer", r"an unknown model \(0 tensors\)"),
    "a vocabulary": ({}, {"tokenizer.ggml.tokens": ["a"]}, "text_encoder", "a vocabulary without weights"),
    "one shard of a transformer": (
        {n: s for n, s in dit("split").items() if n.startswith("layers.2")},
        {},
        "transformer",
        "a part of a Z-Image transformer",
    ),
    "one shard of an encoder": (
        {n: s for n, s in encoder("hf").items() if n.startswith("layers.2")},
        {},
        "text_encoder",
        "a part of a language model",
    ),
}


@pytest.mark.parametrize("case", LOOKALIKES)
def test_lookalikes_are_named_and_the_right_file_too(case):
    shapes, metadata, wanted, message = LOOKALIKES[case]
    card = identify(header(shapes, metadata), wanted)
    assert card.kind != wanted
    get = {"transformer": "get a Z-Image", "text_encoder": "get Qwen3-4B", "vae": r"get ae\.safetensors"}[
        wanted
    ]
    with pytest.raises(WrongModel, match=f"{message}.*; {get}") as caught:
        require(card, wanted, "x.bin")
    assert str(caught.value).count("\n") == 0
    assert identify(header(shapes, metadata)).kind == card.kind


@pytest.mark.parametrize(
    ("given", "wanted"), [("transformer", "vae"), ("vae", "text_encoder"), ("text_encoder", "transformer")]
)
def test_the_right_file_in_the_wrong_place(given, wanted):
    card = identify(header({"transformer": dit, "text_encoder": encoder, "vae": vae}[given]()), wanted)
    with pytest.raises(WrongModel, match=f"pass it as the {given.replace('_', ' ')}, and for this part get"):
        require(card, wanted, "x")


@pytest.mark.parametrize(
    ("names_of_style", "style"),
    [
        ("x.absmax x.quant_map", "bitsandbytes 4-bit"),
        ("x.SCB", "bitsandbytes 8-bit"),
        ("x.qweight x.wscales x.smooth_factor", "Nunchaku"),
        ("x.qweight x.qzeros", "GPTQ or AWQ"),
        ("x.weight_scale_2", "nvfp4"),
        ("x.weight_scale_inv", "128 x 128"),
        ("x.scales x.biases", "MLX"),
    ],
)
def test_other_quantisations_are_refused_by_name(names_of_style, style):
    card = identify(header(dit() | dict.fromkeys(names_of_style.split(), (1,))))
    with pytest.raises(
        WrongModel, match=f"quantised by .*{style}.*get the same model as GGUF, or as bf16 or fp8"
    ):
        require(card, "transformer", "x")


def test_the_quantisation_is_named_before_the_sizes_it_hides():
    shapes = {n: s for n, s in dit().items() if "feed_forward" not in n}
    card = identify(header(shapes | {"layers.0.feed_forward.w1.qweight": (1, 1), "x.wscales": (1,)}))
    with pytest.raises(WrongModel, match="quantised by Nunchaku"):
        require(card, "transformer", "x")


@pytest.mark.parametrize("fmt", ["U8", "I32"])
def test_whole_numbers_as_weights_are_refused(fmt):
    card = identify(header(dit(), fmt=lambda n: fmt if "feed_forward" in n else "F32"))
    with pytest.raises(WrongModel, match=r"weights are quantised to .*not supported"):
        require(card, "transformer", "x")


# --- ControlNet and LoRA ------------------------------------------------------------------


def controlnet(layers, channels, refined):
    shapes = {"control_all_x_embedder.2-1.weight": (3840, 4 * channels)}
    for i in range(layers):
        shapes[f"control_layers.{i}.adaLN_modulation.0.weight"] = (15360, 256)
        shapes[f"control_layers.{i}.after_proj.weight"] = (3840, 3840)
    if refined:
        shapes["control_noise_refiner.0.before_proj.weight"] = (3840, 3840)
    return shapes


@pytest.mark.parametrize(
    ("layers", "channels", "refined", "variant"),
    [(6, 16, False, "1.0"), (15, 33, False, "2.0"), (15, 33, True, "2.1"), (3, 33, True, "2.1 lite")],
)
def test_controlnets(layers, channels, refined, variant):
    card = identify(header(controlnet(layers, channels, refined)))
    assert (card.kind, card.variant) == ("controlnet", variant)
    with pytest.raises(
        WrongModel, match=r"this is a Z-Image ControlNet.* where a Z-Image transformer is wanted"
    ):
        require(card, "transformer", "x")


Q = "layers.0.attention.to_q"
LORAS = {
    "diffusers": f"transformer.{Q}.lora_A.weight transformer.{Q}.lora_B.weight",
    "PEFT": f"base_model.model.{Q}.lora_A.default.weight base_model.model.{Q}.lora_B.default.weight",
    "ai-toolkit or ComfyUI": f"diffusion_model.{Q}.lora_A.weight diffusion_model.{Q}.lora_B.weight",
    "kohya or musubi-tuner": "lora_unet_layers_0_attention_to_out_0.lora_down.weight "
    "lora_unet_layers_0_attention_to_out_0.lora_up.weight lora_unet_layers_0_attention_to_out_0.alpha",
    "bare names": "layers.0.attention.qkv.lora.down.weight layers.0.attention.qkv.lora.up.weight",
    "LyCORIS": "lycoris_layers_0_feed_forward_w1.lokr_w1 lycoris_layers_0_feed_forward_w1.lokr_w2",
}


@pytest.mark.parametrize("dialect", LORAS)
def test_lora_dialects(dialect):
    down = ("lora_A", "down")
    shapes = {
        n: (4, 64) if any(d in n for d in down) else () if "alpha" in n else (64, 4)
        for n in LORAS[dialect].split()
    }
    card = identify(header(shapes))
    assert (card.kind, card.family, card.layout, card.problem) == ("lora", "z-image", dialect, "")


A, B = f"diffusion_model.{Q}.lora_A.weight", f"diffusion_model.{Q}.lora_B.weight"


@pytest.mark.parametrize(
    ("shapes", "fault"),
    [
        ({A: (4, 64)}, "lora_B.*missing"),
        ({A: (4, 64), B: (64, 8)}, "mismatch: 4 and 8"),
        ({A: (65536, 64), B: (64, 65536)}, "rank 65536"),
        ({A: (4, 8, 8), B: (64, 4)}, "2 dimensions"),
        ({"nope.lora_A.weight": (4, 64), "nope.lora_B.weight": (64, 4)}, "none of its layers"),
    ],
)
def test_broken_loras_say_why(shapes, fault):
    assert re.search(fault, identify(header(shapes)).problem)
