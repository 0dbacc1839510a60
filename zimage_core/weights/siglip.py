"""Tells a SigLIP2 (NaFlex) vision tower from its tensors: layout, sizes, and towers of SigLIP 1.

Sources: transformers' Siglip2VisionModel; llama.cpp's mmproj files (gguf-py, architecture "clip").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from zimage_core.config import VisionConfig
from zimage_core.errors import BadWeights
from zimage_core.weights import infer

ANCHORS = {
    "hf": (
        "embeddings.patch_embedding.weight",
        "embeddings.position_embedding.weight",
        "encoder.layers.0.layer_norm1.weight",
        "encoder.layers.0.self_attn.out_proj.weight",
        "encoder.layers.0.mlp.fc1.weight",
        "post_layernorm.weight",
    ),
    "mmproj": (
        "v.patch_embd.weight",
        "v.position_embd.weight",
        "v.blk.0.ln1.weight",
        "v.blk.0.attn_out.weight",
        "v.blk.0.ffn_up.weight",
        "v.post_ln.weight",
    ),
}
ENOUGH = 4
"""Anchors from which on a file counts as the tower, if none of `_FOREIGN` is in it."""

UNUSED = ("head.", "text_model.", "logit_scale", "logit_bias", "mm.", "resampler.")
"""What else such files hold: the pooling head, the text part, the projector to a language model."""

_FOREIGN = (
    "embeddings.class_embedding", "pre_layrnorm.weight", "v.class_embd", "v.pre_ln.weight",
    "v.blk.0.attn_q_norm.weight", "v.blk.0.ls1.weight", "v.blk.0.ffn_gate.weight",
    "v.patch_embd.weight.1", "embeddings.token_embedding.weight",
)  # fmt: skip
"""Tensors of other encoders, such as CLIP (for images and for text), InternViT,
Pixtral and Qwen-VL."""

FIXED_PATCH = 14
FIXED_GRIDS = {(16, 14), (16, 24), (16, 32), (32, 8)}
"""Patch size, or patch size and side of the position table, of towers for images of one size: SigLIP 1, such
as Gemma 3's of 14 x 14 pixels and 64 x 64 positions, and SigLIP2 without NaFlex. At 16 pixels and a table of
16 x 16 the tensors of a GGUF cannot tell them apart."""

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 16}
"""Width -> attention heads of the released towers."""
DEPTHS = {768: 12, 1024: 24, 1152: 27, 1536: 40}

_OTHER_ACTIVATIONS = ("clip.use_silu", "clip.vision.use_silu", "clip.use_gelu_erf")


@dataclass(frozen=True)
class Found:
    """A tower in a file.

    Args:
        layout: One of `names.VISION_LAYOUTS`.
        fixed: Why it is a tower for images of one size; "" for NaFlex.
    """

    layout: str
    fixed: str = ""


def find(inside: Mapping[str, infer.Shape], layout: str) -> Found | None:
    """What the tensors show; None for another encoder.

    Args:
        inside: Tensor name without prefix -> shape.
        layout: "hf" or "mmproj".
    """
    if any(name in inside for name in _FOREIGN):
        return None
    hf = layout == "hf"
    patch = inside.get("embeddings.patch_embedding.weight" if hf else "v.patch_embd.weight", ())
    table = inside.get("embeddings.position_embedding.weight" if hf else "v.position_embd.weight", ())
    rows = infer.squeezed(table)[:1]
    side = isqrt(rows[0]) if rows else 0
    conv = len(patch) == 4
    where = f"a table of {rows[0] if rows else 'no'} positions"
    if conv and (hf or patch[-1] == FIXED_PATCH or (patch[-1], side) in FIXED_GRIDS):
        return Found(layout, f"a convolution of {patch[-1]} x {patch[-1]} and {where}")
    if hf:
        return Found(layout)
    up, down = inside.get("v.blk.0.ffn_up.weight", ()), inside.get("v.blk.0.ffn_down.weight", ())
    # some writers call the first layer of the MLP "down"; its rows are the wider ones
    swapped = len(up) == len(down) == 2 and up[0] < up[1]
    return Found(" ".join(["mmproj", *["conv"] * conv, *["swapped"] * swapped]))


def vision_config(
    shapes: Mapping[str, infer.Shape],
    metadata: Mapping[str, Any],
    layout: str,
    stated: VisionConfig | None = None,
) -> tuple[VisionConfig, list[str]]:
    """Sizes of a vision tower; arguments, result and errors are those of `infer.transformer_config`.

    In a GGUF, llama.cpp's keys are read, such as `clip.vision.attention.head_count`.
    """
    cautions: list[str] = []
    hf = layout == "hf"
    patch, positions, stack, fc1 = (
        (
            "embeddings.patch_embedding.weight",
            "embeddings.position_embedding.weight",
            "encoder.layers",
            "mlp.fc1",
        )
        if hf
        else ("v.patch_embd.weight", "v.position_embd.weight", "v.blk", "ffn_up")
    )
    if "swapped" in layout:
        fc1 = "ffn_down"
    if "conv" in layout:
        hidden, channels, size, _ = infer.axes(shapes, patch, 4)
    else:
        hidden, columns = infer.axes(shapes, patch, 2)
        channels = stated.num_channels if stated else 3
        size = isqrt(columns // channels)
        if size * size * channels != columns:
            raise BadWeights(f"{patch!r} reads {columns} numbers a patch, wanted {channels} times a square")
    (num_patches, _) = infer.axes(shapes, positions, 2)
    (inner, _) = infer.axes(shapes, f"{stack}.0.{fc1}.weight", 2)
    for key in _OTHER_ACTIVATIONS:
        if metadata.get(key) is True:
            raise BadWeights(f"metadata {key!r} asks for another activation than SigLIP2's gelu")
    layers = infer.count_layers(shapes, stack)
    heads = stated.num_heads if stated else infer.read_int(metadata, "clip.vision.attention.head_count", 4096)
    if heads is None:
        heads = HEADS.get(hidden)
        if heads is None:
            raise BadWeights(
                f"its number of attention heads cannot be told from the tensors (width {hidden}); put "
                "transformers' config.json beside the file, or use a GGUF that states it"
            )
        if hidden not in DEPTHS or DEPTHS[hidden] != layers:
            cautions.append(f"{heads} attention heads assumed from the width {hidden}")
    blocks = infer.read_int(metadata, "clip.vision.block_count", infer.MAX_LAYERS)
    if blocks is not None and blocks != layers:
        raise BadWeights(f"the metadata says {blocks} layers, the tensors hold {layers}")
    found = infer.read_float(metadata, "clip.vision.attention.layer_norm_epsilon", 0, 0.1)
    eps = VisionConfig().layer_norm_eps if found is None else found
    config = infer.built(
        VisionConfig,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=inner,
        patch_size=size,
        num_patches=num_patches,
        num_channels=channels,
        layer_norm_eps=stated.layer_norm_eps if stated else eps,
    )
    same = ("hidden_size", "num_layers", "intermediate_size", "patch_size", "num_patches", "num_channels")
    infer.agree(config, stated, same)
    if stated is None and hidden in DEPTHS and layers != DEPTHS[hidden]:
        cautions.append(f"{layers} layers where SigLIP2 of width {hidden} has {DEPTHS[hidden]}: a cut tower")
    return config, cautions
