"""The layers of the Flux-style VAE, its encoder and its decoder.

Structure and parameter names are those of diffusers' AutoencoderKL without quant convolutions
(Rombach et al. 2022, arXiv 2112.10752; weights of FLUX.1).
"""

from __future__ import annotations

from torch import Tensor, nn

from zimage_core.config import AutoencoderConfig
from zimage_core.nn.attention import attention
from zimage_core.nn.linear import Linear

NORM_EPS = 1e-6
"""Epsilon of every GroupNorm."""


def _norm(config: AutoencoderConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_num_groups, channels, eps=NORM_EPS)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); a 1x1 convolution on x where the width changes."""

    def __init__(self, config: AutoencoderConfig, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(config, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = _norm(config, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H, W]."""
        h: Tensor = self.conv1(nn.functional.silu(self.norm1(x)))
        h = self.conv2(nn.functional.silu(self.norm2(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + h


class AttentionBlock(nn.Module):
    """x + attention over all positions, one head as wide as the channels."""

    def __init__(self, config: AutoencoderConfig, channels: int) -> None:
        super().__init__()
        self.group_norm = _norm(config, channels)
        self.to_q = Linear(channels, channels, bias=True)
        self.to_k = Linear(channels, channels, bias=True)
        self.to_v = Linear(channels, channels, bias=True)
        self.to_out = nn.ModuleList([Linear(channels, channels, bias=True)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        b, c, h, w = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2).contiguous()  # a copy only on a GPU
        q, k, v = (proj(tokens).unsqueeze(-2) for proj in (self.to_q, self.to_k, self.to_v))
        out: Tensor = self.to_out[0](attention(q, k, v))
        return x + out.transpose(1, 2).reshape(b, c, h, w)


class MidBlock(nn.Module):
    """Residual, attention, residual at the coarsest resolution."""

    def __init__(self, config: AutoencoderConfig, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(config, channels, channels) for _ in range(2)])
        self.attentions = nn.ModuleList([AttentionBlock(config, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = self.attentions[0](self.resnets[0](x))
        out: Tensor = self.resnets[1](x)
        return out


class Downsample(nn.Module):
    """Halve the side: zeros on the right and bottom edge only, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H / 2, W / 2]."""
        out: Tensor = self.conv(nn.functional.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Double the side by repetition, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2 H, 2 W]."""
        out: Tensor = self.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class DownBlock(nn.Module):
    """The residual blocks of one resolution of the encoder, and the step to the next."""

    def __init__(self, config: AutoencoderConfig, c_in: int, c_out: int, last: bool) -> None:
        super().__init__()
        widths = [c_in] + [c_out] * config.layers_per_block
        self.resnets = nn.ModuleList([ResnetBlock(config, a, c_out) for a in widths[:-1]])
        self.downsamplers = nn.ModuleList([] if last else [Downsample(c_out)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, H, W] -> [B, c_out, H / 2, W / 2], or the same side in the last block."""
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """The residual blocks of one resolution of the decoder, and the step to the next."""

    def __init__(self, config: AutoencoderConfig, c_in: int, c_out: int, last: bool) -> None:
        super().__init__()
        widths = [c_in] + [c_out] * config.layers_per_block
        self.resnets = nn.ModuleList([ResnetBlock(config, a, c_out) for a in widths])
        self.upsamplers = nn.ModuleList([] if last else [Upsample(c_out)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, H, W] -> [B, c_out, 2 H, 2 W], or the same side in the last block."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Image -> mean and log-variance of the latents."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(config, a, b, last=b_index == len(widths) - 1)
            for b_index, (a, b) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True))
        )
        self.mid_block = MidBlock(config, widths[-1])
        self.conv_norm_out = _norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 2 * latent_channels, H / 8, W / 8]."""
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h)
        return self.end(h)

    def end(self, h: Tensor) -> Tensor:
        """The last map [B, C, h, w] -> [B, 2 * latent_channels, h, w]."""
        out: Tensor = self.conv_out(nn.functional.silu(self.conv_norm_out(self.mid_block(h))))
        return out


class Decoder(nn.Module):
    """Latents -> image."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(config, widths[0])
        self.up_blocks = nn.ModuleList(
            UpBlock(config, a, b, last=b_index == len(widths) - 1)
            for b_index, (a, b) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True))
        )
        self.conv_norm_out = _norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """[B, latent_channels, h, w] -> [B, 3, 8 h, 8 w]."""
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
        out: Tensor = self.conv_out(nn.functional.silu(self.conv_norm_out(h)))
        return out
