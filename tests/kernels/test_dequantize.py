"""Defends: the kernel gives the weights of the reference, bit for bit, for any bytes at any address."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.blocks import assert_same_bits, packed_rows, six_bit_scales
from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.kernels import dequantize, tiles
from zimage_core.kernels.decode.table import DECODERS
from zimage_core.kernels.dequantize import dequantize_into
from zimage_core.reference.blocks import as_blocks
from zimage_core.reference.dequantize import dequantize as reference
from zimage_core.reference.encode import finite_scales

# the interpreter computes in NumPy, which warns of overflow and NaN; here they are in the bytes
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

POISON = float("nan")
TAIL = 4096  # weights behind the result that no program may touch

every_decoder = pytest.mark.parametrize("fmt", [FORMATS[name] for name in DECODERS], ids=DECODERS)

# zero, both subnormal ends, the smallest normal, one, the largest, infinity and NaN, with either sign
HALVES = [
    sign | bits for bits in (0, 1, 0x3FF, 0x400, 0x3C00, 0x7BFF, 0x7C00, 0x7E01) for sign in (0, 0x8000)
]


def run(
    packed: torch.Tensor,
    fmt: BlockFormat,
    dtype: torch.dtype = torch.float32,
    weights_a_program: int | None = None,
) -> torch.Tensor:
    """The kernel's result, on the CPU, written over NaN into a longer buffer whose rest must stay NaN."""
    shape = (*packed.shape[:-1], packed.shape[-1] // fmt.nbytes * fmt.weights)
    count = int(np.prod(shape))
    padded = torch.full((count + TAIL,), POISON, dtype=dtype, device=packed.device)
    with pytest.MonkeyPatch.context() as patch:
        if weights_a_program:
            patch.setattr(tiles, "dequantize_weights", lambda: weights_a_program)
        dequantize_into(padded[:count].view(shape), packed, fmt)
    assert padded[count:].isnan().all(), f"{fmt.name}: weights were written after the last block"
    return padded[:count].view(shape).cpu()


def check(packed: np.ndarray, fmt: BlockFormat, device: torch.device, weights_a_program: int | None = None):
    got = run(torch.from_numpy(packed).to(device), fmt, weights_a_program=weights_a_program)
    assert_same_bits(got.numpy(), reference(packed, fmt), fmt)


def random_rows(fmt: BlockFormat, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    raw = np.random.default_rng(seed).integers(0, 256, (rows, blocks * fmt.nbytes), dtype=np.uint8)
    return finite_scales(raw, fmt)


def test_every_block_format_has_a_decoder():
    blocks = {name for name, fmt in FORMATS.items() if fmt.weights > 1}
    assert set(DECODERS) == blocks, "the table in kernels/decode/table.py and formats.py disagree"


@every_decoder
@given(data=st.data(), finite=st.booleans())
def test_any_bytes_give_the_bits_of_the_reference(fmt, device, data, finite):
    """At 1,024 weights a program nine blocks are one program or three, the last one partly empty."""
    check(data.draw(packed_rows(fmt, finite=finite)), fmt, device, weights_a_program=1024)


@every_decoder
def test_every_byte_value_in_every_place(fmt, device):
    """256 blocks of one byte value each, 0x00 and 0xFF with them: no entry of a table is out of reach."""
    packed = np.repeat(np.arange(256, dtype=np.uint8)[:, None], fmt.nbytes, 1)
    check(packed, fmt, device)
    check(finite_scales(packed, fmt), fmt, device)


@every_decoder
def test_scales_at_the_ends_of_their_range(fmt, device):
    """Every pair of special float16 numbers where a block has two; random codes under them."""
    names = [field.name for field in fmt.fields if field.code == "f2"]
    if fmt.name == "MXFP4":
        cases = [(e,) for e in (0, 1, 2, 127, 128, 253, 254, 255)]
        names = ["e"]
    elif fmt.name == "NVFP4":
        cases = [(code,) for code in (0, 1, 7, 8, 0x7E, 0x7F, 0x80, 0x81, 0xFE, 0xFF)]
        names = ["d"]
    else:
        cases = list(product(HALVES, repeat=len(names) or 1))
    packed = random_rows(fmt, len(cases), 1)
    blocks = as_blocks(packed, fmt)  # a view
    for row, case in enumerate(cases):
        for name, bits in zip(names, case, strict=False):
            field = blocks[row, 0][name]
            field.view(f"<u{field.itemsize}")[:] = bits
        if fmt.name == "IQ1_M":  # its d is spread over the top nibbles of four words
            nibbles = np.array([case[0] >> shift & 15 for shift in (0, 4, 8, 12)], np.uint16)
            words = blocks[row, 0]["scales"]
            words[:] = (words & 0xFFF) | (nibbles << 12)
    check(packed, fmt, device)


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K"])
def test_every_code_under_every_six_bit_scale(name, device):
    fmt = FORMATS[name]
    packed, every = six_bit_scales(fmt)
    assert set(reference(packed, fmt).ravel().tolist()) == every
    check(packed, fmt, device)


@every_decoder
@pytest.mark.parametrize("programs", [1, 4])
def test_last_program_may_be_part_empty(fmt, device, programs):
    """One block more than fills the programs before the last, 512 weights each."""
    blocks = (programs - 1) * (512 // fmt.weights) + 1
    check(random_rows(fmt, 1, blocks), fmt, device, weights_a_program=512)


@every_decoder
def test_whole_programs_need_no_mask(fmt, device, monkeypatch):
    """Of matrices; a part empty program has its mask there too."""
    monkeypatch.setattr(dequantize, "WHOLE_FROM", 1)
    for blocks in (2, 3):
        check(random_rows(fmt, 1, blocks * 512 // fmt.weights), fmt, device, weights_a_program=1024)


@every_decoder
def test_rows_may_start_at_an_odd_address(fmt, device):
    packed = random_rows(fmt, 3, 3)
    padded = torch.zeros(packed.size + 1, dtype=torch.uint8, device=device)
    padded[1:] = torch.from_numpy(packed).view(-1).to(device)
    got = run(padded[1:].view(3, -1), fmt, weights_a_program=1024)
    assert_same_bits(got.numpy(), reference(packed, fmt), fmt)


def test_memory_may_itself_start_at_an_odd_address():
    """As a mapped file gives it: the tensor's own storage is not aligned."""
    if not tiles.interpreted():
        pytest.skip("memory of the CPU")
    fmt = FORMATS["Q4_K"]
    packed = random_rows(fmt, 3, 3)
    mapped = torch.frombuffer(bytearray(b"\0" + packed.tobytes()), dtype=torch.uint8, offset=1).view(3, -1)
    assert_same_bits(run(mapped, fmt).numpy(), reference(packed, fmt), fmt)


@every_decoder
def test_rows_may_lie_apart_and_in_more_axes(fmt, device):
    packed = random_rows(fmt, 8, 2).reshape(2, 4, -1)
    got = run(torch.from_numpy(packed).to(device)[:, ::2], fmt, weights_a_program=1024)
    assert_same_bits(got.numpy(), reference(np.ascontiguousarray(packed[:, ::2]), fmt), fmt)


@every_decoder
def test_no_rows_and_empty_rows(fmt, device):
    assert run(torch.empty(0, 2 * fmt.nbytes, dtype=torch.uint8, device=device), fmt).shape[0] == 0
    assert run(torch.empty(3, 0, dtype=torch.uint8, device=device), fmt).shape == (3, 0)


@every_decoder
def test_float16_is_the_reference_rounded_once(fmt, device):
    """Any bytes: what is beyond float16 becomes infinite, as in NumPy's conversion."""
    raw = np.random.default_rng(1).integers(0, 256, (4, 4 * fmt.nbytes), dtype=np.uint8)
    got = run(torch.from_numpy(raw).to(device), fmt, torch.float16, weights_a_program=1024).numpy()
    with np.errstate(over="ignore"):
        wanted = reference(raw, fmt).astype(np.float16)
    both_nan = np.isnan(got) & np.isnan(wanted)
    np.testing.assert_array_equal(
        np.where(both_nan, 0, got.view(np.uint16)), np.where(both_nan, 0, wanted.view(np.uint16))
    )


@every_decoder
def test_bfloat16_is_the_reference_rounded_once(fmt, device):
    """The interpreter truncates; a GPU rounds to nearest even, as torch does."""
    packed = random_rows(fmt, 4, 4, seed=2)
    got = run(torch.from_numpy(packed).to(device), fmt, torch.bfloat16, weights_a_program=1024)
    wanted = torch.from_numpy(reference(packed, fmt))
    if device.type == "cuda":
        torch.testing.assert_close(got, wanted.to(torch.bfloat16), rtol=0, atol=0)
    else:
        subnormal = 2.0**-126  # the interpreter's bfloat16 has none; MXFP4 reaches them
        torch.testing.assert_close(got.double(), wanted.double(), rtol=2.0**-7, atol=subnormal)
