"""A linear map from latents to the mean colour of their pixels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from zimage_core.config import AutoencoderConfig
from zimage_core.models.autoencoder import Autoencoder

FLUX = (
    (-0.0346, 0.0244, 0.0681), (0.0034, 0.021, 0.0687), (0.0275, -0.0668, -0.0433),
    (-0.0174, 0.016, 0.0617), (0.0859, 0.0721, 0.0329), (0.0004, 0.0383, 0.0115),
    (0.0405, 0.0861, 0.0915), (-0.0236, -0.0185, -0.0259), (-0.0245, 0.025, 0.118),
    (0.1008, 0.0755, -0.0421), (-0.0515, 0.0201, 0.0011), (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749), (-0.1264, -0.0522, -0.1103), (-0.028, -0.0881, -0.0499),
    (-0.1262, -0.0982, -0.0778),
)  # fmt: skip
"""Red, green and blue in [-1, 1] that each channel of a latent of FLUX.1's VAE adds; those of ComfyUI."""
FLUX_BIAS = (-0.0329, -0.0718, -0.0851)
SAMPLES, SIDE = 48, 64
"""Images that a map is fitted to, and their pixels a side: 3,072 latents for 145 unknowns a colour."""


class ColourMap(NamedTuple):
    """A linear map from latents to colours in [-1, 1].

    Args:
        weight: [3, C, k, k]: each colour follows from a latent (k = 1) or from it and its neighbours (k = 3).
        bias: [3].
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents of the transformer [B, C, h, w] -> colours [B, 3, h, w] float32 on the CPU."""
        reach = self.weight.shape[-1] // 2
        z = functional.pad(latents.float().cpu(), (reach,) * 4, mode="replicate")
        return functional.conv2d(z, self.weight, self.bias)


def is_flux(config: AutoencoderConfig | None) -> bool:
    """Whether a VAE of this config has FLUX.1's latents; so has a pipeline without one."""
    return config is None or config == AutoencoderConfig()


def published() -> ColourMap:
    """The map of FLUX.1's VAE."""
    return ColourMap(torch.tensor(FLUX).T[:, :, None, None].contiguous(), torch.tensor(FLUX_BIAS))


def fitted(vae: Autoencoder) -> ColourMap:
    """The map of another VAE by least squares: it encodes images, whose mean colours the map has to give.

    The images are drawn from a generator of their own, so a VAE always gets the same map.
    """
    config, images = vae.config, _images(torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = torch.cat([vae.moments(images[i : i + 8].to(vae.device))[0].cpu() for i in range(0, SAMPLES, 8)])
    z = (z.float() - config.shift_factor) * config.scaling_factor
    x = functional.unfold(functional.pad(z, (1, 1, 1, 1), mode="replicate"), 3).transpose(1, 2).flatten(0, 1)
    x = torch.cat((x, torch.ones_like(x[:, :1])), dim=1).double()
    y = functional.avg_pool2d(images, config.spatial_factor).flatten(2).transpose(1, 2).flatten(0, 1).double()
    # ridge regression: where the images tell little, the weights are small
    ridge = torch.eye(x.shape[1], dtype=torch.float64)
    found = torch.linalg.solve(x.T @ x + ridge, x.T @ y).float()
    return ColourMap(found[:-1].T.reshape(3, -1, 3, 3).contiguous(), found[-1])


def _images(generator: torch.Generator) -> Tensor:
    """[SAMPLES, 3, SIDE, SIDE] in [-1, 1]: coloured rectangles on coloured grounds, and checks of colours."""
    grounds = torch.rand(SAMPLES, 3, 1, 1, generator=generator).round().expand(-1, -1, SIDE, SIDE).clone()
    for image in grounds:
        (top, bottom), (left, right) = (
            torch.randint(0, SIDE, (2, 2), generator=generator).sort().values.tolist()
        )
        image[:, top:bottom, left:right] = torch.rand(3, 1, 1, generator=generator).round()
    checks = torch.rand(SAMPLES // 3, 3, 3, 3, generator=generator)
    grounds[: len(checks)] = functional.interpolate(checks, (SIDE, SIDE))
    return grounds * 2 - 1
