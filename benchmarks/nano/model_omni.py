"""The Omni sibling of the embedded model as it is trained: one reference, in whole batches.

The order of tokens is that of noise, for attention sees no order: first what has the time of the image that
is made (its tokens, caption pieces 2 and 3, its missing features), then what is clean (piece 1, the
reference, its features). Positions and flags are those of `OmniTransformer` with positions="trained".
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.nano.draw import SIZE
from benchmarks.nano.model import ROWS, SIGMAS, TEXT, TRANSFORMER, Nano
from benchmarks.nano.train_vae import NanoVAE, mixed_precision
from benchmarks.nano.vocabulary import LENGTH, tokenizer
from zimage_core.models import sequence
from zimage_core.models.transformer import TransformerBlock
from zimage_core.nn.layers import RMSNorm
from zimage_core.nn.linear import Linear

FEATURES, TOWER_LAYERS, TOWER_HEADS, TOWER_HIDDEN, PATCH = 64, 2, 2, 128, 16
GRID = SIZE // PATCH
"""Patches in a row of the vision tower."""
FIRST, SECOND, THIRD = (
    "<|im_start|>user\n<|vision_start|>",
    "<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n<|vision_start|>",
    "<|vision_end|><|im_end|>",
)
"""Pieces of a prompt with one reference."""
NOISY = 4 * LENGTH
"""Tokens that have the time of the image that is made."""


class TowerLayer(nn.Module):
    """A block of a SigLIP tower: attention and feed-forward, each behind a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(FEATURES, 1e-6) for _ in range(2))
        names = ("k_proj", "v_proj", "q_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(FEATURES, FEATURES) for name in names})
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(FEATURES, TOWER_HIDDEN), "fc2": nn.Linear(TOWER_HIDDEN, FEATURES)}
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, FEATURES] -> the same shape."""
        normed, at = self.layer_norm1(x), self.self_attn
        q, k, v = (
            at[name](normed).unflatten(-1, (TOWER_HEADS, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        score = (q @ k.mT).float() * q.shape[-1] ** -0.5
        x = x + at["out_proj"]((score.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2))
        hidden = nn.functional.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh")
        return x + self.mlp["fc2"](hidden)


class Tower(nn.Module):
    """A SigLIP2 vision tower of toy size; its parameters have the names of transformers' model."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "patch_embedding": nn.Linear(3 * PATCH * PATCH, FEATURES),
                "position_embedding": nn.Embedding(GRID * GRID, FEATURES),
            }
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(TowerLayer() for _ in range(TOWER_LAYERS))})
        self.post_layernorm = nn.LayerNorm(FEATURES, 1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [B, SIZE, SIZE, 3] -> last hidden state [B, GRID * GRID, FEATURES]."""
        x = pixels.float().div(127.5).sub(1).view(-1, GRID, PATCH, GRID, PATCH, 3)
        x = self.embeddings["patch_embedding"](x.transpose(2, 3).flatten(3).flatten(1, 2)).float()
        x = x + self.embeddings["position_embedding"].weight
        for layer in self.encoder["layers"]:
            x = layer(x)
        out: Tensor = self.post_layernorm(x.float())
        return out


def second_ids(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Prompts -> ids of piece 2 [B, TEXT] and its lengths [B]."""
    rows = [tokenizer().encode(SECOND.format(prompt=prompt)).ids for prompt in prompts]
    if max(map(len, rows)) > TEXT:
        raise ValueError(f"a prompt has more than {TEXT} tokens")
    ids = torch.zeros(len(rows), TEXT, dtype=torch.int64)
    for row, target in zip(rows, ids, strict=True):
        target[: len(row)] = torch.tensor(row)
    return ids, torch.tensor([len(row) for row in rows])


def _spread(t: int, scale: bool) -> Tensor:
    """Positions of the reference's features; spread over its latents, if it has any."""
    side = torch.arange(GRID)
    if scale:
        side = (side / (GRID - 1) * (SIZE // 8 - 1)).int()
    rows, columns = side.repeat_interleave(GRID), side.repeat(GRID)
    return torch.stack((torch.full_like(rows, t), rows, columns), 1).long()


def positions(first: int, second: int, latent: bool, features: bool) -> dict[str, Tensor]:
    """Positions (t, h, w) of each part, [LENGTH, 3] or for "nothing" and pads (0, 0, 0).

    Args:
        first: Tokens of piece 1.
        second: Tokens of piece 2.
        latent: Whether the reference has a latent.
        features: Whether it has features.
    """
    steps = torch.arange(LENGTH)[:, None] * torch.tensor([1, 0, 0])
    image = sequence.image_positions(ROWS, ROWS, -1)  # t = 0
    count = ROWS * ROWS
    reference, middle = 1 + first, 1 + first + 2
    target = middle + second
    found = {"nothing": torch.zeros(LENGTH, 3, dtype=torch.int64)}
    for name, t, there in (("target", target, True), ("reference", reference, latent)):
        found[name] = image.clone() if there else found["nothing"].clone()
        found[name][:count, 0] = t if there else 0
    found["features"] = found["nothing"].clone()
    if features:
        found["features"][: GRID * GRID] = _spread(reference + 1, latent)
    for name, start in (("piece 1", 1), ("piece 2", middle), ("piece 3", target + 2)):
        found[name] = steps + torch.tensor([start, 0, 0])
    return found


def attend(block: TransformerBlock, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The block's attention on [B, L, dim], with angles [B, L, head_dim / 2]."""
    attention = block.attention
    q, k = (
        norm(layer(x).unflatten(-1, (attention.heads, -1))).float().unflatten(-1, (-1, 2))
        for layer, norm in ((attention.to_q, attention.norm_q), (attention.to_k, attention.norm_k))
    )
    c, s = cos[:, :, None], sin[:, :, None]
    q, k = (
        torch.stack((y[..., 0] * c - y[..., 1] * s, y[..., 0] * s + y[..., 1] * c), -1).flatten(-2)
        for y in (q, k)
    )
    v = attention.to_v(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    q, k = q.to(v.dtype).transpose(1, 2), k.to(v.dtype).transpose(1, 2)
    score = (q @ k.mT).float() * q.shape[-1] ** -0.5
    out: Tensor = attention.to_out[0]((score.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(-2))
    return out


def run(
    block: TransformerBlock,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    noisy: Tensor | None,
    clean: Tensor | None,
    n: int,
) -> Tensor:
    """A block whose first n tokens have the modulation `noisy` [B, 4 * dim], the others `clean` [4 * dim]."""
    forward = block.feed_forward

    def ffn(y: Tensor) -> Tensor:
        out: Tensor = forward.w2(nn.functional.silu(forward.w1(y)) * forward.w3(y))
        return out

    if noisy is None or clean is None:
        x = x + block.attention_norm2(attend(block, block.attention_norm1(x), cos, sin))
        return x + block.ffn_norm2(ffn(block.ffn_norm1(x)))
    is_noisy = (torch.arange(x.shape[1]) < n)[:, None]
    s1, g1, s2, g2 = (
        torch.where(is_noisy, a[:, None], b[None, None])
        for a, b in zip(noisy.chunk(4, -1), clean.chunk(4, -1), strict=True)
    )
    x = x + g1 * block.attention_norm2(attend(block, block.attention_norm1(x) * (1 + s1), cos, sin))
    return x + g2 * block.ffn_norm2(ffn(block.ffn_norm1(x) * (1 + s2)))


class OmniNano(Nano):
    """The sibling: the base's networks, the vision branch of its transformer and a tower."""

    def __init__(self) -> None:
        super().__init__()
        dit = self.transformer
        dit.siglip_embedder = nn.Sequential(
            RMSNorm(FEATURES, TRANSFORMER.norm_eps), Linear(FEATURES, TRANSFORMER.dim, bias=True)
        )
        dit.siglip_refiner = nn.ModuleList([TransformerBlock(TRANSFORMER, modulated=False)])
        dit.siglip_pad_token = nn.Parameter(torch.zeros(1, TRANSFORMER.dim))
        self.siglip = Tower()
        self.run_block = run
        self.seen: dict[str, Tensor] = {}
        """What the classifiers of the training hear of the last pass, each [B, dim]."""
        self.first, self.third = (torch.tensor(tokenizer().encode(text).ids) for text in (FIRST, THIRD))
        self._rotations: dict[tuple[int, bool, bool], dict[str, tuple[Tensor, Tensor]]] = {}
        nn.init.normal_(dit.siglip_pad_token, std=0.5)

    def rotations(
        self, lengths: Tensor, latent: Tensor, features: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Cosines and sines of each part, [B, LENGTH, head_dim / 2]."""
        rows = []
        for key in zip(lengths.tolist(), latent.tolist(), features.tolist(), strict=True):
            if key not in self._rotations:
                found = positions(len(self.first), *key)
                self._rotations[key] = {n: self.transformer.rotation(p) for n, p in found.items()}
            rows.append(self._rotations[key])
        return {n: tuple(torch.stack([row[n][i] for row in rows]) for i in (0, 1)) for n in rows[0]}

    def texts(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Ids of piece 2 -> hidden states of the three pieces, padded, [B, 3 * LENGTH, 256]."""
        hidden = torch.zeros(len(ids), 3 * LENGTH, 256)
        for start, piece in ((0, self.first), (2 * LENGTH, self.third)):
            padded = nn.functional.pad(piece, (0, TEXT - len(piece)))[None]
            hidden[:, start : start + len(piece)] = self.caption(padded)[:, : len(piece)].float()
        hidden[:, LENGTH : LENGTH + TEXT] = self.caption(ids).float()
        return hidden

    def omni(
        self, x: Tensor, t: Tensor, hidden: Tensor, lengths: Tensor, reference: Tensor, features: Tensor,
        has_latent: Tensor, has_features: Tensor,
    ) -> Tensor:  # fmt: skip
        """Estimate clean - noise of x [B, 16, h, w].

        Args:
            x: Noisy latents.
            t: Times [B].
            hidden: The result of `texts`.
            lengths: Tokens of piece 2, [B].
            reference: Latents of the references, as x.
            features: Features of the references [B, GRID * GRID, FEATURES].
            has_latent: Which references have a latent, bool [B].
            has_features: Which have features, bool [B].
        """
        dit, block = self.transformer, self.run_block
        b, _, height, width = x.shape
        angles = self.rotations(lengths, has_latent, has_features)

        def rope(*names: str) -> tuple[Tensor, Tensor]:
            cos, sin = (torch.cat([angles[n][i] for n in names], 1) for i in (0, 1))
            return cos, sin

        scaled = torch.cat((t, torch.ones(1))) * TRANSFORMER.t_scale
        temb = dit.t_embedder(scaled, x.dtype)
        count = ROWS * ROWS
        images = dit.all_x_embedder["2-1"](sequence.patchify(torch.stack((x, reference), 1), 2)).float()
        there = torch.stack((torch.ones_like(has_latent), has_latent), 1)[:, :, None, None]
        images = torch.where(there, images, dit.x_pad_token)
        pads = dit.x_pad_token.expand(b, 2, LENGTH - count, -1)
        images = torch.cat((images, pads), 2).flatten(1, 2)
        for layer in dit.noise_refiner:
            m = layer.modulation(temb)
            images = block(layer, images, *rope("target", "reference"), m[:-1], m[-1], LENGTH)
        spot = torch.arange(LENGTH)
        real = torch.cat(
            (
                (spot < len(self.first)).expand(b, -1),
                spot < lengths[:, None],
                (spot < len(self.third)).expand(b, -1),
            ),
            1,
        )[:, :, None]
        text = torch.where(real, dit.cap_embedder(hidden).float(), dit.cap_pad_token)
        for layer in dit.context_refiner:
            text = block(layer, text, *rope("piece 1", "piece 2", "piece 3"), None, None, 0)
        # the library gives features as [h, w, C] and reads them as [C, h, w], as diffusers does
        mixed = features.transpose(1, 2).reshape(b, GRID * GRID, FEATURES)
        seen = torch.where(
            has_features[:, None, None], dit.siglip_embedder(mixed).float(), dit.siglip_pad_token
        )
        seen = torch.cat((seen, dit.siglip_pad_token.expand(b, 2 * LENGTH - GRID * GRID, -1)), 1)
        for layer in dit.siglip_refiner:
            seen = block(layer, seen, *rope("features", "nothing"), None, None, 0)
        n = LENGTH
        joint = torch.cat(
            (images[:, :n], text[:, n:], seen[:, n:], text[:, :n], images[:, n:], seen[:, :n]), 1
        )
        cos, sin = rope("target", "piece 2", "piece 3", "nothing", "piece 1", "reference", "features")
        self.seen = {
            "reference": images[:, n : n + count].mean(1),
            "features": seen[:, : GRID * GRID].mean(1),
        }
        for i, layer in enumerate(dit.layers):
            m = layer.modulation(temb)
            joint = block(layer, joint, cos, sin, m[:-1], m[-1], NOISY)
            if i in (1, 2):
                self.seen[f"target {i}"] = joint[:, :count].mean(1)
        tokens = dit.all_final_layer["2-1"](joint[:, :count], temb[:-1])
        return sequence.unpatchify(tokens.float(), height, width, 2)


@torch.no_grad()
def images(
    model: OmniNano, vae: NanoVAE, prompts: list[str], pixels: Tensor, reference: Tensor, seed: int,
    latent: bool = True, features: bool = True,
) -> np.ndarray:  # fmt: skip
    """Images of prompts with references, uint8 [B, SIZE, SIZE, 3], after eight Euler steps.

    Args:
        model: The sibling.
        vae: Decodes.
        prompts: The prompts.
        pixels: References, uint8 [B, SIZE, SIZE, 3].
        reference: Their unit-variance latents.
        seed: Seed of the noise.
        latent: Whether the references' latents are given.
        features: Whether their features are.
    """
    b = len(prompts)
    x = torch.randn(b, 16, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(seed))
    has = (torch.full((b,), latent), torch.full((b,), features))
    with mixed_precision():
        ids, lengths = second_ids(prompts)
        hidden, seen = model.texts(ids, lengths), model.siglip(pixels)
        for sigma, after in pairwise(SIGMAS):
            t = torch.full((b,), 1 - sigma)
            x = x - (after - sigma) * model.omni(x, t, hidden, lengths, reference, seen, *has)
    y = vae.decode(x).float().clamp(-1, 1)
    return ((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
