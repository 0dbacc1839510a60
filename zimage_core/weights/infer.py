"""Infers the sizes of the networks from tensor shapes and metadata; a single file has no config.

Shapes decide. Metadata, a config.json beside the file, and the defaults of the released models supply only
what shapes do not determine: rotary axes, epsilons, head counts without head norms. If two sources
disagree, the file is refused. Every number is checked against a limit before anything is built from it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, TypeVar

from zimage_core.config import (
    HEAD_AXES,
    TEXT_ARCHITECTURES,
    AutoencoderConfig,
    TextEncoderConfig,
    TransformerConfig,
    VisionConfig,
)
from zimage_core.errors import BadArgument, BadWeights, printable
from zimage_core.weights.encoder_keys import refuse_other_arithmetic
from zimage_core.weights.names import TIME_CHANNELS

MAX_LAYERS = 512
MAX_WIDTH = 1 << 17
MAX_VOCABULARY = 1 << 22

Z_IMAGE, QWEN3_4B, FLUX_VAE = TransformerConfig(), TextEncoderConfig(), AutoencoderConfig()

Shape = tuple[int, ...]
Config = TransformerConfig | TextEncoderConfig | AutoencoderConfig | VisionConfig
ConfigT = TypeVar("ConfigT", TransformerConfig, TextEncoderConfig, AutoencoderConfig, VisionConfig)


def count_layers(names: Iterable[str], stack: str) -> int:
    """Highest layer number + 1 among names `{stack}.{number}.{rest}`; 0 without any.

    Raises:
        BadWeights: A layer number is larger than that of any real model.
    """
    pattern = re.compile(re.escape(stack) + r"\.(\d+)\.")
    highest = -1
    for match in filter(None, map(pattern.match, names)):
        if len(match[1]) > 4 or int(match[1]) >= MAX_LAYERS:
            shown = printable(match[0].rstrip("."), 60)
            raise BadWeights(f"the file names a layer {shown!r}; no model has more than {MAX_LAYERS} layers")
        highest = max(highest, int(match[1]))
    return highest + 1


def squeezed(shape: Shape) -> Shape:
    """The shape without axes of length 1: (1, D) = (D,), (C, C, 1, 1) = (C, C)."""
    return tuple(n for n in shape if n != 1)


def axes(shapes: Mapping[str, Shape], name: str, rank: int) -> Shape:
    """Shape of a tensor that must have `rank` axes; if the file has more, axes of length 1 are dropped.

    Raises:
        BadWeights: The tensor is missing, or has another rank or an axis of an impossible length.
    """
    shape = shapes.get(name)
    if shape is None:
        raise BadWeights(
            f"the tensor {name!r} is missing, so the size of the model cannot be told; "
            "a file without it was cut, is one shard of several, or is packed in a way that is not known here"
        )
    if len(shape) != rank:
        shape = squeezed(shape)
    if len(shape) != rank or not all(0 < n <= MAX_VOCABULARY for n in shape):
        raise BadWeights(f"the tensor {name!r} has shape {shape}, wanted {rank} axes of sane length")
    return shape


def values(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metadata with short texts of numbers, truth values and arrays, as safetensors has them, read."""
    return {key: _value(item) if isinstance(item, str) else item for key, item in metadata.items()}


def _value(text: str) -> Any:
    if len(text) <= 40 and (text[:1] in "-[0123456789" or text in ("true", "false")):
        with suppress(ValueError):
            return json.loads(text, parse_constant=str)
    return text


def read_float(metadata: Mapping[str, Any], key: str, low: float, high: float) -> float | None:
    """A finite number of the metadata, from `low` to `high`; None where the key is absent."""
    if key not in metadata:
        return None
    value = metadata[key]
    if isinstance(value, str) and len(value) <= 40:  # safetensors metadata holds nothing but text
        try:
            value = float(value)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadWeights(f"metadata {key!r} is {printable(metadata[key], 60)!r}, wanted a number")
    if not low <= value <= high:
        raise BadWeights(f"metadata {key!r} is {value:g}, wanted {low:g} to {high:g}")
    # GGUF stores float32: 1e-6 comes back as 9.99999997e-07; rounding to 7 digits restores it
    return float(f"{value:.7g}") if isinstance(value, float) else float(value)


def read_int(metadata: Mapping[str, Any], key: str, high: int) -> int | None:
    """A whole number of the metadata, from 1 to `high`; None where the key is absent."""
    value = read_float(metadata, key, 1, high)
    if value is not None and value != int(value):
        raise BadWeights(f"metadata {key!r} is {value}, wanted a whole number")
    return None if value is None else int(value)


def parse_config(parse: Callable[[Mapping[str, Any]], ConfigT], data: Mapping[str, Any]) -> ConfigT:
    """Parse a config.json of unknown origin; every fault in it becomes BadWeights."""
    try:
        return parse(data)
    except BadArgument as error:
        raise BadWeights(f"config.json does not fit: {error}") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise BadWeights(f"config.json holds a value of the wrong kind ({printable(error, 80)})") from error


def agree(inferred: ConfigT, stated: ConfigT | None, names: tuple[str, ...]) -> None:
    """Refuse a config.json that disagrees with the tensors in one of the fields `names`."""
    if stated is None:
        return
    mine, theirs = asdict(inferred), asdict(stated)
    for name in names:
        if mine[name] != theirs[name]:
            raise BadWeights(
                f"config.json says {name} = {theirs[name]}, the tensors say {mine[name]}; "
                "the config belongs to another checkpoint"
            )


def built(make: Callable[..., ConfigT], **fields: Any) -> ConfigT:
    """A config with these fields; BadWeights if they contradict each other."""
    try:
        return make(**fields)
    except BadArgument as error:
        raise BadWeights(f"the tensor shapes do not belong together: {error}") from error


# --- S3-DiT --------------------------------------------------------------------------


def transformer_config(
    shapes: Mapping[str, Shape],
    metadata: Mapping[str, Any],
    layout: str,
    stated: TransformerConfig | None = None,
) -> tuple[TransformerConfig, list[str]]:
    """Sizes of an S3-DiT.

    Args:
        shapes: Tensor name without prefix -> shape.
        metadata: Its keys `zimage.axes_dims`, `zimage.axes_lens` (arrays of 3), `zimage.rope_theta`,
            `zimage.norm_eps` and `zimage.t_scale` are read.
        layout: One of `names.TRANSFORMER_LAYOUTS`.
        stated: Config from a config.json, which must agree with the shapes.

    Returns:
        The config, and cautions: sentences about assumptions and oddities.

    Raises:
        BadWeights: A tensor that decides the size is missing, or sizes contradict each other.
    """
    cautions: list[str] = []
    patch, embedder = 2, "x_embedder.weight"
    if layout == "split":
        found = [
            m for m in (re.fullmatch(r"all_x_embedder\.([1-9])-1\.weight", name) for name in shapes) if m
        ]
        if len(found) != 1:
            raise BadWeights(
                f"{len(found)} tensors 'all_x_embedder.P-1.weight' found, wanted exactly one patch size"
            )
        patch, embedder = int(found[0][1]), found[0][0]
    dim, patch_dim = axes(shapes, embedder, 2)
    if patch_dim % patch**2:
        raise BadWeights(f"{embedder!r} reads {patch_dim} numbers a patch, wanted a multiple of {patch**2}")
    (cap_width,) = axes(shapes, "cap_embedder.0.weight", 1)
    t_mid, t_in = axes(shapes, "t_embedder.mlp.0.weight", 2)
    if t_in != TIME_CHANNELS:
        raise BadWeights(f"'t_embedder.mlp.0.weight' reads {t_in} channels, every S3-DiT has {TIME_CHANNELS}")
    (hidden, _) = axes(shapes, "layers.0.feed_forward.w1.weight", 2)
    norm = "layers.0.attention.norm_q.weight" if layout == "split" else "layers.0.attention.q_norm.weight"
    (head_dim,) = axes(shapes, norm, 1)
    if head_dim > dim or dim % head_dim:
        raise BadWeights(f"heads of {head_dim} channels do not divide the width {dim}")
    siglip = axes(shapes, "siglip_embedder.0.weight", 1)[0] if "siglip_embedder.0.weight" in shapes else None
    config = built(
        TransformerConfig,
        dim=dim,
        n_layers=count_layers(shapes, "layers"),
        n_refiner_layers=count_layers(shapes, "noise_refiner"),
        n_heads=dim // head_dim,
        cap_feat_dim=cap_width,
        hidden_dim=hidden,
        in_channels=patch_dim // patch**2,
        patch_size=patch,
        axes_dims=_rotary_axes(head_dim, metadata, stated, cautions),
        axes_lens=stated.axes_lens if stated else _triple(metadata, "zimage.axes_lens") or Z_IMAGE.axes_lens,
        t_mid_dim=t_mid,
        siglip_feat_dim=siglip,
        norm_eps=stated.norm_eps
        if stated
        else read_float(metadata, "zimage.norm_eps", 0, 0.1) or Z_IMAGE.norm_eps,
        rope_theta=stated.rope_theta
        if stated
        else read_float(metadata, "zimage.rope_theta", 1, 1e9) or Z_IMAGE.rope_theta,
        t_scale=stated.t_scale
        if stated
        else read_float(metadata, "zimage.t_scale", 1e-3, 1e6) or Z_IMAGE.t_scale,
    )
    same = ("dim", "n_layers", "n_refiner_layers", "n_heads", "cap_feat_dim", "in_channels", "patch_size")
    agree(config, stated, same)
    if stated is None and dim == Z_IMAGE.dim and config.n_layers != Z_IMAGE.n_layers:
        layers = Z_IMAGE.n_layers
        cautions.append(f"{config.n_layers} layers where Z-Image has {layers}: a cut or altered model")
    return config, cautions


def _triple(metadata: Mapping[str, Any], key: str) -> tuple[int, int, int] | None:
    if key not in metadata:
        return None
    value = metadata[key]
    if not isinstance(value, (str, bytes)) and hasattr(value, "__len__") and len(value) == 3:
        items = [value[i] for i in range(3)]
        if all(isinstance(n, int) and not isinstance(n, bool) and 0 < n <= MAX_WIDTH for n in items):
            return items[0], items[1], items[2]
    raise BadWeights(f"metadata {key!r} is not an array of three whole numbers")


def _rotary_axes(
    head_dim: int, metadata: Mapping[str, Any], stated: TransformerConfig | None, cautions: list[str]
) -> tuple[int, int, int]:
    """Rotary channels for (t, h, w): as stated, else those of Z-Image, else in its proportions 2:3:3."""
    found = stated.axes_dims if stated else _triple(metadata, "zimage.axes_dims")
    if found is not None:
        if sum(found) != head_dim:
            raise BadWeights(
                f"the rotary axes {found} add up to {sum(found)}, heads have {head_dim} channels"
            )
        return found
    if head_dim == sum(HEAD_AXES):
        return HEAD_AXES
    if head_dim % 16:
        raise BadWeights(
            f"heads have {head_dim} channels and the file does not say how they divide into rotary axes"
        )
    cautions.append(f"rotary axes of the {head_dim}-channel heads assumed in Z-Image's proportions")
    return head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8


# --- text encoder --------------------------------------------------------------------


def text_encoder_config(
    shapes: Mapping[str, Shape],
    metadata: Mapping[str, Any],
    layout: str,
    stated: TextEncoderConfig | None = None,
) -> tuple[TextEncoderConfig, list[str]]:
    """Sizes of a text encoder; arguments and result are those of `transformer_config`.

    In a GGUF, llama.cpp's keys are read, such as `qwen3.attention.head_count`.

    Raises:
        BadWeights: As `transformer_config` does; also where llama weights come without metadata.
    """
    cautions: list[str] = []
    gguf = layout == "gguf"
    stack, q, k, norm, up = (
        ("blk", "attn_q", "attn_k", "attn_q_norm", "ffn_up")
        if gguf
        else ("layers", "self_attn.q_proj", "self_attn.k_proj", "self_attn.q_norm", "mlp.up_proj")
    )
    vocabulary, hidden = axes(shapes, "token_embd.weight" if gguf else "embed_tokens.weight", 2)
    (q_rows, _) = axes(shapes, f"{stack}.0.{q}.weight", 2)
    (k_rows, _) = axes(shapes, f"{stack}.0.{k}.weight", 2)
    (inner, _) = axes(shapes, f"{stack}.0.{up}.weight", 2)
    qk_norm, bias = f"{stack}.0.{norm}.weight" in shapes, f"{stack}.0.{q}.bias" in shapes
    arch = metadata.get("general.architecture") if gguf else None
    if arch not in TEXT_ARCHITECTURES:
        arch = stated.arch if stated else "qwen3" if qk_norm else "qwen2" if bias else "llama"
    if (arch == "qwen3") != qk_norm:
        raise BadWeights(
            f"architecture {arch!r} {'has no' if qk_norm else 'needs'} norms on q and k, the tensors differ"
        )
    if "rope_freqs.weight" in shapes:
        raise BadWeights(
            "the encoder scales its rotary frequencies (tensor rope_freqs.weight), "
            "which no encoder of Z-Image does; get Qwen3-4B"
        )
    heads = stated.num_heads if stated else read_int(metadata, f"{arch}.attention.head_count", 4096)
    if qk_norm:
        (head_dim,) = axes(shapes, f"{stack}.0.{norm}.weight", 1)
    elif stated:
        head_dim = stated.head_dim
    elif heads:
        head_dim = read_int(metadata, f"{arch}.attention.key_length", MAX_WIDTH) or hidden // heads
    elif arch == "qwen2":
        head_dim = 64 if hidden < 1536 else 128
        cautions.append(f"no metadata: heads of {head_dim} channels assumed, as in Qwen2.5")
    else:
        raise BadWeights(
            "llama weights do not tell their head count; a GGUF with metadata or a config.json is needed"
        )
    if head_dim < 2 or q_rows % head_dim or k_rows % head_dim:
        raise BadWeights(f"heads of {head_dim} channels do not divide {q_rows} query and {k_rows} key rows")
    refuse_other_arithmetic(metadata, str(arch), head_dim, k_rows // head_dim)
    if heads and heads != q_rows // head_dim:
        raise BadWeights(
            f"the metadata says {heads} heads, the tensors hold {q_rows // head_dim} of {head_dim} channels"
        )
    if stated:
        theta, eps = stated.rope_theta, stated.rms_norm_eps
    else:
        default = replace(QWEN3_4B, rope_theta=1e4, rms_norm_eps=1e-5) if arch == "llama" else QWEN3_4B
        theta = read_float(metadata, f"{arch}.rope.freq_base", 1, 1e12) or default.rope_theta
        found = read_float(metadata, f"{arch}.attention.layer_norm_rms_epsilon", 0, 0.1)
        eps = default.rms_norm_eps if found is None else found
    config = built(
        TextEncoderConfig,
        arch=arch,
        hidden_size=hidden,
        num_layers=_text_layers(
            shapes, stack, hidden, qk_norm, stated, read_int(metadata, f"{arch}.block_count", MAX_LAYERS)
        ),
        num_heads=q_rows // head_dim,
        num_kv_heads=k_rows // head_dim,
        head_dim=head_dim,
        intermediate_size=inner,
        vocab_size=vocabulary,
        rope_theta=theta,
        rms_norm_eps=eps,
        qk_norm=qk_norm,
        attention_bias=bias,
    )
    same = ("hidden_size", "num_heads", "num_kv_heads", "intermediate_size", "vocab_size", "attention_bias")
    agree(config, stated, same)
    if (config.arch, hidden) == (QWEN3_4B.arch, QWEN3_4B.hidden_size):
        if config.rope_theta == 5e6:
            cautions.append(
                "rotary base 5e6: a Qwen3-4B-2507, not the original Qwen3-4B that Z-Image was trained with"
            )
        if vocabulary != QWEN3_4B.vocab_size:
            rows = QWEN3_4B.vocab_size
            cautions.append(f"{vocabulary} embedding rows where Qwen3-4B has {rows}: a derivative of it")
    return config, cautions


def _text_layers(
    shapes: Mapping[str, Shape],
    stack: str,
    hidden: int,
    qk_norm: bool,
    stated: TextEncoderConfig | None,
    block_count: int | None,
) -> int:
    """Number of layers; the last layer may be missing from the file, because it is never run."""
    present = count_layers(shapes, stack)
    total = stated.num_layers if stated else block_count
    if total is None:
        total = present
        if qk_norm and hidden == QWEN3_4B.hidden_size:  # its true depth is known; cuts after layer 34 exist
            total = QWEN3_4B.num_layers
            if present not in (total, total - 1):
                fault = f"it has {present} layers, Qwen3-4B has {total}; the file was cut or altered"
                raise BadWeights(fault)
    if present not in (total, total - 1):
        raise BadWeights(f"the metadata says {total} layers, the tensors hold {present}")
    return total


# --- VAE -----------------------------------------------------------------------------


def autoencoder_config(
    shapes: Mapping[str, Shape],
    metadata: Mapping[str, Any],
    layout: str,
    stated: AutoencoderConfig | None = None,
) -> tuple[AutoencoderConfig, list[str]]:
    """Sizes of a VAE; arguments and result are those of `transformer_config`.

    The metadata's keys `zimage.norm_num_groups`, `zimage.scaling_factor` and `zimage.shift_factor` are read.

    Raises:
        BadWeights: A tensor that decides the size is missing, or sizes contradict each other.
    """
    cautions: list[str] = []
    stack, resnet = ("encoder.down", "block") if layout == "bfl" else ("encoder.down_blocks", "resnets")
    levels = count_layers(shapes, stack)
    if not 0 < levels <= 8:
        raise BadWeights(f"the encoder has {levels} resolutions, wanted 1 to 8")
    widths = tuple(axes(shapes, f"{stack}.{i}.{resnet}.0.conv1.weight", 4)[0] for i in range(levels))
    image_out, _, _, _ = _conv_axes(shapes, "decoder.conv_out.weight")
    _, image_in, _, _ = _conv_axes(shapes, "encoder.conv_in.weight")
    _, latent, _, _ = _conv_axes(shapes, "decoder.conv_in.weight")
    groups = stated.norm_num_groups if stated else read_int(metadata, "zimage.norm_num_groups", MAX_WIDTH)
    if groups is None:
        groups = math.gcd(32, *widths)
        if groups != 32:
            cautions.append(f"{groups} norm groups assumed from the widths {widths}")
    scaling = stated.scaling_factor if stated else read_float(metadata, "zimage.scaling_factor", 1e-4, 1e4)
    shift = stated.shift_factor if stated else read_float(metadata, "zimage.shift_factor", -100, 100)
    config = built(
        AutoencoderConfig,
        block_out_channels=widths,
        layers_per_block=count_layers(shapes, f"{stack}.0.{resnet}"),
        latent_channels=latent,
        norm_num_groups=groups,
        scaling_factor=FLUX_VAE.scaling_factor if scaling is None else scaling,
        shift_factor=FLUX_VAE.shift_factor if shift is None else shift,
        in_channels=image_in,
        out_channels=image_out,
    )
    agree(
        config,
        stated,
        ("block_out_channels", "layers_per_block", "latent_channels", "in_channels", "out_channels"),
    )
    mine = (config.scaling_factor, config.shift_factor)
    if (
        stated
        and widths == FLUX_VAE.block_out_channels
        and mine != (FLUX_VAE.scaling_factor, FLUX_VAE.shift_factor)
    ):
        cautions.append(
            f"scaling {config.scaling_factor} and shift {config.shift_factor} are not those of Flux: "
            "the VAE of another model with the same shapes, such as Stable Diffusion 3"
        )
    return config, cautions


def _conv_axes(shapes: Mapping[str, Shape], name: str) -> Shape:
    """The four axes of a convolution's weight; a 1x1 kernel keeps its axes of length 1."""
    shape = shapes.get(name)
    if shape is None or len(shape) != 4 or not all(0 < n <= MAX_WIDTH for n in shape):
        raise BadWeights(f"the tensor {name!r} has shape {shape}, wanted the four axes of a convolution")
    return shape
