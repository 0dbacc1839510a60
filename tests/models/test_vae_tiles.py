"""The decoder in tiles equals the whole decoder up to rounding, and needs the predicted memory."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers import tiny
from tests.helpers.live_bytes import LiveBytes
from zimage_core.config import AutoencoderConfig
from zimage_core.memory.activations import decode_bytes
from zimage_core.models import autoencoder, vae_tiles
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.vae_tiles import layout
from zimage_core.pipeline import ZImagePipeline
from zimage_core.run.decode import DecodeWay, ways_to_decode

# Same float32 sums in another order. The tiny VAE's random weights give values about 5; measured 2e-5. The
# trained one's are about 1; measured 1.6e-4, nearly all of it torch's own GroupNorm (see the float64 test).
CLOSE = 1e-4
SEEN = 1 / 255  # half of one of 256 levels, on [-1, 1]
SIDES = st.integers(1, 40)


@pytest.fixture(scope="module")
def vae():
    return tiny.vae()


@pytest.fixture(scope="module")
def nano():
    return ZImagePipeline.from_default().vae


def latents(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(SIDES, SIDES, st.integers(1, 45))
def test_each_place_is_new_in_exactly_one_tile_and_all_tiles_have_one_size(h, w, tile):
    tiles = layout(h, w, tile)
    count = torch.zeros(h, w)
    for t in tiles:
        assert 0 <= t.top < t.bottom <= h, (h, w, tile, t)
        assert 0 <= t.left < t.right <= w, (h, w, tile, t)
        rows, columns = t.new
        assert t.top <= rows.start < rows.stop == t.bottom, (h, w, tile, t)
        assert t.left <= columns.start < columns.stop == t.right, (h, w, tile, t)
        count[rows, columns] += 1
    assert bool((count == 1).all()), (h, w, tile)
    assert len({(t.bottom - t.top, t.right - t.left) for t in tiles}) == 1
    assert max(tiles[0].bottom, tiles[0].right) <= tile
    assert len(tiles) == -(-h // tile) * -(-w // tile), "more tiles than needed"


@pytest.mark.parametrize(
    ("h", "w", "tile"),
    [(1, 1, 16), (1, 19, 16), (19, 1, 4), (2, 3, 1), (5, 7, 3), (16, 16, 16), (17, 16, 16), (33, 20, 16)],
)
def test_tiles_are_the_whole_decoder(vae, h, w, tile):
    z = latents(1, 16, h, w)
    whole, tiled = vae.decode(z), vae.decode(z, tile)
    assert tiled.shape == whole.shape == (1, 3, 8 * h, 8 * w)
    assert float((whole - tiled).abs().max()) <= CLOSE


@given(st.integers(1, 14), st.integers(1, 14), st.integers(2, 9), st.integers(0, 1000))
def test_any_size_and_tile(h, w, tile, seed):
    vae, z = tiny.vae(seed), latents(1, 16, h, w, seed=seed)
    error = float((vae.decode(z) - vae.decode(z, tile)).abs().max())
    assert error <= CLOSE, (h, w, tile, seed, error)


@pytest.mark.parametrize("widths", [(8,), (8, 16), (16, 16, 16), (16, 8, 8), (8, 16, 8, 8, 16)], ids=str)
def test_any_number_of_blocks_and_any_widths(widths):
    config = AutoencoderConfig(block_out_channels=widths, norm_num_groups=4, layers_per_block=1)
    vae = tiny._randomised(Autoencoder(config), 5, 0.15)
    z = latents(1, 16, 7, 5)
    assert float((vae.decode(z) - vae.decode(z, 3)).abs().max()) <= CLOSE


def test_a_batch_is_its_images_to_the_bit(vae):
    z = latents(2, 16, 9, 12)
    both = vae.decode(z, 5)
    assert torch.equal(both, torch.cat([vae.decode(z[:1], 5), vae.decode(z[1:], 5)]))
    assert float((both - vae.decode(z)).abs().max()) <= CLOSE


def test_latents_are_not_changed(vae):
    z = latents(1, 16, 6, 6).contiguous(memory_format=torch.channels_last)
    before = z.clone()
    vae.decode(z, 3)
    assert torch.equal(z, before)


def test_the_attribute_tile_is_used_and_one_tile_is_the_whole_decoder(vae):
    z = latents(1, 16, 9, 9)
    whole = vae.decode(z)
    other = copy.copy(vae)
    other.tile = 16
    assert torch.equal(other.decode(z), whole)
    other.tile = 4
    assert torch.equal(other.decode(z), vae.decode(z, 4))
    assert not torch.equal(other.decode(z), whole), "it was not decoded in tiles"
    assert vae.tile is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_as_near_to_float64_as_the_whole_decoder(vae, dtype):
    z = latents(1, 16, 20, 13).to(dtype)
    low = tiny.vae().to(dtype)
    exact = tiny.vae().double().decode(z)
    whole, tiled = ((low.decode(z, tile).double() - exact).abs().max() for tile in (None, 8))
    assert low.decode(z, 8).dtype == dtype
    # the rule of tolerances: twice plain torch's error and one rounding of a value below 8
    assert float(tiled) <= 2 * float(whole) + 4 * torch.finfo(dtype).eps


def test_a_trained_decoder_in_tiles_is_nearer_to_float64_than_whole(nano):
    """Torch's GroupNorm on a CPU sums squares in float32; here each tile's variance is about its own mean."""
    z = latents(1, 16, 32, 24) * 2
    exact = copy.deepcopy(nano).double().decode(z)
    whole, tiled = (float((nano.decode(z, tile) - exact).abs().max()) for tile in (None, 16))
    assert tiled <= 1e-4  # a hundredth of an 8-bit level; 5e-6 found, with AVX2 and without
    assert tiled <= whole


def gradient(h, w):
    """Smooth latents, on which a seam would show most."""
    slope = latents(16, 2)
    y, x = torch.linspace(-1, 1, h)[:, None], torch.linspace(-1, 1, w)
    return (slope[:, :1, None] * y + slope[:, 1:, None] * x)[None] * 2


def seam(image, at):
    """Mean bend (second difference) of the rows at seams over that of all rows."""
    bend = (image[..., 2:, :] - 2 * image[..., 1:-1, :] + image[..., :-2, :]).abs().mean((0, 1, 3))
    rows = torch.tensor(at)
    return float(torch.cat([bend[rows - 2], bend[rows - 1]]).mean() / bend.mean())


def test_a_gradient_has_no_line_between_tiles(nano):
    z = gradient(48, 40)
    whole, tiled = nano.decode(z), nano.decode(z, 16)
    assert float((whole - tiled).abs().max()) < SEEN / 10
    at = [8 * 16, 8 * 32]
    assert seam(tiled, at) == pytest.approx(seam(whole, at), rel=1e-2)
    naive = torch.cat([nano.decode(z[:, :, i : i + 16]) for i in (0, 16, 32)], 2)
    assert seam(naive, at) > 2 * seam(whole, at), "this measure sees no seam at all"


def test_a_bad_weight_is_seen_by_hooks_in_tiles_too(vae):
    seen = []
    handles = [m.register_forward_hook(lambda m, *_: seen.append(m)) for m in vae.decoder.modules()]
    try:
        vae.decode(latents(1, 16, 4, 4), 2)
    finally:
        for handle in handles:
            handle.remove()
    for name, module in vae.decoder.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            assert module in seen, name


REAL = AutoencoderConfig()
NANO = AutoencoderConfig(block_out_channels=(32, 32, 64, 64))


def peak(config, h, w, tile, keep=None):
    with FakeTensorMode():  # shapes only: nothing is computed
        vae = Autoencoder(config).requires_grad_(False)
        live = LiveBytes(without="meta")
        live.ignore(*vae.parameters())
        with live:
            z = torch.empty(1, config.latent_channels, h, w)
            vae.decode(z, tile, keep)
    return live.peak


@pytest.mark.parametrize(
    ("config", "h", "w", "tile"),
    [
        *((REAL, 128, 128, tile) for tile in (None, 64, 48)),
        *((REAL, 33, 70, tile) for tile in (None, 70, 32)),
        *((NANO, 50, 40, tile) for tile in (None, 64, 32)),
        *((AutoencoderConfig(block_out_channels=(32, 64, 64)), 21, 90, tile) for tile in (None, 30)),
    ],
)
def test_the_peak_is_as_foretold(config, h, w, tile):
    assert peak(config, h, w, tile) == pytest.approx(decode_bytes(config, h, w, tile), rel=0.01)


@pytest.mark.parametrize(
    ("config", "h", "w", "tile"), [(REAL, 64, 64, 32), (REAL, 33, 70, 24), (NANO, 50, 40, 20)]
)
def test_the_peak_is_as_foretold_with_maps_kept_elsewhere(config, h, w, tile):
    """The meta device plays the other one: it is not counted, and an operation on both would be refused."""
    foretold = decode_bytes(config, h, w, tile, apart=True)
    assert peak(config, h, w, tile, torch.device("meta")) == pytest.approx(foretold, rel=0.01)


def test_tiles_take_less_than_half_of_the_whole_at_1024_and_little_with_maps_elsewhere():
    whole, tiled, apart = (decode_bytes(REAL, 128, 128, *way) for way in ((None,), (32,), (32, True)))
    assert tiled < whole / 2
    assert apart < whole / 10


@pytest.mark.parametrize(
    ("tile", "sizes"),
    [(None, [64, 32, 16, 16]), (48, [32, 16, 16]), (16, [16]), (8, [8]), (999, [64, 32, 16, 16])],
)
def test_after_a_failure_tiles_are_halved_and_the_last_keeps_maps_on_the_cpu(tile, sizes):
    first, *rest = ways_to_decode(100, 128, tile)
    assert first == DecodeWay()
    assert [way.tile for way in rest] == sizes
    assert [way.keep for way in rest] == [None] * (len(rest) - 1) + [torch.device("cpu")]


def test_maps_kept_elsewhere_give_the_same_bits(vae, monkeypatch):
    """Without a GPU only the way through `keep` can be tested: every map is made there."""
    z = latents(1, 16, 9, 9)
    made = []
    original = vae_tiles._Map.empty

    def empty(self, channels):
        made.append(self.data.device)
        return original(self, channels)

    monkeypatch.setattr(vae_tiles._Map, "empty", empty)
    assert torch.equal(vae.decode(z, 4), vae.decode(z, 4, torch.device("cpu")))
    assert made


@pytest.mark.parametrize("tile", [None, 4])
def test_the_layout_of_a_gpu_gives_the_same_image_and_is_kept(vae, monkeypatch, tile):
    z, seen = latents(1, 16, 9, 12), []
    want = vae.decode(z, tile)
    monkeypatch.setattr(autoencoder, "_layout", lambda x: torch.contiguous_format)
    convs = [module for module in vae.decoder.modules() if isinstance(module, torch.nn.Conv2d)]
    hooks = [
        conv.register_forward_pre_hook(lambda conv, x: seen.append(x[0].is_contiguous())) for conv in convs
    ]
    try:
        got = vae.decode(z, tile)
    finally:
        [hook.remove() for hook in hooks]
    assert float((got - want).abs().max()) <= CLOSE
    assert tile or all(seen), "a map changed its layout between two convolutions"
    moments = [vae.moments(latents(1, 3, 16, 24))]
    monkeypatch.undo()
    moments.append(vae.moments(latents(1, 3, 16, 24)))
    for gpu, cpu in zip(*moments, strict=True):
        assert float((gpu - cpu).abs().max()) <= CLOSE
