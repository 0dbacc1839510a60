"""A block of S3-DiT that modulates noisy and clean tokens differently."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zimage_core.models.block_norms import is_plain, norm_modulate, norm_residual
from zimage_core.models.transformer import FP16_ATTENTION_SCALE, FP16_FFN_SCALE, TransformerBlock
from zimage_core.nn.layers import RMSNorm, Rotation
from zimage_core.nn.segments import joined

Pair = tuple[Tensor, Tensor]


class OmniBlock(TransformerBlock):
    """A block of S3-DiT that can modulate noisy and clean tokens by vectors of their own."""

    def forward(
        self,
        x: Tensor,
        rope: Rotation,
        temb: Tensor | None = None,
        modulation: Tensor | None = None,
        clean: Tensor | None = None,
        noisy: int = 0,
    ) -> Tensor:
        """x [L, dim] -> [L, dim]; without `clean` a plain block, to the bit.

        Args:
            x: Noisy tokens, then clean ones.
            rope: Rotation of the tokens.
            temb: As for a plain block.
            modulation: `modulation(temb)` of noisy tokens [4 * dim].
            clean: That of clean tokens [4 * dim].
            noisy: Number of noisy tokens.
        """
        if clean is None or modulation is None or noisy == len(x):
            return super().forward(x, rope, temb, modulation)
        if noisy == 0:
            return super().forward(x, rope, modulation=clean)
        half = x.dtype == torch.float16
        attn_scale, ffn_scale = (FP16_ATTENTION_SCALE, FP16_FFN_SCALE) if half else (1.0, 1.0)
        scale_msa, gate_msa, scale_mlp, gate_mlp = zip(modulation.chunk(4), clean.chunk(4), strict=True)
        a = _modulated(self.attention_norm1, x, scale_msa, noisy, self.attention)
        a = self.attention(a, rope, attn_scale)
        x = _residual(self.attention_norm2, x, a, gate_msa, noisy, attn_scale)
        f = _modulated(self.ffn_norm1, x, scale_mlp, noisy, self.feed_forward)
        f = self.feed_forward(f, ffn_scale)
        return _residual(self.ffn_norm2, x, f, gate_mlp, noisy, ffn_scale)


def _modulated(norm: RMSNorm, x: Tensor, scales: Pair, noisy: int, branch: nn.Module) -> Tensor:
    """`norm_modulate` with one scale for the first `noisy` tokens and another for the others."""
    if not is_plain(norm):
        return norm_modulate(norm, x, _spread(x, scales, noisy), branch)
    pairs = zip(_parts(x, noisy), scales, strict=True)
    return joined((norm_modulate(norm, part, scale, branch) for part, scale in pairs), len(x))


def _residual(norm: RMSNorm, x: Tensor, branch: Tensor, gates: Pair, noisy: int, factor: float) -> Tensor:
    """`norm_residual` with one gate for the first `noisy` tokens and another for the others."""
    if not is_plain(norm):
        return norm_residual(norm, x, branch, _spread(x, gates, noisy), factor)
    parts = zip(_parts(x, noisy), _parts(branch, noisy), gates, strict=True)
    return joined((norm_residual(norm, part, b, gate, factor) for part, b, gate in parts), len(x))


def _parts(x: Tensor, noisy: int) -> Pair:
    return x[:noisy], x[noisy:]


def _spread(x: Tensor, vectors: Pair, noisy: int) -> Tensor:
    """A vector for each token: a norm that has hooks is called once, on all of them."""
    first, second = (vector.to(x.dtype) for vector in vectors)
    return torch.cat((first.expand(noisy, -1), second.expand(len(x) - noisy, -1)))
