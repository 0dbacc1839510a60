"""Floating-point operations and memory traffic of each network; a product of M, N, K counts 2 M N K."""

from __future__ import annotations

from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.memory.activations import image_tokens, padded


def _block(config: TransformerConfig, tokens: int) -> int:
    linear = 4 * config.dim**2 + 3 * config.dim * config.hidden_dim
    return 2 * tokens * linear + 4 * tokens * tokens * config.dim


def step_flops(config: TransformerConfig, height: int, width: int, caption: int) -> int:
    """Of one call of the network on latents of height x width and a caption; its refiners in."""
    image, text = padded(image_tokens(config, height, width)), padded(caption)
    refiners = config.n_refiner_layers * (_block(config, image) + _block(config, text))
    return refiners + config.n_layers * _block(config, image + text)


def step_traffic(config: TransformerConfig, height: int, width: int, caption: int, item: int) -> int:
    """Bytes that the element-wise steps of a call read and write: two norms, two gates, rotation, SwiGLU."""
    image = padded(image_tokens(config, height, width))
    tokens = config.n_refiner_layers * image + config.n_layers * (image + padded(caption))
    return item * tokens * (14 * config.dim + 3 * config.hidden_dim)


def encode_flops(config: TextEncoderConfig, tokens: int) -> int:
    """Of one caption, causal attention counted whole."""
    q, k = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linear = 2 * config.hidden_size * (q + k) + 3 * config.hidden_size * config.intermediate_size
    return (config.num_layers - 1) * (2 * tokens * linear + 4 * tokens * tokens * q)


def decode_flops(config: AutoencoderConfig, height: int, width: int) -> int:
    """Of one decode of latents of height x width at once."""
    widths = config.block_out_channels[::-1]
    pixels, wide = height * width, widths[0]
    weights = pixels * 9 * (config.latent_channels * wide + 4 * wide * wide) + pixels * 4 * wide * wide
    attention = 4 * pixels * pixels * wide
    before = wide
    for level, channels in enumerate(widths):
        first = 9 * (before + channels) * channels + (before * channels if before != channels else 0)
        weights += pixels * (first + config.layers_per_block * 18 * channels * channels)
        if level < len(widths) - 1:
            pixels *= 4
            weights += pixels * 9 * channels * channels
        before = channels
    return 2 * (weights + pixels * 9 * before * config.out_channels) + attention
