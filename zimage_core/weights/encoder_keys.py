"""Refuses a GGUF text encoder whose keys ask for other arithmetic than that of Z-Image's encoders.

The keys are llama.cpp's; one that is absent asks for nothing. Source: gguf-py/gguf/constants.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from zimage_core.config import TransformerConfig
from zimage_core.errors import BadWeights, printable

_FACTORS = ("rope.scaling.factor", "rope.scale_linear")


def refuse_other_arithmetic(metadata: Mapping[str, Any], arch: str, head_dim: int, kv_heads: int) -> None:
    """Refuse windows, scaled or partial rotations, soft caps, experts and sizes that the tensors deny.

    Args:
        metadata: Keys of the file.
        arch: Its architecture, which the keys begin with.
        head_dim: Channels of a head, as the tensors say.
        kv_heads: Key and value heads, as the tensors say.

    Raises:
        BadWeights: The message names the key and its value.
    """
    kind = metadata.get(f"{arch}.rope.scaling.type")
    factor = next((_number(metadata[f"{arch}.{key}"]) for key in _FACTORS if f"{arch}.{key}" in metadata), 1)
    # without a type, llama.cpp takes a factor for a linear one
    if kind not in (None, "none", "") or (kind is None and factor not in (0, 1)):
        raise BadWeights(
            "the encoder scales its rotary frequencies "
            f"({arch}.rope.scaling is {printable(kind, 40)!r} by {printable(factor, 40)}), "
            "which no encoder of Z-Image does; get Qwen3-4B"
        )
    window, longest = f"{arch}.attention.sliding_window", TransformerConfig().max_caption
    if not _is_in(metadata.get(window, 0), 0) and not _is_at_least(metadata[window], longest):
        raise BadWeights(
            f"{window} is {printable(metadata[window], 40)}: attention over a part of the prompt is not "
            f"supported, unless it is {longest} tokens or more; get Qwen3-4B"
        )
    wanted: dict[str, tuple[float, ...]] = {
        "attention.head_count_kv": (kv_heads,),
        "attention.key_length": (head_dim,),
        "attention.value_length": (head_dim,),
        "rope.dimension_count": (head_dim,),
        "attention.causal": (1,),
        "attention.scale": (0, head_dim**-0.5),
        "attention.clamp_kqv": (0,),
        "attention.max_alibi_bias": (0,),
        "attn_logit_softcapping": (0,),
        "embedding_scale": (0, 1),
        "residual_scale": (0, 1),
        "use_parallel_residual": (0,),
        "expert_count": (0,),
    }
    for name, allowed in wanted.items():
        key = f"{arch}.{name}"
        if key in metadata and not _is_in(metadata[key], *allowed):
            raise BadWeights(
                f"metadata {key!r} is {printable(metadata[key], 60)}, wanted {allowed[-1]:g}, the only value "
                "that these tensors and this library fit; get Qwen3-4B"
            )


def _number(value: object) -> object:
    """The number that a short text stands for, since metadata of safetensors is text; else the value."""
    if isinstance(value, str) and len(value) <= 40:
        with suppress(ValueError):
            return float({"true": "1", "false": "0"}.get(value.lower(), value))
    return value


def _is_in(value: object, *allowed: float) -> bool:
    """Whether a value is one of the numbers, to float32's precision; true is 1."""
    number = _number(value)
    return isinstance(number, (int, float)) and any(math.isclose(number, n, rel_tol=1e-5) for n in allowed)


def _is_at_least(value: object, least: int) -> bool:
    number = _number(value)
    return isinstance(number, (int, float)) and number >= least
