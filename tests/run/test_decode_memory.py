"""Out of memory in the VAE: smaller tiles, one warning, and never the loss of what was denoised."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.helpers import tiny
from zimage_core.errors import BadArgument, NonFinite, OutOfMemory, ZImageError
from zimage_core.models import vae_tiles
from zimage_core.models.autoencoder import Autoencoder

SIZE = 320  # pixels: 40 latents a side


class Small(Autoencoder):
    """Has memory for tiles of `limit` latents a side, whole images included."""

    limit = 0
    maps_fit = True

    def decode(self, z, tile=None, keep=None):
        self.calls.append((tile, keep and keep.type))
        used = tile or self.tile or max(z.shape[2:])
        if used > self.limit or (keep is None and not self.maps_fit):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has 8 GiB.")
        return super().decode(z, tile, keep)


def pipeline(limit, maps_fit=True):
    pipe = tiny.pipeline()
    pipe.vae.__class__ = Small
    pipe.vae.limit, pipe.vae.maps_fit, pipe.vae.calls = limit, maps_fit, []
    return pipe


def run(pipe, **options):
    return pipe("a", SIZE, SIZE, num_inference_steps=1, seed=1, output_type="pt", **options).images


@pytest.fixture(scope="module")
def whole():
    return run(tiny.pipeline())


@pytest.mark.parametrize(("limit", "last"), [(32, 32), (16, 16)])
def test_a_image_too_large_is_decoded_in_smaller_tiles_and_is_the_same(whole, limit, last):
    pipe = pipeline(limit)
    with pytest.warns(UserWarning, match=r"no memory to decode an image of 320 x 320.*smaller tiles") as seen:
        image = run(pipe)
    assert len(seen) == 1
    assert seen[0].filename == __file__, "the warning does not point at the caller"
    assert pipe.vae.calls[-1] == (last, None)
    assert float((image - whole).abs().max()) <= 1e-4
    assert pipe.vae.tile is None, "the setting of the user has changed"


def test_maps_go_to_the_cpu_when_no_tile_is_small_enough(whole):
    pipe = pipeline(40, maps_fit=False)
    with pytest.warns(UserWarning, match="smaller tiles"):
        image = run(pipe)
    assert pipe.vae.calls == [(None, None), (32, None), (16, None), (16, "cpu")]
    assert float((image - whole).abs().max()) <= 1e-4


def test_later_images_of_the_batch_start_where_the_first_succeeded():
    pipe = pipeline(16)
    with pytest.warns(UserWarning, match="smaller tiles") as seen:
        assert len(run(pipe, num_images_per_prompt=2)) == 2
    assert len(seen) == 1
    assert [tile for tile, _ in pipe.vae.calls] == [None, 32, 16, 16]


def test_latents_survive_when_nothing_fits(whole):
    pipe = pipeline(0)
    with (
        pytest.warns(UserWarning, match="smaller tiles"),
        pytest.raises(OutOfMemory, match=r"error\.latents") as caught,
    ):
        run(pipe)
    error = caught.value
    assert isinstance(error, ZImageError)
    assert "CUDA out of memory" in str(error)
    assert "\n" not in str(error)
    assert error.__context__ is None, "the first error holds frames, and they hold memory"
    same = tiny.pipeline()("a", SIZE, SIZE, num_inference_steps=1, seed=1, output_type="latent").images
    assert torch.equal(error.latents, same)
    # what the message says to do
    pipe.vae.limit = 1000
    config = pipe.vae.config
    image = pipe.vae.decode(error.latents / config.scaling_factor + config.shift_factor)
    assert torch.equal((image / 2 + 0.5).clamp(0, 1), whole)
    assert run(pipe).shape == whole.shape, "the pipeline is still busy"


def test_tiling_is_switched_on_and_off(whole):
    pipe = pipeline(vae_tiles.TILE)
    pipe.enable_vae_tiling()
    assert pipe.vae.tile == vae_tiles.TILE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float((run(pipe) - whole).abs().max()) <= 1e-4
    pipe.enable_vae_tiling(16)
    assert pipe.vae.tile == 16
    pipe.disable_vae_tiling()
    assert pipe.vae.tile is None
    pipe.enable_vae_slicing()


@pytest.mark.parametrize("tile", [0, -1, 1.5, "much", True])
def test_a_tile_that_is_none_is_refused(tile):
    pipe = tiny.pipeline()
    with pytest.raises(BadArgument, match="tile"):
        pipe.enable_vae_tiling(tile)
    assert pipe.vae.tile is None


def test_a_bad_weight_is_named_in_tiles_too():
    for name in (
        "up_blocks.3.resnets.1.norm2.weight",
        "up_blocks.1.upsamplers.0.conv.bias",
        "conv_norm_out.bias",
    ):
        pipe = tiny.pipeline()
        pipe.enable_vae_tiling(16)
        pipe.vae.decoder.get_parameter(name).data[0] = float("nan")
        with pytest.raises(NonFinite, match=f"weight decoder.{name} holds NaN"):
            run(pipe)
