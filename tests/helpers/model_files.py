"""Writes small model files in every published layout, with known weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from tests.helpers.gguf_writer import GGUFWriter, Packed
from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.formats import FORMATS
from zimage_core.reference.dequantize import dequantize
from zimage_core.reference.encode import random_blocks

TOY_DIT = TransformerConfig(
    dim=256,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=4,
    cap_feat_dim=256,
    hidden_dim=512,
    axes_dims=(16, 24, 24),
)
TOY_VAE = AutoencoderConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)


def toy_encoder(arch: str = "qwen3", **changes: object) -> TextEncoderConfig:
    fields = {
        "arch": arch, "hidden_size": 256, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 128,
        "intermediate_size": 512, "vocab_size": 64, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
        "qk_norm": arch == "qwen3", "attention_bias": arch == "qwen2",
    }  # fmt: skip
    return TextEncoderConfig(**{**fields, **changes})


@dataclass
class Stored:
    """Tensors as a file holds them: name -> (format, packed bytes, shape)."""

    tensors: dict[str, tuple[str, np.ndarray, tuple[int, ...]]] = field(default_factory=dict)

    def values(self) -> dict[str, torch.Tensor]:
        """What they mean, by the reference dequantiser, float32."""
        return {
            name: torch.from_numpy(np.ascontiguousarray(dequantize(packed, fmt))).reshape(shape)
            for name, (fmt, packed, shape) in self.tensors.items()
        }

    def prefixed(self, prefix: str) -> Stored:
        return Stored({prefix + name: entry for name, entry in self.tensors.items()})


def stored(
    shapes: Mapping[str, tuple[int, ...]],
    matrix: str = "F32",
    vector: str = "F32",
    other: str = "F32",
    seed: int = 0,
) -> Stored:
    """Random tensors of deviation 0.02: matrices in one format, vectors and the rest in others.

    A vector that is no whole number of blocks is stored as BF16, as sd.cpp does.
    """
    rng = np.random.default_rng(seed)
    out = Stored()
    for name, shape in shapes.items():
        fmt = {1: vector, 2: matrix}.get(len(shape), other)
        if math.prod(shape[-1:]) % FORMATS[fmt].weights:
            fmt = "BF16"
        out.tensors[name] = (fmt, random_blocks(fmt, shape or (1,), rng), shape)
    return out


def write_gguf(path: Path, content: Stored, metadata: Mapping[str, object] | None = None) -> Path:
    """A GGUF file; without metadata it has no key at all, as stable-diffusion.cpp's converter leaves it."""
    writer = GGUFWriter()
    for key, value in (metadata or {}).items():
        writer.key(key, value)
    for name, (fmt, packed, shape) in content.tensors.items():
        writer.tensor(name, Packed(FORMATS[fmt], shape, packed.tobytes()))
    path.write_bytes(writer.build())
    return path


TORCH = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U8": torch.uint8, "I8": torch.int8,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def write_safetensors(path: Path, content: Stored, metadata: Mapping[str, str] | None = None) -> Path:
    from safetensors.torch import save_file

    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(packed)).view(TORCH[fmt]).reshape(shape).clone()
        for name, (fmt, packed, shape) in content.tensors.items()
    }
    save_file(tensors, path, metadata=dict(metadata) if metadata else None)
    return path


def encoder_metadata(config: TextEncoderConfig) -> dict[str, object]:
    a = config.arch
    return {
        "general.architecture": a,
        f"{a}.block_count": config.num_layers,
        f"{a}.embedding_length": config.hidden_size,
        f"{a}.feed_forward_length": config.intermediate_size,
        f"{a}.attention.head_count": config.num_heads,
        f"{a}.attention.head_count_kv": config.num_kv_heads,
        f"{a}.attention.key_length": config.head_dim,
        f"{a}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{a}.rope.freq_base": config.rope_theta,
    }


def write_json(path: Path, data: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path
