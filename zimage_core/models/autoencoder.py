"""The Flux-style VAE: images to latents and back; one latent stands for 8 x 8 pixels.

Convolutions run channels-last on a CPU, which makes them fast there. On a GPU maps have the default layout,
which torch's GroupNorm returns there whatever it gets: else layouts would alternate, with a copy each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zimage_core.config import AutoencoderConfig
from zimage_core.errors import BadArgument, BadShape, printable
from zimage_core.models.ported import Network
from zimage_core.models.vae_blocks import Decoder, Encoder
from zimage_core.models.vae_tiles import TILE, decode_tiled, encode_tiled


def _layout(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_cuda else torch.channels_last


class Autoencoder(Network):
    """Flux-style variational autoencoder.

    Latents here are the VAE's own; the transformer sees (z - shift_factor) * scaling_factor, which the
    pipeline computes. If `tile` is set, `decode` and `encode` use tiles with sides of that many latents,
    which takes less memory; the result is the same up to rounding, see `vae_tiles`.
    """

    loader = "load_vae"
    tile: int | None = None

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the convolutions."""
        return self.decoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.decoder.conv_in.weight.device

    def enable_tiling(self, use_tiling: bool = True, tile: int | None = None) -> None:
        """Decode in tiles, which takes less than half the memory at 1024 x 1024.

        The image is the same up to rounding: single 8-bit values may differ by 1.

        Args:
            use_tiling: False is `disable_tiling`.
            tile: Side of a tile in latents of 8 pixels. Default: 32.

        Raises:
            BadArgument: tile is no whole number, or is less than 1.
        """
        if tile is not None and (type(tile) is not int or not 1 <= tile <= 1 << 20):
            raise BadArgument(f"tile: got {printable(repr(tile), 60)}, wanted an integer from 1 to {1 << 20}")
        self.tile = (TILE if tile is None else tile) if use_tiling else None

    def disable_tiling(self) -> None:
        """Decode whole images again."""
        self.tile = None

    def enable_slicing(self) -> None:
        """For code written for diffusers: does nothing, the pipeline decodes images one by one."""

    def disable_slicing(self) -> None:
        """For code written for diffusers: does nothing."""

    def moments(
        self, x: Tensor, tile: int | None = None, keep: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B, 3, H, W] in [-1, 1] -> mean and log-variance [B, latent_channels, H / 8, W / 8].

        Args:
            x: Images.
            tile: Side of a tile in latents, instead of the attribute `tile`.
            keep: Device of the maps of the whole image, if there are tiles; see `vae_tiles.encode_tiled`.

        Raises:
            BadShape: H or W is not a multiple of the spatial factor.
        """
        factor = self.config.spatial_factor
        if x.ndim != 4 or x.shape[1] != self.config.in_channels or x.shape[2] % factor or x.shape[3] % factor:
            raise BadShape(
                f"VAE encode: got an image of {tuple(x.shape)}, wanted [B, {self.config.in_channels}, H, W] "
                f"with H and W multiples of {factor}"
            )
        x = x.to(self.dtype).contiguous(memory_format=_layout(x))
        tile = tile or self.tile
        out: Tensor = self.encoder(x) if tile is None else encode_tiled(self.encoder, x, tile, keep)
        mean, logvar = out.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, x: Tensor, generator: torch.Generator | None = None, return_dict: bool = True) -> Any:
        """x [B, 3, H, W] in [-1, 1] -> z [B, latent_channels, H / 8, W / 8], not scaled.

        z is the mode of the posterior; with a generator, one sample of it. The tensor also has the attribute
        `latent_dist`, the whole posterior, for code written for diffusers.

        Args:
            x: Images.
            generator: Generator of the sample.
            return_dict: False returns (posterior,), as in diffusers.

        Raises:
            BadShape: H or W is not a multiple of the spatial factor.
        """
        posterior = Posterior(*self.moments(x))
        if not return_dict:
            return (posterior,)
        z = posterior.mode() if generator is None else posterior.sample(generator)
        z = z.view_as(z)  # an attribute of a tensor must not hold that tensor
        z.latent_dist = posterior  # type: ignore[attr-defined]
        return z

    def decode(
        self,
        z: Tensor,
        tile: int | None = None,
        keep: torch.device | None = None,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        strip: Any = None,
    ) -> Any:
        """z [B, latent_channels, h, w], not scaled -> image [B, 3, 8 h, 8 w] about [-1, 1], not clamped.

        The tensor also has the attribute `sample`, the same image, for code written for diffusers.

        Args:
            z: Latents.
            tile: Side of a tile in latents, instead of the attribute `tile`.
            keep: Device of the maps of the whole image, if there are tiles; see `vae_tiles.decode_tiled`.
            return_dict: False returns (image,), as in diffusers.
            generator: Has no effect, as in diffusers.
            strip: The rows that this rank computes, where several share the image; see `parallel.vae`.

        Raises:
            BadShape: z has another shape.
            BadArgument: tile is a bool, which is diffusers' `return_dict`; give that by its name.
        """
        if isinstance(tile, bool):
            raise BadArgument(f"tile: got {tile}, wanted a number of latents; give return_dict by its name")
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            raise BadShape(
                f"VAE decode: got {tuple(z.shape)}, wanted latents [B, {self.config.latent_channels}, h, w]"
            )
        z = z.to(self.dtype).contiguous(memory_format=_layout(z))
        tile = tile or self.tile
        if tile is None and strip is None:
            out: Tensor = self.decoder(z)
        else:
            out = decode_tiled(self.decoder, z, tile or TILE, keep, strip)
        if not return_dict:
            return (out,)
        image = out.view_as(out)  # with an attribute that holds itself a tensor would never be freed
        image.sample = out  # type: ignore[attr-defined]
        return image

    forward = decode


class Posterior:
    """A Gaussian over latents, with the methods of diffusers' DiagonalGaussianDistribution.

    Args:
        mean: Mean [B, latent_channels, h, w].
        logvar: Log-variance of the same shape.
    """

    def __init__(self, mean: Tensor, logvar: Tensor) -> None:
        self.mean, self.logvar = mean, logvar

    @property
    def std(self) -> Tensor:
        """Standard deviation."""
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        """Variance."""
        return torch.exp(self.logvar)

    def mode(self) -> Tensor:
        """The most likely latents: the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Latents drawn from the posterior, by torch's global generator if none is given."""
        mean, device = self.mean, self.mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype)
        return mean + self.std * noise.to(mean.device)
