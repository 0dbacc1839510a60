"""The text encoder's config from tensor shapes, GGUF metadata or config.json; see infer.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zimage_core.config import TextEncoderConfig
from zimage_core.errors import BadWeights
from zimage_core.weights.infer import (
    MAX_LAYERS,
    MAX_WIDTH,
    Shape,
    agree,
    axes,
    built,
    count_layers,
    number,
    whole,
)


def text_encoder_config(
    shapes: Mapping[str, Shape],
    metadata: Mapping[str, Any],
    layout: str,
    stated: TextEncoderConfig | None = None,
) -> tuple[TextEncoderConfig, list[str]]:
    """Text encoder config from unprefixed tensors, GGUF metadata or config.json; and cautions.

    Raises:
        BadWeights: As in transformer_config; also where llama weights come without metadata.
    """
    cautions: list[str] = []
    gguf = layout == "gguf"
    stack, q, k, norm, up = (
        ("blk", "attn_q", "attn_k", "attn_q_norm", "ffn_up")
        if gguf
        else ("layers", "self_attn.q_proj", "self_attn.k_proj", "self_attn.q_norm", "mlp.up_proj")
    )
    vocabulary, hidden = axes(shapes, "token_embd.weight" if gguf else "embed_tokens.weight", 2)
    (q_rows, _), (k_rows, _) = (
        axes(shapes, f"{stack}.0.{q}.weight", 2),
        axes(shapes, f"{stack}.0.{k}.weight", 2),
    )
    (inner, _) = axes(shapes, f"{stack}.0.{up}.weight", 2)
    qk_norm, bias = f"{stack}.0.{norm}.weight" in shapes, f"{stack}.0.{q}.bias" in shapes
    arch = metadata.get("general.architecture") if gguf else None
    if arch not in ("qwen3", "qwen2", "llama"):
        arch = stated.arch if stated else "qwen3" if qk_norm else "qwen2" if bias else "llama"
    if (arch == "qwen3") != qk_norm:
        raise BadWeights(
            f"architecture {arch!r} {'has no' if qk_norm else 'needs'} norms on q and k, the tensors differ"
        )
    _refuse_rope_scaling(shapes, metadata, str(arch))
    heads = stated.num_heads if stated else whole(metadata, f"{arch}.attention.head_count", 4096)
    if qk_norm:
        (head_dim,) = axes(shapes, f"{stack}.0.{norm}.weight", 1)
    elif stated:
        head_dim = stated.head_dim
    elif heads:
        head_dim = whole(metadata, f"{arch}.attention.key_length", MAX_WIDTH) or hidden // heads
    elif arch == "qwen2":
        head_dim = 64 if hidden < 1536 else 128
        cautions.append(f"no metadata: heads of {head_dim} channels assumed, as in Qwen2.5")
    else:
        raise BadWeights(
            "llama weights do not tell their head count; a GGUF with metadata or a config.json is needed"
        )
    if head_dim < 2 or q_rows % head_dim or k_rows % head_dim:
        raise BadWeights(f"heads of {head_dim} channels do not divide {q_rows} query and {k_rows} key rows")
    if heads and heads != q_rows // head_dim:
        raise BadWeights(
            f"the metadata says {heads} heads, the tensors hold {q_rows // head_dim} of {head_dim} channels"
        )
    default_eps, default_theta = (1e-5, 1e4) if arch == "llama" else (1e-6, 1e6)
    theta = stated.rope_theta if stated else number(metadata, f"{arch}.rope.freq_base", 1, 1e12)
    eps = (
        stated.rms_norm_eps
        if stated
        else number(metadata, f"{arch}.attention.layer_norm_rms_epsilon", 0, 0.1)
    )
    config = built(
        TextEncoderConfig,
        arch=arch,
        hidden_size=hidden,
        num_layers=_text_layers(
            shapes, stack, hidden, qk_norm, stated, whole(metadata, f"{arch}.block_count", MAX_LAYERS)
        ),
        num_heads=q_rows // head_dim,
        num_kv_heads=k_rows // head_dim,
        head_dim=head_dim,
        intermediate_size=inner,
        vocab_size=vocabulary,
        rope_theta=theta or default_theta,
        rms_norm_eps=default_eps if eps is None else eps,
        qk_norm=qk_norm,
        attention_bias=bias,
    )
    same = ("hidden_size", "num_heads", "num_kv_heads", "intermediate_size", "vocab_size", "attention_bias")
    agree(config, stated, same)
    if (config.arch, hidden) == ("qwen3", 2560):
        if config.rope_theta == 5e6:
            cautions.append(
                "rotary base 5e6: a Qwen3-4B-2507, not the original Qwen3-4B that Z-Image was trained with"
            )
        if vocabulary != 151936:
            cautions.append(f"{vocabulary} embedding rows where Qwen3-4B has 151936: a derivative of it")
    return config, cautions


def _text_layers(
    shapes: Mapping[str, Shape],
    stack: str,
    hidden: int,
    qk_norm: bool,
    stated: TextEncoderConfig | None,
    block_count: int | None,
) -> int:
    """Layers of the checkpoint; its last one may be absent from the file, as it is never run."""
    present = count_layers(shapes, stack)
    total = stated.num_layers if stated else block_count
    if total is None:
        total = present
        if qk_norm and hidden == 2560:  # Qwen3-4B, whose true depth is known; cuts after layer 34 exist
            total = 36
            if present not in (35, 36):
                raise BadWeights(f"it has {present} layers, Qwen3-4B has 36; the file was cut or altered")
    if present not in (total, total - 1):
        raise BadWeights(f"the metadata says {total} layers, the tensors hold {present}")
    return total


def _refuse_rope_scaling(shapes: Mapping[str, Shape], metadata: Mapping[str, Any], arch: str) -> None:
    scaling = metadata.get(f"{arch}.rope.scaling.type", "none")
    if "rope_freqs.weight" in shapes or scaling not in ("none", ""):
        raise BadWeights(
            "the encoder scales its rotary frequencies, which no encoder of Z-Image does; get Qwen3-4B"
        )
