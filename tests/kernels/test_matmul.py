"""Defends: the product from planes is that with the reference's weights, for all bytes and dtypes.

The bound stands at the head of tests/helpers/matmul.py.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.blocks import six_bit_scales
from tests.helpers.matmul import (
    DTYPES,
    check,
    every_dtype,
    every_fused,
    one_tile,
    operand,
    random_bias,
    random_x,
    run,
    some_fused,
    unit_width,
    weights,
)
from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.reference.blocks import as_blocks
from zimage_core.reference.dequantize import dequantize as reference
from zimage_core.reference.encode import finite_scales

# the interpreter computes in NumPy, which warns of overflow and NaN; here they are in the data
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

HALVES = [sign | bits for bits in (0, 1, 0x3FF, 0x400, 0x3C00, 0x7BFF) for sign in (0, 0x8000)]


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
    fmt = FORMATS[name]
    packed, every = six_bit_scales(fmt)
    wanted = reference(packed, fmt)
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
