"""The nano transformer and its text encoder as they are trained: in whole batches, with a classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.nano.draw import COLOURS, GLYPHS, POSITIONS, RADII, SHAPES, SIZE
from benchmarks.nano.train_vae import NanoVAE, mixed_precision
from benchmarks.nano.vocabulary import LENGTH, encode, tokenizer
from zimage_core.config import TextEncoderConfig, TransformerConfig
from zimage_core.models import sequence, text_encoder, transformer
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.nn.linear import Linear

TRANSFORMER = TransformerConfig(
    dim=256, n_layers=4, n_refiner_layers=1, n_heads=2, cap_feat_dim=256, hidden_dim=682
)
ROWS = SIZE // 16
TEXT = 24
"""Tokens of the longest prompt; the caption is padded to LENGTH behind the encoder."""
SIGMAS = (1.0, 21 / 22, 0.9, 5 / 6, 0.75, 9 / 14, 0.5, 0.3, 0.0)
"""Eight steps at shift 3."""
GATE = 0.55
"""Initial bias of the gates; tanh of it is 0.5."""
CLASSES = (
    (list(COLOURS), "colour"),
    (list(COLOURS), "background"),
    ([*SHAPES, ""], "shape"),
    (list(POSITIONS), "position"),
    (list(RADII), "size"),
    ([1, 2, 3], "count"),
    ([*GLYPHS, ""], "glyph"),
)


def encoder_config() -> TextEncoderConfig:
    return TextEncoderConfig(
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=384,
        vocab_size=tokenizer().get_vocab_size(),
        rope_theta=1e6,
    )


def short_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, in_int8: bool = False) -> Tensor:
    """The library's attention written out, never in int8: at 64 tokens its backward pass is much faster."""
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
    if q.shape[-3] != k.shape[-3]:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    score = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if causal:
        score = score + torch.full(score.shape[-2:], float("-inf")).triu(1)
    return (score.softmax(-1).to(v.dtype) @ v).transpose(-3, -2).flatten(-2)


def speed_up() -> None:
    """Put plain torch in place of what the library does more carefully than training needs."""
    transformer.attention = text_encoder.attention = short_attention
    Linear.product = lambda self, x: nn.functional.linear(x, self.weight, self.bias)


Control = Callable[[Tensor, Tensor, Tensor], Mapping[int, Tensor]]
"""Joint sequence after the noise refiner, refined caption and time embedding -> hints by main layer."""


class Nano(nn.Module):
    """Both networks, run on whole batches, and the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = ZImageTransformer(TRANSFORMER)
        self.text_encoder = TextEncoder(encoder_config())
        self.classifier = nn.Linear(256, sum(len(names) for names, _ in CLASSES))
        image = sequence.image_positions(ROWS, ROWS, LENGTH)
        joint = torch.cat((image, sequence.caption_positions(LENGTH)))
        self.joint_angles = self.transformer.rotation(joint)
        self.image_angles = tuple(t[: len(image)] for t in self.joint_angles)
        self.caption_angles = tuple(t[len(image) :] for t in self.joint_angles)
        self.text_angles = self.text_encoder.rotation(TEXT)
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        dit = self.transformer
        for block in (*dit.noise_refiner, *dit.layers):
            linear = block.adaLN_modulation[0]
            linear.weight.normal_(std=0.02)
            linear.bias.view(4, -1)[[1, 3]] = GATE
        final = dit.all_final_layer["2-1"]
        for linear in (final.linear, final.adaLN_modulation[1]):
            linear.weight.zero_()
        dit.x_pad_token.normal_(std=0.5)
        dit.cap_pad_token.normal_(std=0.5)
        self.text_encoder.embed_tokens.weight.normal_(std=0.5)

    def caption(self, ids: Tensor) -> Tensor:
        """ids [B, TEXT] -> hidden states [B, TEXT, 256]; causal, so what is after the end is harmless."""
        x = nn.functional.embedding(ids, self.text_encoder.embed_tokens.weight)
        for layer in self.text_encoder.layers:
            x = layer(x, self.text_angles, x.dtype)
        return x

    def forward(
        self, x: Tensor, t: Tensor, hidden: Tensor, lengths: Tensor, control: Control | None = None
    ) -> Tensor:
        """x [B, 16, h, w], t [B], hidden [B, TEXT, 256], lengths [B] -> estimate of clean - noise."""
        dit = self.transformer
        b, _, height, width = x.shape
        temb = dit.t_embedder(t * TRANSFORMER.t_scale, x.dtype)
        image = dit.all_x_embedder["2-1"](sequence.patchify(x, 2)).float()
        count = image.shape[1]
        image = torch.cat((image, dit.x_pad_token.expand(b, sequence.pad_count(count), -1)), 1)
        for block in dit.noise_refiner:
            image = block(image, self.image_angles, temb)
        real = (torch.arange(LENGTH) < lengths[:, None])[:, :, None]
        text = nn.functional.pad(dit.cap_embedder(hidden).float(), (0, 0, 0, LENGTH - TEXT))
        text = torch.where(real, text, dit.cap_pad_token)
        for block in dit.context_refiner:
            text = block(text, self.caption_angles)
        joint = torch.cat((image, text), 1)
        hints = {} if control is None else control(joint, text, temb)
        for i, block in enumerate(dit.layers):
            joint = block(joint, self.joint_angles, temb)
            if i in hints:
                joint = joint + hints[i]
        tokens = dit.all_final_layer["2-1"](joint[:, :count], temb)
        return sequence.unpatchify(tokens.float(), height, width, 2)


def pad_ids(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Prompts -> ids [B, TEXT] and lengths [B]."""
    rows = [encode(p) for p in prompts]
    if max(map(len, rows)) > TEXT:
        raise ValueError(f"a prompt has more than {TEXT} tokens")
    ids = torch.zeros(len(rows), TEXT, dtype=torch.int64)
    for row, target in zip(rows, ids, strict=True):
        target[: len(row)] = torch.tensor(row)
    return ids, torch.tensor([len(r) for r in rows])


@torch.no_grad()
def sample(model: Nano, prompts: list[str], seed: int, control: Control | None = None) -> Tensor:
    """Unit-variance latents of the prompts after eight Euler steps."""
    x = torch.randn(len(prompts), 16, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(seed))
    with mixed_precision():
        ids, lengths = pad_ids(prompts)
        hidden = model.caption(ids)
        for sigma, after in pairwise(SIGMAS):
            x = x - (after - sigma) * model(x, torch.full((len(x),), 1 - sigma), hidden, lengths, control)
    return x


@torch.no_grad()
def images(
    model: Nano, vae: NanoVAE, prompts: list[str], seed: int, control: Control | None = None
) -> np.ndarray:
    """uint8 [B, SIZE, SIZE, 3]."""
    y = vae.decode(sample(model, prompts, seed, control)).float().clamp(-1, 1)
    return ((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
