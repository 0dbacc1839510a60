"""Files that consist of a header only, so that full-size models are cheap to identify."""

from __future__ import annotations

from types import SimpleNamespace

from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.formats import FORMATS
from zimage_core.weights import names
from zimage_core.weights.source import TensorInfo

FULL_DIT, QWEN3_4B, FLUX_VAE = TransformerConfig(), TextEncoderConfig(), AutoencoderConfig()
QWEN3_8B = TextEncoderConfig(hidden_size=4096, num_layers=36, intermediate_size=12288)
QWEN3_1_7B = TextEncoderConfig(hidden_size=2048, num_layers=28, num_heads=16, intermediate_size=6144)


def header(shapes, metadata=None, fmt="F32"):
    """A file that is nothing but its header: full-size models cost nothing."""
    formats = FORMATS | {"U8": SimpleNamespace(name="U8"), "I32": FORMATS["I32"]}
    tensors = {
        name: TensorInfo(name, tuple(s), formats[fmt if isinstance(fmt, str) else fmt(name)], 0, 0)
        for name, s in shapes.items()
    }
    kind = "gguf" if "general.architecture" in (metadata or {}) else "safetensors"
    return SimpleNamespace(
        kind=kind, tensors=tensors, metadata=metadata or {}, path="x.bin", notes=(), cautions=()
    )


def dit(layout="fused", config=FULL_DIT, prefix=""):
    table = names.transformer_table(config, layout)
    return {prefix + n: s for n, s in names.checkpoint_shapes(table).items()}


def encoder(layout="gguf", config=QWEN3_4B, prefix=""):
    table = names.text_encoder_table(config, layout)
    return {prefix + n: s for n, s in names.checkpoint_shapes(table).items()}


def vae(layout="bfl", config=FLUX_VAE, prefix=""):
    table = names.autoencoder_table(config, layout)
    return {prefix + n: s for n, s in names.checkpoint_shapes(table).items()}
