"""The VAE's encoder: in tiles it is the whole one, and it takes no more memory than decoding."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers import tiny
from tests.helpers.live_bytes import LiveBytes, on_meta
from zimage_core.config import AutoencoderConfig
from zimage_core.errors import NonFinite, OutOfMemory
from zimage_core.memory.activations import decode_bytes, given_bytes
from zimage_core.models.autoencoder import Autoencoder

SMALL = AutoencoderConfig(block_out_channels=(8, 8, 16, 24), layers_per_block=2, norm_num_groups=4)
CLOSE = 2e-5
"""Largest difference of float32 moments about 1, by another order of sums."""


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    made = Autoencoder(SMALL).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.1 + (1.0 if "norm" in name and "weight" in name else 0.0))
    return made


@torch.no_grad()
@pytest.mark.parametrize(
    ("h", "w", "tile"), [(6, 10, 4), (5, 7, 3), (9, 4, 4), (8, 8, 2), (3, 3, 3), (2, 11, 1)]
)
def test_tiles_are_the_whole_encoder(vae, h, w, tile):
    x = torch.rand(2, 3, 8 * h, 8 * w) * 2 - 1
    whole, tiled = vae.moments(x), vae.moments(x, tile)
    for a, b in zip(whole, tiled, strict=True):
        assert a.shape == b.shape == (2, 16, h, w)
        assert float((a - b).abs().max()) <= CLOSE * float(a.abs().max().clamp(min=1))
    assert torch.equal(vae.moments(x, tile, torch.device("cpu"))[0], tiled[0])


@torch.no_grad()
def test_the_attribute_tile_is_used(vae):
    x = torch.rand(1, 3, 48, 80)
    whole = vae.moments(x)[0]
    try:
        vae.enable_tiling(tile=4)
        assert not torch.equal(vae.moments(x)[0], whole), "it was not encoded in tiles"
    finally:
        vae.disable_tiling()


REAL, NANO = AutoencoderConfig(), AutoencoderConfig(block_out_channels=(32, 32, 64, 64), norm_num_groups=8)


def peak(config, rows, cols, tile, keep=None):
    with FakeTensorMode():  # shapes only: nothing is computed
        made = Autoencoder(config).requires_grad_(False)
        live = LiveBytes(without="meta")
        live.ignore(*made.parameters())
        with live:
            made.moments(torch.empty(1, 3, 8 * rows, 8 * cols), tile, keep)
    return live.peak


@pytest.mark.parametrize(
    ("config", "rows", "cols", "tile"),
    [(REAL, 16, 24, None), (REAL, 33, 40, 20), (NANO, 50, 40, None), (NANO, 50, 40, 20)],
)
def test_an_encode_takes_no_more_than_is_planned_for_the_decode(config, rows, cols, tile):
    planned = decode_bytes(config, rows, cols, tile) + given_bytes(config, rows, cols)
    assert 0.6 * planned <= peak(config, rows, cols, tile) <= planned


def test_the_encoders_weights_take_no_more_than_the_decoders():
    vae = on_meta(lambda: Autoencoder(AutoencoderConfig()), torch.float32)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (vae.encoder, vae.decoder)]
    assert sizes[0] < sizes[1]


class Small(Autoencoder):
    """Has memory to encode tiles of `limit` latents a side, whole images included."""

    limit, calls = 0, ()

    def moments(self, x, tile=None, keep=None):
        self.calls = (*self.calls, (tile, keep and keep.type))
        if (tile or self.tile or max(x.shape[2:]) // 8) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has 8 GiB.")
        return super().moments(x, tile, keep)


def small(limit):
    pipe = tiny.pipeline()
    pipe.vae.__class__ = Small
    pipe.vae.limit = limit
    return pipe


def run(pipe):
    image = torch.rand(3, 320, 320, generator=torch.Generator().manual_seed(0))
    return pipe("a", image=image, num_inference_steps=1, strength=1.0, seed=1, output_type="latent",
                mask_image=torch.eye(320))  # fmt: skip


def test_an_image_too_large_is_encoded_in_smaller_tiles():
    pipe = small(16)
    with pytest.warns(UserWarning, match="no memory to encode an image of 320 x 320") as seen:
        found = run(pipe).images
    (warning,) = [each for each in seen if "memory" in str(each.message)]
    assert warning.filename == __file__, "the warning does not point at the caller"
    assert pipe.vae.calls == ((None, None), (32, None), (16, None))
    assert float((found - run(tiny.pipeline()).images).abs().max()) <= 2e-3  # the network enlarges it
    assert pipe.vae.tile is None, "the setting of the user has changed"


def test_when_no_tile_fits_it_is_said_and_the_pipeline_is_as_before():
    pipe = small(0)
    with (
        pytest.warns(UserWarning, match="smaller tiles"),
        pytest.raises(OutOfMemory, match="no memory to encode an image of 320") as error,
    ):
        run(pipe)
    assert error.value.latents is None
    pipe.vae.limit = 99
    assert torch.equal(run(pipe).images, run(tiny.pipeline()).images)


def test_a_bad_number_in_the_encoder_is_named():
    pipe = tiny.pipeline()
    with torch.no_grad():
        pipe.vae.encoder.down_blocks[1].resnets[0].conv1.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFinite, match=r"VAE.*encoder\.down_blocks\.1"):
        run(pipe)
