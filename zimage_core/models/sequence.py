"""Token sequences of images and captions: patches, pad counts, positions. No parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from zimage_core.config import PAD_MULTIPLE, TransformerConfig
from zimage_core.errors import BadArgument


def pad_count(tokens: int) -> int:
    """Number of pad tokens that fill `tokens` up to a multiple of 32."""
    return -tokens % PAD_MULTIPLE


def patchify(latent: Tensor, patch: int) -> Tensor:
    """Latent [..., C, H, W] -> tokens [..., (H / patch) * (W / patch), patch^2 * C].

    Tokens are row-major; inside a token the order is (row, column, channel), channel innermost,
    unlike Flux and SD3.
    """
    *lead, c, h, w = latent.shape
    cells = latent.reshape(*lead, c, h // patch, patch, w // patch, patch)
    n = len(lead)
    order = (*range(n), n + 1, n + 3, n + 2, n + 4, n)
    return cells.permute(order).reshape(*lead, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Inverse of patchify: tokens [..., N, patch^2 * C] -> latent [..., C, height, width], in latents."""
    *lead, _, length = tokens.shape
    c, rows, cols = length // (patch * patch), height // patch, width // patch
    n = len(lead)
    cells = tokens.reshape(*lead, rows, cols, patch, patch, c)
    order = (*range(n), n + 4, n, n + 2, n + 1, n + 3)
    return cells.permute(order).reshape(*lead, c, height, width)


def caption_positions(padded: int) -> Tensor:
    """Positions (t, h, w) of caption tokens and their pads, int64 [padded, 3]: row i is (1 + i, 0, 0)."""
    ids = torch.zeros(padded, 3, dtype=torch.int64)
    ids[:, 0] = torch.arange(1, padded + 1)
    return ids


def image_positions(rows: int, cols: int, padded_caption: int) -> Tensor:
    """Positions (t, h, w) of the image tokens, then of their pads, int64 [rows * cols + pads, 3].

    t of the image is one past the *padded* caption; pads are at (0, 0, 0), where no real token is.
    """
    count = rows * cols
    ids = torch.zeros(count + pad_count(count), 3, dtype=torch.int64)
    ids[:count, 0] = padded_caption + 1
    ids[:count, 1] = torch.arange(rows).repeat_interleave(cols)
    ids[:count, 2] = torch.arange(cols).repeat(rows)
    return ids


def check_lengths(config: TransformerConfig, rows: int, cols: int, caption: int) -> None:
    """Refuse sequences longer than the positions of the model.

    Raises:
        BadArgument: A caption or a side of the image is too long (or empty).
    """
    longest = config.max_caption
    if not 1 <= caption <= longest:
        raise BadArgument(
            f"caption of {caption} tokens: this transformer takes 1 to {longest}; shorten the prompt"
        )
    _, h_max, w_max = config.axes_lens
    if not (1 <= rows <= h_max and 1 <= cols <= w_max):
        side = config.patch_size * 8
        raise BadArgument(
            f"image of {cols * side} x {rows * side} px: this transformer takes {side} to "
            f"{w_max * side} x {h_max * side} px; choose another size"
        )
