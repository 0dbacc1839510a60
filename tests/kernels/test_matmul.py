"""Defends: the product from planes is that with the reference's weights, whatever tile, split and strides.

The bound is elementwise. The kernel multiplies operands of x's dtype and adds K products and the bias in
float32, in an order of its own, so each term is rounded at most K + 2 times:

    |y - exact| <= g (|x| |W|^T + |bias|) + one rounding to x's dtype,    g = (K + 2) u / (1 - (K + 2) u)

with u = 2^-24. `exact` is float64 on the reference's weights, rounded to x's dtype as the kernel rounds them.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.kernels import tiles
from zimage_core.kernels.decode.table import DECODERS
from zimage_core.kernels.matmul import matmul
from zimage_core.kernels.planar import repack, step_weights
from zimage_core.kernels.tiles import Tile
from zimage_core.reference.blocks import as_blocks
from zimage_core.reference.dequantize import dequantize as reference
from zimage_core.reference.encode import finite_scales, random_blocks

# the interpreter computes in NumPy, which warns of overflow and NaN; here they are in the data
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

TAIL = 4096  # elements behind each result that no program may touch
FUSED = [FORMATS[name] for name, decoder in DECODERS.items() if decoder.bits]
HALVES = [sign | bits for bits in (0, 1, 0x3FF, 0x400, 0x3C00, 0x7BFF) for sign in (0, 0x8000)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

every_fused = pytest.mark.parametrize("fmt", FUSED, ids=lambda fmt: fmt.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
some_fused = pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K"])
"""Two sides with one scale a run, two with a minimum, four with two scales a run."""


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """The interpreter's tensors, or the GPU's; one session has only one of them."""
    if request.param == "cpu" and not tiles.interpreted():
        pytest.skip("kernels are compiled here")
    return torch.device(request.param)


def unit_width(fmt: BlockFormat) -> int:
    """The shortest row that the kernel takes."""
    return max(fmt.weights, step_weights(DECODERS[fmt.name].bits))


def one_tile(device: torch.device, bm: int = 64, bn: int = 128, splits: int = 1) -> Tile:
    """Tall and wide in the interpreter, where a program costs what it costs; what fits on a GPU."""
    return (
        Tile(bm, bn, 4, 1, splits) if device.type == "cpu" else Tile(min(bm, 64), min(bn, 64), 4, 2, splits)
    )


def run(
    x: torch.Tensor,
    packed: np.ndarray,
    fmt: BlockFormat,
    bias: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """The kernel's result on the CPU. What it allocates is full of NaN, with a tail that must stay so.

    `tile` takes the place of what the table says.
    """
    rooms: list[torch.Tensor] = []

    def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        rooms.append(torch.full((math.prod(shape) + TAIL,), float("nan"), dtype=dtype, device=device))
        return rooms[-1][:-TAIL].view(shape)

    planes = repack(torch.from_numpy(packed).to(x.device), fmt)
    with pytest.MonkeyPatch.context() as patch:
        if tile:
            patch.setattr(tiles, "matmul", lambda *sizes: tile)
        patch.setattr(torch, "empty", poisoned)
        y = matmul(x, planes, fmt, len(packed), None if bias is None else bias.to(x.device))
    assert y.shape == (len(x), len(packed))
    assert y.dtype == x.dtype
    for room in rooms:
        assert room[-TAIL:].isnan().all(), f"{fmt.name}: something was written behind the result"
    return y.cpu()


def operand(weights: np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """float32 weights in float64, rounded to x's dtype as the kernel does: the interpreter truncates."""
    w = torch.from_numpy(weights)
    if dtype == torch.bfloat16 and device.type == "cpu":
        return (w.view(torch.int32) & ~0xFFFF).view(torch.float32).double()
    return w.to(dtype).double()


def check(
    got: torch.Tensor,
    x: torch.Tensor,
    packed: np.ndarray,
    fmt: BlockFormat,
    bias: torch.Tensor | None = None,
) -> None:
    """The bound at the head of this file, for every element."""
    device, dtype, width = x.device, x.dtype, x.shape[1]
    w, x, b = operand(reference(packed, fmt), dtype, device), x.cpu().double(), torch.zeros(len(packed))
    if bias is not None:
        b = bias.cpu()
    exact, size = x @ w.T + b.double(), x.abs() @ w.abs().T + b.double().abs()
    # tensor cores cut off where float32 rounds, two to four bits further right than a product of halves needs
    unit = 2.0**-22 if device.type == "cuda" and dtype != torch.float32 else 2.0**-24
    roundings = (width + 2) * unit
    # the last term: numbers below float32's normal ones, which a GPU and the interpreter's bfloat16 lack
    room = roundings / (1 - roundings) * size + 2.0**-126 * (width + x.abs().sum(1, keepdim=True))
    if dtype == torch.float16:
        room += 2.0**-11 * (exact.abs() + room) + 2.0**-25
    elif dtype == torch.bfloat16:
        room += (2.0**-8 if device.type == "cuda" else 2.0**-7) * (exact.abs() + room)
    wrong = ~((got.double() - exact).abs() <= room)
    if wrong.any():
        m, n = (int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{fmt.name} {dtype}: {int(wrong.sum())} of {wrong.numel()} elements are off, the first in "
            f"row {m}, column {n}: got {got[m, n].item()!r}, "
            f"wanted {exact[m, n].item()!r} +- {room[m, n].item():.3g}"
        )


def random_x(rows: int, width: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator).to(dtype).to(device)


def random_bias(rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, generator=torch.Generator().manual_seed(99)).to(dtype)


def weights(fmt: BlockFormat, rows: int, width: int, seed: int = 0) -> np.ndarray:
    """As a trained network has them; outputs of about 0.3 sqrt(width)."""
    return random_blocks(fmt, (rows, width), np.random.default_rng(seed), std=0.3)


def any_finite(packed: np.ndarray, fmt: BlockFormat) -> np.ndarray:
    """Any finite float16 scale, up to 65504: infinity and NaN lose the lowest bit of their exponent.

    Powers of two (MXFP4) stay below 1.
    """
    packed = finite_scales(packed, fmt) if fmt.name == "MXFP4" else packed.copy()
    blocks = as_blocks(packed, fmt)
    for field in fmt.fields:
        if field.code == "f2":
            bits = blocks[field.name].view("<u2")
            bits[(bits & 0x7C00) == 0x7C00] &= 0xFBFF
    return packed


@st.composite
def products(draw, fmt: BlockFormat) -> tuple[np.ndarray, dict[str, object]]:
    """Packed rows, the first of them byte by byte as hypothesis likes, and what else a product needs."""
    rows, blocks = draw(st.sampled_from([1, 2, 40, 72])), unit_width(fmt) // fmt.weights
    size = blocks * fmt.nbytes
    first = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    seed = draw(st.integers(0, 2**32 - 1))
    packed = np.random.default_rng(seed).integers(0, 256, (rows, size), dtype=np.uint8)
    packed[0] = first
    options = {
        "count": draw(st.sampled_from([1, 2, 15, 16, 17, 33, 64])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "bias": draw(st.sampled_from([None, *DTYPES])),
        "splits": draw(st.sampled_from([1, 1, 2])),
        "seed": seed,
    }
    return packed, options


@every_fused
@settings(max_examples=settings().max_examples // 2)  # of up to 72 rows each, all of any bytes
@given(data=st.data())
def test_any_bytes_multiply_as_the_weights_of_the_reference(fmt, device, data):
    """Scales below 2 under float16, where larger ones give weights beyond its range; elsewhere any."""
    packed, options = data.draw(products(fmt))
    dtype = options["dtype"]
    packed = finite_scales(packed, fmt) if dtype == torch.float16 else any_finite(packed, fmt)
    x = random_x(options["count"], unit_width(fmt), dtype, device, options["seed"] % 2**31)
    if dtype == torch.float16:
        x = x * 2.0**-8  # 256 weights below 8,192 then stay below 65,504
    bias = None if options["bias"] is None else random_bias(len(packed), options["bias"])
    check(run(x, packed, fmt, bias, one_tile(device, splits=options["splits"])), x, packed, fmt, bias)


@every_fused
@every_dtype
def test_the_identity_gives_back_every_weight(fmt, device, dtype):
    """One product and zeros: nothing is rounded but the weight to x's dtype, so this is equality."""
    width = unit_width(fmt)
    raw = np.random.default_rng(1).integers(0, 256, (40, width // fmt.weights * fmt.nbytes), dtype=np.uint8)
    packed = finite_scales(raw, fmt) if dtype == torch.float16 else any_finite(raw, fmt)
    if fmt.name == "MXFP4" and dtype == torch.bfloat16:  # no weight below its normal numbers
        as_blocks(packed, fmt)["e"] |= 0x40
    got = run(torch.eye(width, dtype=dtype, device=device), packed, fmt, None, one_tile(device, 256, 64))
    wrong = got.double() != operand(reference(packed, fmt), dtype, device).T
    assert not wrong.any(), (
        f"{fmt.name}: weight, row {wrong.nonzero()[0].tolist()} of {int(wrong.sum())} differ"
    )


@every_fused
def test_scales_at_the_ends_of_their_range(fmt, device):
    """Zero, subnormal, smallest, one and largest d of either sign, over bytes 0, 0xFF and any; every pair."""
    names = [field.name for field in fmt.fields if field.code == "f2"]
    cases = list(product(HALVES, repeat=len(names)))
    if not names:
        name = fmt.fields[0].name
        names, cases = [name], [(code,) for code in (0, 1, 2, 7, 8, 0x7E, 0x7F, 0x80, 0xC8)]
    blocks_a_row = unit_width(fmt) // fmt.weights
    packed = np.concatenate([
        np.full((len(cases), blocks_a_row * fmt.nbytes), 0x00, np.uint8),
        np.full((len(cases), blocks_a_row * fmt.nbytes), 0xFF, np.uint8),
        np.random.default_rng(2).integers(
            0, 256, (len(cases), blocks_a_row * fmt.nbytes), dtype=np.uint8
        ),
    ])  # fmt: skip
    blocks = as_blocks(packed, fmt)  # a view
    for row, case in enumerate(cases * 3):
        for name, bits in zip(names, case, strict=True):
            field = blocks[row][name]
            field.view("u1" if field.dtype.itemsize == 1 else "<u2")[:] = bits
    for dtype in (torch.float32, torch.bfloat16):
        x = random_x(2, unit_width(fmt), dtype, device)
        check(run(x, packed, fmt, None, one_tile(device, 16, 512)), x, packed, fmt)


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K"])
def test_every_code_under_every_six_bit_scale(name, device):
    """Sub-block j of block b has scale s = (b + 8 j) % 64 and minimum 63 - s, and holds every code."""
    fmt = FORMATS[name]
    packed = np.zeros((64, fmt.nbytes), np.uint8)
    blocks = as_blocks(packed, fmt)[:, 0]
    blocks["d"], blocks["dmin"] = 1, 1
    s = ((np.arange(64)[:, None] + 8 * np.arange(8)) % 64).astype(np.uint8)
    m = 63 - s
    low, high = slice(0, 4), slice(4, 8)
    blocks["scales"][:, 0:4] = s[:, low] | (s[:, high] >> 4 << 6)
    blocks["scales"][:, 4:8] = m[:, low] | (m[:, high] >> 4 << 6)
    blocks["scales"][:, 8:12] = (s[:, high] & 15) | (m[:, high] & 15) << 4
    i = np.arange(128, dtype=np.uint8)
    blocks["qs"] = i % 16 | (15 - i % 16) << 4
    if name == "Q5_K":
        blocks["qh"] = np.arange(32) // 16 * 255
    wanted = reference(packed, fmt)
    codes = 32 if name == "Q5_K" else 16
    every = {float(scale * q - (63 - scale)) for scale in range(64) for q in range(codes)}
    assert set(wanted.ravel().tolist()) == every
    got = run(torch.eye(256, device=device), packed, fmt, None, one_tile(device, 256, 64))
    np.testing.assert_array_equal(got.numpy(), wanted.T)


@some_fused
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 33, 64])
def test_every_number_of_rows_under_the_tile_of_the_table(name, device, count):
    fmt = FORMATS[name]
    packed, bias = weights(fmt, 40, 256), random_bias(40)
    x = random_x(count, 256, torch.float16, device)
    check(run(x, packed, fmt, bias), x, packed, fmt, bias)


@every_fused
def test_steps_are_shared_out_among_programs(fmt, device):
    """Of five steps or eight, two or three a program leave the last one short; 16 programs are too many."""
    width = (2 if fmt.weights == 256 else 5) * unit_width(fmt)
    packed, bias, x = weights(fmt, 24, width), random_bias(24), random_x(3, width, torch.float32, device)
    for splits in (3, 16):
        check(run(x, packed, fmt, bias, one_tile(device, 16, 32, splits)), x, packed, fmt, bias)


@every_dtype
def test_partial_sums_are_added_by_several_programs(device, dtype, monkeypatch):
    """5 x 40 sums, 64 a program: the last is part empty and columns begin anywhere in a program."""
    monkeypatch.setattr(tiles, "sum_elements", lambda: 64)
    fmt = FORMATS["Q8_0"]
    packed, x = weights(fmt, 40, 256), random_x(5, 256, dtype, device)
    for bias in (None, random_bias(40)):
        check(run(x, packed, fmt, bias, one_tile(device, splits=2)), x, packed, fmt, bias)


def test_tiles_in_groups_cover_every_column_and_row_once(device):
    """11 tiles along N are a group of eight and one of three; 33 rows are three tiles."""
    fmt = FORMATS["Q4_0"]
    assert tiles.ORDER == 8
    packed, bias, x = weights(fmt, 168, 64), random_bias(168), random_x(33, 64, torch.float32, device)
    check(run(x, packed, fmt, bias, Tile(16, 16, 4, 1)), x, packed, fmt, bias)


@some_fused
def test_rows_of_several_blocks(name, device):
    """Two tiles each way, K = 512; the way most of a network's products go."""
    fmt = FORMATS[name]
    packed, bias, x = weights(fmt, 72, 512), random_bias(72), random_x(33, 512, torch.bfloat16, device)
    check(run(x, packed, fmt, bias, Tile(32, 64, 4, 1)), x, packed, fmt, bias)


@some_fused
def test_x_may_lie_anyhow_in_memory(name, device):
    fmt = FORMATS[name]
    width = unit_width(fmt)
    packed = weights(fmt, 40, width)
    room = torch.full((20, width + 9), float("nan"), device=device)
    cases = {
        "every other row": room[1:18:2, :width],
        "a slice of columns": room[:7, 5 : 5 + width],
        "transposed": torch.full((width, 7), float("nan"), device=device).t(),
        "backwards in steps of two": torch.full((7, 2 * width), float("nan"), device=device)[:, ::2],
    }
    for seed, (what, x) in enumerate(cases.items()):
        x[:] = random_x(*x.shape, torch.float32, device, seed)
        assert not x.is_contiguous(), what
        check(run(x, packed, fmt, None, one_tile(device, 16, 64)), x, packed, fmt)
    one = random_x(1, width, torch.float32, device)
    same = run(one.expand(5, width), packed, fmt, None, one_tile(device, 16, 64))
    assert torch.equal(same, run(one, packed, fmt, None, one_tile(device, 16, 64)).expand(5, 40))


@every_dtype
def test_no_rows_of_x_and_one_row_of_w(device, dtype):
    fmt = FORMATS["Q5_1"]
    packed = weights(fmt, 1, 128)
    assert run(random_x(0, 128, dtype, device), packed, fmt, random_bias(1)).shape == (0, 1)
    x = random_x(3, 128, dtype, device)
    check(run(x, packed, fmt, random_bias(1)), x, packed, fmt, random_bias(1))


@every_fused
def test_zeros_give_exactly_the_bias(fmt, device):
    packed, tile = weights(fmt, 8, unit_width(fmt)), one_tile(device, 16, 16)
    for dtype in (torch.float16,) if fmt.weights > 128 else DTYPES:
        x, bias = torch.zeros(2, unit_width(fmt), dtype=dtype, device=device), random_bias(8, dtype)
        assert torch.equal(run(x, packed, fmt, bias, tile), bias.expand(2, 8))
    assert torch.equal(run(x, packed, fmt, None, tile), torch.zeros(2, 8, dtype=x.dtype))


@some_fused
@every_dtype
def test_a_power_of_two_passes_through(name, device, dtype):
    """Exactly: no exponent leaves its range."""
    fmt = FORMATS[name]
    packed = weights(fmt, 40, unit_width(fmt))
    x = random_x(9, unit_width(fmt), dtype, device)
    once, four = (run(factor * x, packed, fmt, None, one_tile(device, 16, 64)) for factor in (1, 4))
    assert torch.equal(4 * once, four)


def in_any_order(
    fmt: BlockFormat, count: int, rows: int, width: int, device: torch.device
) -> tuple[torch.Tensor, np.ndarray]:
    """x and packed rows for comparisons bit for bit between places in a tile.

    On a GPU any numbers: each element is summed alike there. The interpreter's product is NumPy's, and BLAS
    sums alike only in the middle of a matrix; so there all are small integers, whose sums are exact.
    """
    packed, x = weights(fmt, rows, width), random_x(count, width, torch.float16, device)
    if device.type == "cpu":
        blocks = as_blocks(packed, fmt)
        for field in fmt.fields:
            if field.code == "f2":
                blocks[field.name] = 1
        x = (2 * x).round()
    return x, packed


@some_fused
def test_rows_of_w_are_independent(name, device):
    """Permuted or joined with another weight's, each gives its column, bit for bit."""
    fmt = FORMATS[name]
    width, tile = unit_width(fmt), one_tile(device, 16, 16)
    x, both = in_any_order(fmt, 5, 64, width, device)
    x, bias = x.float() * 2**-4, random_bias(64).half()
    a, b = both[:40], both[40:]
    y_a, y_b = run(x, a, fmt, bias[:40], tile), run(x, b, fmt, bias[40:], tile)
    assert torch.equal(run(x, both, fmt, bias, tile), torch.cat([y_a, y_b], 1))
    order = np.random.default_rng(3).permutation(40)
    assert torch.equal(run(x, a[order], fmt, bias[:40][order], tile), y_a[:, order])


@some_fused
def test_rows_of_x_are_independent(name, device):
    """Within one choice of tile a row gives the same bits alone, among others and in another place."""
    fmt = FORMATS[name]
    tile = one_tile(device, 16, 64, splits=2)
    x, packed = in_any_order(fmt, 21, 40, 256, device)
    x = x * 2**-4
    whole = run(x, packed, fmt, None, tile)
    parts = [run(x[rows], packed, fmt, None, tile) for rows in (slice(0, 1), slice(1, 18), slice(18, 21))]
    assert torch.equal(whole, torch.cat(parts))
    order = torch.randperm(21, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(x[order], packed, fmt, None, tile), whole[order])


@some_fused
def test_what_is_not_finite_stays_in_its_row(name, device):
    """NaN and infinity of a row of x in that row of y, a NaN scale of a row of W in that column."""
    fmt = FORMATS[name]
    width, tile = unit_width(fmt), one_tile(device, 16, 64)
    packed, x = weights(fmt, 24, width), random_x(7, width, torch.float16, device)
    clean = run(x, packed, fmt, None, tile)
    x[2, 5], x[6, width - 1] = float("nan"), float("inf")
    as_blocks(packed, fmt)["d"][11] = np.float16("nan")
    got = run(x, packed, fmt, None, tile)
    rows, columns = [0, 1, 3, 4, 5], [n for n in range(24) if n != 11]
    assert torch.equal(got[rows][:, columns], clean[rows][:, columns])
    assert got[2].isnan().all()
    assert got[:, 11].isnan().all()
    assert not got[6, columns].isfinite().any()


def test_packed_bytes_may_start_anywhere(device):
    """As a view of a mapped file: repacking copies where words would be unaligned."""
    fmt = FORMATS["Q4_K"]
    packed, x = weights(fmt, 8, 256), random_x(3, 256, torch.float32, device)
    room = torch.zeros(packed.size + 3, dtype=torch.uint8, device=device)
    room[3:] = torch.from_numpy(packed).view(-1)
    planes = repack(room[3:].view(8, -1), fmt)
    assert torch.equal(
        matmul(x, planes, fmt, 8), matmul(x, repack(torch.from_numpy(packed).to(device), fmt), fmt, 8)
    )
