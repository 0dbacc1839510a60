"""The Flux-style VAE: images to latents and back; one latent stands for 8 x 8 pixels.

Convolutions run channels-last, which makes them fast on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zimage_core.config import AutoencoderConfig
from zimage_core.errors import BadShape
from zimage_core.models.vae_blocks import Decoder, Encoder
from zimage_core.models.vae_tiles import decode_tiled


class Autoencoder(nn.Module):
    """Flux-style variational autoencoder.

    Latents here are the VAE's own; the transformer sees (z - shift_factor) * scaling_factor, which the
    pipeline computes. If `tile` is set, `decode` uses tiles with sides of that many latents, which takes less
    memory and gives the same image; see `vae_tiles`.
    """

    tile: int | None = None

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.opened: object | None = None  # the file that it was loaded from, a `weights.opened.Opened`

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the convolutions."""
        return self.decoder.conv_in.weight.dtype

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, 3, H, W] in [-1, 1] -> mean and log-variance [B, latent_channels, H / 8, W / 8].

        Raises:
            BadShape: H or W is not a multiple of the spatial factor.
        """
        factor = self.config.spatial_factor
        if x.ndim != 4 or x.shape[1] != self.config.in_channels or x.shape[2] % factor or x.shape[3] % factor:
            raise BadShape(
                f"VAE encode: got an image of {tuple(x.shape)}, wanted [B, {self.config.in_channels}, H, W] "
                f"with H and W multiples of {factor}"
            )
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x [B, 3, H, W] in [-1, 1] -> z [B, latent_channels, H / 8, W / 8], not scaled.

        z is the mode of the posterior; with a generator, one sample of it.
        """
        mean, logvar = self.moments(x)
        if generator is None:
            return mean
        noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=mean.dtype)
        return mean + torch.exp(0.5 * logvar) * noise.to(mean.device)

    def decode(self, z: Tensor, tile: int | None = None, keep: torch.device | None = None) -> Tensor:
        """z [B, latent_channels, h, w], not scaled -> image [B, 3, 8 h, 8 w] about [-1, 1], not clamped.

        Args:
            z: Latents.
            tile: Side of a tile in latents, instead of the attribute `tile`.
            keep: Device of the maps of the whole image, if there are tiles; see `vae_tiles.decode_tiled`.

        Raises:
            BadShape: z has another shape.
        """
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            raise BadShape(
                f"VAE decode: got {tuple(z.shape)}, wanted latents [B, {self.config.latent_channels}, h, w]"
            )
        z = z.to(self.dtype).contiguous(memory_format=torch.channels_last)
        tile = tile or self.tile
        out: Tensor = self.decoder(z) if tile is None else decode_tiled(self.decoder, z, tile, keep)
        return out

    forward = decode
