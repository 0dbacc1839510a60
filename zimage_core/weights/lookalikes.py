"""Recognises models that are not Z-Image, so that the refusal can say what the file is.

A file belongs to a family if its tensor names contain every one of the row's `marks`, or if it is a GGUF that
states one of `architectures`. Rows are tried in order, the more specific first.
Sources: the published checkpoints' tensor names; ComfyUI's model_detection; llama.cpp's constants.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lookalike:
    """One family of models.

    Args:
        family: Short name.
        title: Noun phrase that completes the sentence "this is {title}".
        marks: Pieces of tensor names; all must occur. A piece that starts with a newline matches only
            at the start of a name.
        architectures: Values of a GGUF's general.architecture.
    """

    family: str
    title: str
    marks: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()


LOOKALIKES = (
    # Lumina-Image-2 shares Z-Image's block names and its GGUF architecture "lumina2".
    Lookalike("newbie", "a NewBie-Image transformer", ("cap_embedder.", "clip_text_pooled_proj.")),
    Lookalike("lumina2", "a Lumina-Image-2 transformer", ("time_caption_embed.", "context_refiner.")),
    Lookalike("lumina2", "a Lumina-Image-2 transformer", ("layers.0.adaLN_modulation.1.", "cap_embedder.")),
    Lookalike("flux2", "a FLUX.2 transformer", ("double_stream_modulation_img",), ("flux2",)),
    Lookalike("chroma", "a Chroma transformer", ("distilled_guidance_layer.",), ("chroma",)),
    Lookalike("flux", "a FLUX.1 transformer", ("double_blocks.0.img_attn.", "single_blocks."), ("flux",)),
    Lookalike("flux", "a FLUX.1 transformer", ("single_transformer_blocks.0.attn.", "transformer_blocks.0.")),
    Lookalike("hunyuan-video", "a HunyuanVideo transformer", ("double_blocks.0.img_attn_q",), ("hyvid",)),
    Lookalike("qwen-image", "a Qwen-Image transformer", ("transformer_blocks.0.img_mlp.",), ("qwen_image",)),
    Lookalike("sd3", "a Stable Diffusion 3 transformer", ("joint_blocks.0.x_block.",), ("sd3",)),
    Lookalike(
        "sd3", "a Stable Diffusion 3 transformer", ("transformer_blocks.0.attn.add_q_proj", "pos_embed.")
    ),
    Lookalike("wan", "a Wan video transformer", ("blocks.0.cross_attn.", "text_embedding.0."), ("wan",)),
    Lookalike("ltxv", "an LTX-Video transformer", ("patchify_proj.", "transformer_blocks.0."), ("ltxv",)),
    Lookalike("aura", "an AuraFlow transformer", ("double_layers.0.attn.",), ("aura",)),
    Lookalike("hidream", "a HiDream transformer", ("double_stream_blocks.0.block.",), ("hidream",)),
    Lookalike("cosmos", "a Cosmos transformer", ("x_embedder.proj.1.", "blocks.0."), ("cosmos",)),
    Lookalike("pixart", "a PixArt or Sana transformer", ("caption_projection.", "transformer_blocks.0.")),
    Lookalike("sdxl", "a Stable Diffusion XL checkpoint", ("input_blocks.0.0.", "label_emb."), ("sdxl",)),
    Lookalike(
        "sd1", "a Stable Diffusion 1 or 2 checkpoint", ("input_blocks.0.0.", "output_blocks."), ("sd1",)
    ),
    Lookalike(
        "sdxl", "a Stable Diffusion UNet", ("conv_in.weight", "time_embedding.linear_1.", "up_blocks.0.")
    ),
    # Text and vision models.
    Lookalike(
        "mmproj", "an mmproj (vision projector of a multimodal model)", ("v.blk.0.",), ("clip", "mmproj")
    ),
    Lookalike("vl", "a vision-language model (Qwen-VL)", ("visual.blocks.0.",)),
    Lookalike("vl", "a vision-language model (Qwen-VL)", (), ("qwen3vl", "qwen2vl", "qwen3vlmoe")),
    Lookalike("vl", "a vision-language model", ("vision_tower.", "language_model.")),
    Lookalike("vl", "a vision-language model", ("vision_model.", "language_model.")),
    # a whole SigLIP2 with NaFlex is known by its tower before
    Lookalike("siglip1", "a SigLIP of images of one size", ("vision_model.head.", "logit_bias")),
    Lookalike(
        "clip-vision", "a CLIP vision encoder", ("vision_model.encoder.layers.0.", "visual_projection")
    ),
    Lookalike("clip", "a CLIP text encoder", ("text_model.encoder.layers.0.",)),
    Lookalike("clip", "a CLIP text encoder", ("transformer.resblocks.0.attn.",)),
    Lookalike("t5", "a T5 text encoder", ("encoder.block.0.layer.0.SelfAttention.",), ("t5", "t5encoder")),
    Lookalike("t5", "a T5 text encoder", ("enc.blk.0.attn_q.",)),
    Lookalike("moe", "a mixture-of-experts language model", (".mlp.experts.0.",), ("qwen3moe", "qwen2moe")),
    Lookalike("moe", "a mixture-of-experts language model", ("blk.0.ffn_gate_exps.",)),
    Lookalike(
        "gemma", "a Gemma language model", (".pre_feedforward_layernorm.",), ("gemma", "gemma2", "gemma3")
    ),
    Lookalike("gemma", "a Gemma language model", ("blk.0.post_ffw_norm.",), ("gemma3n", "gemma4")),
    Lookalike("phi", "a Phi language model", ("self_attn.qkv_proj.", "mlp.gate_up_proj."), ("phi2", "phi3")),
    Lookalike("bert", "a BERT-type encoder", ("encoder.layer.0.attention.self.",), ("bert", "nomic-bert")),
    Lookalike("gpt2", "a GPT-2-type language model", (".attn.c_attn.", ".mlp.c_fc."), ("gpt2",)),
    # Autoencoders and others.
    Lookalike("taesd", "a tiny autoencoder (TAESD, TAEF1)", ("taesd_decoder.",)),
    Lookalike(
        "taesd", "a tiny autoencoder (TAESD, TAEF1)", ("decoder.layers.1.", "decoder.layers.3.conv.0.")
    ),
    Lookalike("taesd", "a tiny autoencoder (TAESD, TAEF1)", ("\n1.weight", "\n3.conv.0.weight")),
    Lookalike("wan-vae", "a Wan or Qwen-Image video VAE", ("decoder.middle.0.residual.",)),
    Lookalike("wan-vae", "a Wan or Qwen-Image video VAE", ("decoder.mid_block.resnets.0.norm1.gamma",)),
    Lookalike("dc-ae", "a DC-AE autoencoder (Sana)", ("decoder.up_blocks.0.0.conv1.",)),
    Lookalike("upscaler", "an image upscaler (ESRGAN)", ("model.1.sub.0.RDB1.",)),
    Lookalike("upscaler", "an image upscaler (ESRGAN)", ("body.0.rdb1.conv1.",)),
    Lookalike("ip-adapter", "an IP-Adapter", ("ip_adapter.", "image_proj.")),
)


def recognise(joined_names: str, architecture: str | None) -> Lookalike | None:
    """The first family whose marks all occur in the newline-joined names, or whose architecture is stated."""
    for row in LOOKALIKES:
        if row.marks and all(mark in joined_names for mark in row.marks):
            return row
    return next(
        (row for row in LOOKALIKES if architecture is not None and architecture in row.architectures), None
    )
