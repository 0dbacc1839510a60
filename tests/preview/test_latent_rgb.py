"""The linear map from latents to colours."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import tiny
from zimage_core import ZImagePipeline
from zimage_core.config import AutoencoderConfig
from zimage_core.errors import BadShape, Unsupported
from zimage_core.preview import Preview, latent_rgb


def test_flux_has_the_published_factors():
    assert latent_rgb.is_flux(AutoencoderConfig())
    assert latent_rgb.is_flux(None)
    assert not latent_rgb.is_flux(tiny.vae().config)
    colours = latent_rgb.published()
    z = torch.zeros(1, 16, 2, 3)
    z[0, 4, 1, 2] = 2.0
    got = colours(z)
    assert got.shape == (1, 3, 2, 3)
    assert got[0, :, 0, 0].tolist() == pytest.approx([-0.0329, -0.0718, -0.0851])
    assert got[0, :, 1, 2].tolist() == pytest.approx(
        [2 * 0.0859 - 0.0329, 2 * 0.0721 - 0.0718, 2 * 0.0329 - 0.0851]
    )


def test_a_map_is_fitted_to_the_embedded_vae_and_tells_colours():
    pipe = ZImagePipeline.from_default()
    look = Preview(pipe)
    found = {}
    for name, rgb in {
        "red": (1, -1, -1),
        "blue": (-1, -1, 1),
        "white": (1, 1, 1),
        "black": (-1, -1, -1),
    }.items():
        image = torch.tensor(rgb, dtype=torch.float32)[None, :, None, None].expand(1, 3, 48, 64).contiguous()
        config = pipe.vae.config
        z = (pipe.vae.encode(image) - config.shift_factor) * config.scaling_factor
        made = look(z)
        assert made.size == (64, 48)
        found[name] = np.asarray(made)[8:-8, 8:-8].reshape(-1, 3).mean(0) / 127.5 - 1
        # a linear map of this VAE's latents is rough; the nearest of the four must be the right one
    wanted = {"red": (1, -1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1), "black": (-1, -1, -1)}
    for name, colour in found.items():
        assert min(wanted, key=lambda other: np.linalg.norm(colour - wanted[other])) == name
    torch.manual_seed(0)
    before = torch.get_rng_state()
    again = Preview(pipe)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(again._map, look._map, strict=True))


def test_wrong_latents_and_models_without_colours_are_refused():
    pipe = tiny.pipeline()
    look = Preview(pipe)
    with pytest.raises(BadShape, match=r"preview: got \(1, 4, 2, 2\), wanted latents \[B, 16, h, w\]"):
        look(torch.zeros(1, 4, 2, 2))
    pipe.vae = None
    assert Preview(pipe)(torch.zeros(16, 2, 2)).size == (16, 16)
    pipe.transformer.config = type(pipe.transformer.config)(
        **vars(pipe.transformer.config) | {"in_channels": 8}
    )
    with pytest.raises(Unsupported, match="latents of 8 channels without a VAE"):
        Preview(pipe)
