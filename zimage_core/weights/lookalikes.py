"""Marks by which models that are not Z-Image are recognised, so that a refusal can say what the file is.

Each row is data: a sound model of the named family has every tensor name of `marks` somewhere (as a piece
of a name), or a GGUF of it states one of `architectures`. Rows are tried in order, the more specific first.
Sources: the published checkpoints' tensor names; ComfyUI's model_detection; llama.cpp's constants.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lookalike:
    """One family of models.

    Args:
        family: Short name.
        title: What the file is, for a sentence "this is {title}".
        marks: Pieces of tensor names; all must occur. A piece that starts with a newline matches only
            at the start of a name.
        architectures: Values of a GGUF's general.architecture.
        role: "transformer", "text_encoder" or "vae" where it plays that part in another system; else "other".
    """

    family: str
    title: str
    marks: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    role: str = "other"


_DIT, _TEXT, _VAE = "transformer", "text_encoder", "vae"

LOOKALIKES = (
    # Lumina-Image-2 shares Z-Image's block names and its GGUF architecture "lumina2".
    Lookalike("newbie", "a NewBie-Image transformer", ("cap_embedder.", "clip_text_pooled_proj."), role=_DIT),
    Lookalike(
        "lumina2", "a Lumina-Image-2 transformer", ("time_caption_embed.", "context_refiner."), role=_DIT
    ),
    Lookalike(
        "lumina2",
        "a Lumina-Image-2 transformer",
        ("layers.0.adaLN_modulation.1.", "cap_embedder."),
        role=_DIT,
    ),
    Lookalike("flux2", "a FLUX.2 transformer", ("double_stream_modulation_img",), ("flux2",), _DIT),
    Lookalike("chroma", "a Chroma transformer", ("distilled_guidance_layer.",), ("chroma",), _DIT),
    Lookalike(
        "flux", "a FLUX.1 transformer", ("double_blocks.0.img_attn.", "single_blocks."), ("flux",), _DIT
    ),
    Lookalike(
        "flux",
        "a FLUX.1 transformer",
        ("single_transformer_blocks.0.attn.", "transformer_blocks.0."),
        (),
        _DIT,
    ),
    Lookalike(
        "hunyuan-video", "a HunyuanVideo transformer", ("double_blocks.0.img_attn_q",), ("hyvid",), _DIT
    ),
    Lookalike(
        "qwen-image", "a Qwen-Image transformer", ("transformer_blocks.0.img_mlp.",), ("qwen_image",), _DIT
    ),
    Lookalike("sd3", "a Stable Diffusion 3 transformer", ("joint_blocks.0.x_block.",), ("sd3",), _DIT),
    Lookalike(
        "sd3",
        "a Stable Diffusion 3 transformer",
        ("transformer_blocks.0.attn.add_q_proj", "pos_embed."),
        (),
        _DIT,
    ),
    Lookalike(
        "wan", "a Wan video transformer", ("blocks.0.cross_attn.", "text_embedding.0."), ("wan",), _DIT
    ),
    Lookalike(
        "ltxv", "an LTX-Video transformer", ("patchify_proj.", "transformer_blocks.0."), ("ltxv",), _DIT
    ),
    Lookalike("aura", "an AuraFlow transformer", ("double_layers.0.attn.",), ("aura",), _DIT),
    Lookalike("hidream", "a HiDream transformer", ("double_stream_blocks.0.block.",), ("hidream",), _DIT),
    Lookalike("cosmos", "a Cosmos transformer", ("x_embedder.proj.1.", "blocks.0."), ("cosmos",), _DIT),
    Lookalike(
        "pixart", "a PixArt or Sana transformer", ("caption_projection.", "transformer_blocks.0."), (), _DIT
    ),
    Lookalike(
        "sdxl", "a Stable Diffusion XL checkpoint", ("input_blocks.0.0.", "label_emb."), ("sdxl",), _DIT
    ),
    Lookalike(
        "sd1", "a Stable Diffusion 1 or 2 checkpoint", ("input_blocks.0.0.", "output_blocks."), ("sd1",), _DIT
    ),
    Lookalike(
        "sdxl",
        "a Stable Diffusion UNet",
        ("conv_in.weight", "time_embedding.linear_1.", "up_blocks.0."),
        (),
        _DIT,
    ),
    # Text and vision models.
    Lookalike(
        "mmproj",
        "an mmproj (vision projector of a multimodal model)",
        ("v.blk.0.",),
        ("clip", "mmproj"),
        _TEXT,
    ),
    Lookalike("vl", "a vision-language model (Qwen-VL)", ("visual.blocks.0.",), (), _TEXT),
    Lookalike("vl", "a vision-language model (Qwen-VL)", (), ("qwen3vl", "qwen2vl", "qwen3vlmoe"), _TEXT),
    Lookalike("vl", "a vision-language model", ("vision_tower.", "language_model."), (), _TEXT),
    Lookalike("vl", "a vision-language model", ("vision_model.", "language_model."), (), _TEXT),
    Lookalike(
        "siglip",
        "a SigLIP vision encoder",
        ("vision_model.encoder.layers.0.", "vision_model.head."),
        (),
        _TEXT,
    ),
    Lookalike(
        "clip-vision",
        "a CLIP vision encoder",
        ("vision_model.encoder.layers.0.", "visual_projection"),
        (),
        _TEXT,
    ),
    Lookalike("clip", "a CLIP text encoder", ("text_model.encoder.layers.0.",), (), _TEXT),
    Lookalike("clip", "a CLIP text encoder", ("transformer.resblocks.0.attn.",), (), _TEXT),
    Lookalike(
        "t5", "a T5 text encoder", ("encoder.block.0.layer.0.SelfAttention.",), ("t5", "t5encoder"), _TEXT
    ),
    Lookalike("t5", "a T5 text encoder", ("enc.blk.0.attn_q.",), (), _TEXT),
    Lookalike(
        "moe", "a mixture-of-experts language model", (".mlp.experts.0.",), ("qwen3moe", "qwen2moe"), _TEXT
    ),
    Lookalike("moe", "a mixture-of-experts language model", ("blk.0.ffn_gate_exps.",), (), _TEXT),
    Lookalike(
        "gemma",
        "a Gemma language model",
        (".pre_feedforward_layernorm.",),
        ("gemma", "gemma2", "gemma3"),
        _TEXT,
    ),
    Lookalike("gemma", "a Gemma language model", ("blk.0.post_ffw_norm.",), ("gemma3n", "gemma4"), _TEXT),
    Lookalike(
        "phi", "a Phi language model", ("self_attn.qkv_proj.", "mlp.gate_up_proj."), ("phi2", "phi3"), _TEXT
    ),
    Lookalike(
        "bert", "a BERT-type encoder", ("encoder.layer.0.attention.self.",), ("bert", "nomic-bert"), _TEXT
    ),
    Lookalike("gpt2", "a GPT-2-type language model", (".attn.c_attn.", ".mlp.c_fc."), ("gpt2",), _TEXT),
    # Autoencoders.
    Lookalike("taesd", "a tiny autoencoder (TAESD, TAEF1)", ("taesd_decoder.",), (), _VAE),
    Lookalike(
        "taesd",
        "a tiny autoencoder (TAESD, TAEF1)",
        ("decoder.layers.1.", "decoder.layers.3.conv.0."),
        (),
        _VAE,
    ),
    Lookalike("taesd", "a tiny autoencoder (TAESD, TAEF1)", ("\n1.weight", "\n3.conv.0.weight"), (), _VAE),
    Lookalike("wan-vae", "a Wan or Qwen-Image video VAE", ("decoder.middle.0.residual.",), (), _VAE),
    Lookalike(
        "wan-vae", "a Wan or Qwen-Image video VAE", ("decoder.mid_block.resnets.0.norm1.gamma",), (), _VAE
    ),
    Lookalike("dc-ae", "a DC-AE autoencoder (Sana)", ("decoder.up_blocks.0.0.conv1.",), (), _VAE),
    Lookalike("upscaler", "an image upscaler (ESRGAN)", ("model.1.sub.0.RDB1.",), (), "other"),
    Lookalike("upscaler", "an image upscaler (ESRGAN)", ("body.0.rdb1.conv1.",), (), "other"),
    Lookalike("ip-adapter", "an IP-Adapter", ("ip_adapter.", "image_proj."), (), "other"),
)


def recognise(joined_names: str, architecture: str | None) -> Lookalike | None:
    """The first family whose marks all occur in the newline-joined names, or that the GGUF states."""
    for row in LOOKALIKES:
        if row.marks and all(mark in joined_names for mark in row.marks):
            return row
    return next(
        (row for row in LOOKALIKES if architecture is not None and architecture in row.architectures), None
    )
