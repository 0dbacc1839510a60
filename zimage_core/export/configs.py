"""The config.json of a written folder, as diffusers and transformers read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig, VisionConfig
from zimage_core.export.checkpoint import TEXT_ENDS, Checkpoint
from zimage_core.export.metadata import context_length
from zimage_core.export.streaming import Job
from zimage_core.formats import DTYPE_NAMES, FORMATS
from zimage_core.weights.facts import FIELD
from zimage_core.weights.infer import Config

HEAD = TEXT_ENDS["hf"][1]
"""Output matrix of a language model; it is missing where the embedding is used instead."""

CLASSES = {"qwen3": "Qwen3Model", "qwen2": "Qwen2Model", "llama": "LlamaModel"}


def config_json(source: Checkpoint, jobs: Sequence[Job], changed: bool) -> dict[str, Any]:
    """The config.json of a folder made from a checkpoint: its own if it has one, updated for the new weights.

    Args:
        source: The checkpoint.
        jobs: The tensors of the folder.
        changed: Whether the type of any tensor changes.
    """
    found = new_config(source.config, jobs, source.stated, source.facts)
    if changed:
        found.pop("quantization_config", None)
    if source.component == "text_encoder" and (longest := context_length(source)) is not None:
        found.setdefault("max_position_embeddings", longest)
    return found


def new_config(
    config: Config, jobs: Sequence[Job], stated: Mapping[str, Any] | None, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The config.json of a network.

    Args:
        config: Config with the sizes of the network.
        jobs: The tensors of the folder.
        stated: An older config.json of the same sizes, whose other fields are kept; or None.
        facts: What `weights.facts` reads again: image size and schedule.
    """
    found = of_sizes(config) if stated is None else dict(stated)
    if facts:
        found[FIELD] = dict(facts)
    weights: Counter[str] = Counter()
    for job in jobs:
        weights[job.format.name] += job.target.weights
    most = FORMATS[weights.most_common(1)[0][0]] if weights else None
    dtype = DTYPE_NAMES[most.name] if most is not None and most.is_float else None
    for key in found.keys() & {"torch_dtype", "dtype"}:
        found[key] = dtype or found[key]
    if isinstance(config, TextEncoderConfig):
        found["tie_word_embeddings"] = all(job.target.name != HEAD for job in jobs)
    return found


def of_sizes(config: Config) -> dict[str, Any]:
    """The config.json that diffusers or transformers builds a network of these sizes from."""
    if isinstance(config, TransformerConfig):
        return _transformer(config)
    if isinstance(config, VisionConfig):
        return _vision(config)
    return _text_encoder(config) if isinstance(config, TextEncoderConfig) else _autoencoder(config)


def _vision(c: VisionConfig) -> dict[str, Any]:
    return {
        "architectures": ["Siglip2VisionModel"],
        "model_type": "siglip2_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "layer_norm_eps": c.layer_norm_eps,
        "num_attention_heads": c.num_heads,
        "num_channels": c.num_channels,
        "num_hidden_layers": c.num_layers,
        "num_patches": c.num_patches,
        "patch_size": c.patch_size,
        "vision_use_head": False,
    }


def _transformer(c: TransformerConfig) -> dict[str, Any]:
    found = {
        "_class_name": "ZImageTransformer2DModel",
        "all_patch_size": [c.patch_size],
        "all_f_patch_size": [1],
        "in_channels": c.in_channels,
        "dim": c.dim,
        "n_layers": c.n_layers,
        "n_refiner_layers": c.n_refiner_layers,
        "n_heads": c.n_heads,
        "n_kv_heads": c.n_heads,
        "norm_eps": c.norm_eps,
        "qk_norm": True,
        "cap_feat_dim": c.cap_feat_dim,
        "rope_theta": c.rope_theta,
        "t_scale": c.t_scale,
        "axes_dims": list(c.axes_dims),
        "axes_lens": list(c.axes_lens),
    }
    return found if c.siglip_feat_dim is None else found | {"siglip_feat_dim": c.siglip_feat_dim}


def _text_encoder(c: TextEncoderConfig) -> dict[str, Any]:
    return {
        "architectures": [CLASSES[c.arch]],
        "model_type": c.arch,
        "attention_bias": c.attention_bias,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_attention_heads": c.num_heads,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": c.num_kv_heads,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "torch_dtype": "float32",  # config_json replaces it by that of the weights
        "vocab_size": c.vocab_size,
    }


def _autoencoder(c: AutoencoderConfig) -> dict[str, Any]:
    levels = len(c.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(c.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "latent_channels": c.latent_channels,
        "layers_per_block": c.layers_per_block,
        "norm_num_groups": c.norm_num_groups,
        "scaling_factor": c.scaling_factor,
        "shift_factor": c.shift_factor,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
