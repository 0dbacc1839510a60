"""Defends: the product does not depend on tile, split and strides, and rows are independent.

The bound stands at the head of tests/helpers/matmul.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers.matmul import (
    check,
    every_dtype,
    every_fused,
    one_tile,
    random_bias,
    random_x,
    run,
    some_fused,
    unit_width,
    weights,
)
from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.kernels import tiles
from zimage_core.kernels.matmul import matmul
from zimage_core.kernels.planar import repack
from zimage_core.kernels.tiles import Tile
from zimage_core.reference.blocks import as_blocks

# the interpreter computes in NumPy, which warns of overflow and NaN; here they are in the data
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@every_fused
def test_steps_are_shared_out_among_programs(fmt, device):
    """Five steps or eight: two or three a program leave the last one short, and 16 programs are too many."""
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
