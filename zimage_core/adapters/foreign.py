"""Names the model that an adapter was made for, by pieces of its tensors' names, for the refusal."""

from __future__ import annotations

from collections.abc import Iterable

from zimage_core.adapters.dialects import flat

MARKS = (
    ("Qwen-Image", ("transformer_blocks_", "_img_m")),
    ("FLUX.2", ("double_stream_modulation",)),
    ("FLUX", ("single_transformer_blocks_",)),
    ("FLUX", ("double_blocks_",)),
    ("FLUX", ("single_blocks_",)),
    ("Stable Diffusion 3", ("joint_blocks_",)),
    ("Stable Diffusion XL", ("lora_te2_",)),
    ("Stable Diffusion (a U-Net)", ("down_blocks_",)),
    ("Stable Diffusion (a U-Net)", ("up_blocks_",)),
    ("Stable Diffusion (a U-Net)", ("input_blocks_",)),
    ("Stable Diffusion (a U-Net)", ("output_blocks_",)),
    ("Wan", ("blocks_", "_cross_attn_")),
    (
        "a model of diffusers' transformer_blocks (FLUX, Qwen-Image, Stable Diffusion 3)",
        ("transformer_blocks_",),
    ),
    ("CLIP", ("text_model_encoder_layers_",)),
)
"""Model -> pieces of flat names, all of which one name has. The more specific come first."""


def named(tensors: Iterable[str]) -> str:
    """The model that the first telling name belongs to, as a noun phrase; "" if none tells."""
    names = [f"_{flat(name)}_" for name in tensors]
    for model, pieces in MARKS:
        if any(all(piece in name for piece in pieces) for name in names):
            return model
    return ""
