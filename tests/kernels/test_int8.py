"""Defends: rows are quantised to the integers of the reference, and multiplied to its bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_core.formats import FORMATS
from zimage_core.kernels import int8, tiles
from zimage_core.kernels.decode.table import DECODERS
from zimage_core.reference import int8 as reference
from zimage_core.reference.dequantize import dequantize
from zimage_core.reference.encode import random_blocks

# NumPy, the arithmetic of the interpreter, warns of planted infinities and NaN
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

ROTATED = 4e-6
"""Bound on the error of a rotated number over its row's largest: four sums of four, some roundings each."""


def on(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array).to(device) for array in arrays]


def drawn(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def assert_rows(got: tuple[torch.Tensor, torch.Tensor], x: np.ndarray, group: int = 0) -> None:
    """Without a rotation every bit; with one, integers may differ where a number is halfway between two."""
    values, scale = got[0].cpu().numpy(), got[1].cpu().numpy()
    wanted, wanted_scale = reference.quantize_rows(x, group)
    if group:
        np.testing.assert_allclose(scale, wanted_scale, rtol=ROTATED)
        exact = reference.rotate(x, group).astype(np.float64) / wanted_scale[:, None]
        off = values != wanted
        assert np.all(np.abs(np.abs(exact[off] - np.floor(exact[off])) - 0.5) < 127 * ROTATED)
    else:
        np.testing.assert_array_equal(values, wanted)
        np.testing.assert_array_equal(scale, wanted_scale)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 4),
    width=st.sampled_from([1, 16, 40, 256, 1280]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    magnitude=st.sampled_from([1e-4, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_rows_have_the_bits_of_the_reference(rows, width, dtype, magnitude, seed, device):
    x = torch.from_numpy(drawn(rows, width, seed) * np.float32(magnitude)).to(dtype)
    assert_rows(int8.quantize_rows(x.to(device)), x.float().numpy())


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_rows_are_rotated_as_in_the_reference(group, device):
    x = drawn(2, 768)
    assert_rows(int8.quantize_rows(*on(device, x), group), x, group)


def test_the_widest_rows_of_the_network_take_two_tiles(device):
    assert int8.row_tiles(10240) == (8192, 2048)
    assert int8.row_tiles(3840) == (4096, 0)
    x = drawn(1, 10240)
    assert_rows(int8.quantize_rows(*on(device, x), 256), x, 256)


@given(size=st.integers(1, int8.LARGEST_ROW))
def test_tiles_hold_every_row(size):
    head, tail = int8.row_tiles(size)
    assert head + tail >= size
    assert head + tail < max(2 * size, 17)


def test_rows_may_lie_anyhow(device):
    x = drawn(8, 12 * 4)
    wide = on(device, x)[0]
    assert_rows(int8.quantize_rows(wide[1::2, :40]), x[1::2, :40])
    assert_rows(int8.quantize_rows(wide.t()), x.T)
    assert [len(part) for part in int8.quantize_rows(wide[:0])] == [0, 0]


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_seen_in_the_scale_of_its_row(bad, group, device):
    x = drawn(3, 32)
    x[1, 5] = bad
    scale = int8.quantize_rows(*on(device, x), group)[1].cpu()
    assert scale.isfinite().tolist() == [True, False, True]


def test_rows_of_zeros_and_of_the_least_numbers_have_finite_scales(device):
    x = np.zeros((3, 32), np.float32)
    x[1, 3], x[2] = 2.0**-149, 3e38
    assert_rows(int8.quantize_rows(*on(device, x)), x)


@pytest.mark.parametrize("name", DECODERS)
def test_packed_rows_are_their_dequantised_rows_quantised(name, device):
    fmt = FORMATS[name]
    packed = random_blocks(fmt, (2, 768), np.random.default_rng(0))
    for group in (0, 64) if name in ("Q4_K", "Q8_0") else (0,):
        values = torch.full((2, 768), 99, dtype=torch.int8, device=device)
        scale = torch.zeros(2, device=device)
        int8.requantize_into(values, scale, *on(device, packed), fmt, group)
        assert_rows((values, scale), dequantize(packed, name), group)


def whole(rows: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-127, 128, (rows, width), dtype=np.int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("count", "rows", "width"), [(1, 1, 16), (5, 37, 48), (70, 130, 288), (129, 65, 80)])
def test_the_product_has_the_bits_of_the_reference(count, rows, width, bias, dtype, device):
    x, w = whole(count, width, 0), whole(rows, width, 1)
    x_scale, w_scale = (np.abs(drawn(1, n, n)[0]) / 1e3 for n in (count, rows))
    add = drawn(1, rows, 2)[0] if bias else None
    wanted = reference.product(x, x_scale, w, w_scale, add)
    tensors = on(device, x, x_scale, w, w_scale)
    got = int8.matmul(*tensors, None if add is None else on(device, add)[0], dtype)
    assert torch.equal(got.cpu(), torch.from_numpy(wanted).to(dtype))


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_120", "gfx942", "gfx1100"])
def test_every_tile_gives_the_same_integers(arch, device, monkeypatch):
    if device.type == "cuda":
        pytest.skip("the tiles of another GPU")
    x, w = whole(35, 176, 0), whole(33, 176, 1)
    ones = [np.ones(n, np.float32) for n in (35, 33)]
    wanted = reference.product(x, ones[0], w, ones[1])
    for tile in tiles.int8_tiles(arch):
        monkeypatch.setattr(tiles, "int8", lambda *_, tile=tile: tile)
        got = int8.matmul(*on(device, x, ones[0], w, ones[1]), None, torch.float32)
        np.testing.assert_array_equal(got.numpy(), wanted)


def test_sums_beyond_24_bits_are_exact(device):
    """10240 products of 127 * 127 need 28 bits: as float32 sums they would miss the last number's part."""
    x, w = np.full((1, 10240), 127, np.int8), np.full((2, 10240), 127, np.int8)
    w[1, -1] = 126
    got = int8.matmul(*on(device, x, np.ones(1, np.float32), w, np.ones(2, np.float32)), None, torch.float32)
    wanted = [np.float32(10240 * 127 * 127), np.float32(10240 * 127 * 127 - 127)]
    assert got[0].cpu().tolist() == wanted


def test_what_is_not_finite_in_a_token_stays_in_it(device):
    x = drawn(3, 32)
    x[1, 0] = np.inf
    values, scale = int8.quantize_rows(*on(device, x))
    w, w_scale = int8.quantize_rows(*on(device, drawn(5, 32, 1)))
    got = int8.matmul(values, scale, w, w_scale, None, torch.float32).isfinite().cpu()
    assert got[[0, 2]].all()
    assert not got[1].any()


def test_the_tile_follows_shape_and_card():
    """Few rows take low tiles; a shape whose large tiles would fill two rounds takes smaller ones."""
    few, many = (tiles.int8_tile(count, 3840, "sm_90", 132) for count in (16, 4128))
    assert few.bm * few.bn < many.bm * many.bn
    assert (many.bm, many.bn) == (128, 256)
    assert tiles.int8_tile(1056, 3840, "sm_90", 132).bn == 128, (
        "135 tiles of 128 x 256 need two rounds of 132"
    )
    assert tiles.int8_tiles("sm_121") == tiles.int8_tiles("sm_120")
    assert tiles.int8_tiles("sm_89") == tiles.int8_tiles("default")
    assert tiles.int8_tiles("gfx1151") == tiles.int8_tiles("gfx1100")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("count", "rows", "width"), [(4128, 10240, 3840), (1056, 3840, 10240), (20, 9728, 2560)]
)
def test_the_products_of_the_networks_are_exact_on_a_gpu(count, rows, width):
    """Against torch's own int8 product, with every tile of this GPU."""
    place, generator = torch.device("cuda"), torch.Generator("cuda").manual_seed(0)
    x, w = (
        torch.randint(-127, 128, (n, width), dtype=torch.int8, device=place, generator=generator)
        for n in (count, rows)
    )
    ones = [torch.ones(n, device=place) for n in (count, rows)]
    wanted = torch._int_mm(x, w.t()).float()
    with pytest.MonkeyPatch.context() as patch:
        for tile in tiles.int8_tiles(tiles.architecture(x.device)[0]):
            patch.setattr(tiles, "int8", lambda *_, tile=tile: tile)
            assert torch.equal(int8.matmul(x, ones[0], w, ones[1], None, torch.float32), wanted), tile
