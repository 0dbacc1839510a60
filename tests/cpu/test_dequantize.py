"""Defends: the fast dequantiser is the NumPy reference, bit for bit, at any alignment, tile and thread."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.blocks import assert_same_bits, every_format, packed_rows
from zimage_core.cpu import dequantize as cpu
from zimage_core.cpu import workspace as workspaces
from zimage_core.errors import BadShape
from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.quant.dequantize import dequantize
from zimage_core.reference.dequantize import dequantize as reference
from zimage_core.reference.encode import finite_scales

POISON = float("nan")


def fast(packed: torch.Tensor, fmt: BlockFormat) -> np.ndarray:
    """dequantize_into a poisoned tensor."""
    out = torch.full((*packed.shape[:-1], packed.shape[-1] // fmt.nbytes * fmt.weights), POISON)
    cpu.dequantize_into(out, packed, fmt)
    return out.numpy()


def random_rows(fmt: BlockFormat, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    raw = np.random.default_rng(seed).integers(0, 256, (rows, blocks * fmt.nbytes), dtype=np.uint8)
    return finite_scales(raw, fmt)


@every_format
@given(data=st.data(), finite=st.booleans())
def test_any_bytes_give_the_bits_of_the_reference(fmt, data, finite):
    packed = data.draw(packed_rows(fmt, finite=finite))
    with np.errstate(all="ignore"):
        assert_same_bits(fast(torch.from_numpy(packed), fmt), reference(packed, fmt.name), fmt)


@every_format
def test_every_byte_value_in_every_place(fmt):
    """256 blocks, each filled with one byte value but for finite scales: no table entry is out of reach."""
    packed = np.repeat(np.arange(256, dtype=np.uint8)[:, None], fmt.nbytes, 1)
    packed = finite_scales(packed, fmt)
    assert_same_bits(fast(torch.from_numpy(packed), fmt), reference(packed, fmt.name), fmt)


@every_format
def test_tile_borders_do_not_show(fmt, monkeypatch):
    """Tiles of 16 blocks over 7 rows of 5 blocks: borders inside rows, a short last tile."""
    monkeypatch.setattr(cpu, "TILE", 16 * fmt.weights)
    packed = random_rows(fmt, 7, 5)
    assert_same_bits(fast(torch.from_numpy(packed), fmt), reference(packed, fmt.name), fmt)


@every_format
@pytest.mark.parametrize("shift", [1, 2, 4])
def test_rows_may_start_at_any_address(fmt, shift):
    packed = random_rows(fmt, 3, 3)
    buffer = torch.zeros(packed.size + shift, dtype=torch.uint8)
    buffer[shift:] = torch.from_numpy(packed).view(-1)
    # once as a view of a longer tensor, once as memory that itself starts there, as a mapped file gives
    inner = buffer[shift:].view(3, -1)
    mapped = torch.frombuffer(bytearray(buffer.numpy().tobytes()), dtype=torch.uint8, offset=shift).view(
        3, -1
    )
    for odd in (inner, mapped):
        assert_same_bits(fast(odd, fmt), reference(packed, fmt.name), fmt)
        dense = dequantize(odd, fmt.name)
        assert_same_bits(dense.numpy(), reference(packed, fmt.name), fmt)


@every_format
def test_rows_may_lie_apart_and_in_more_axes(fmt):
    packed = random_rows(fmt, 8, 2).reshape(2, 4, -1)
    apart = torch.from_numpy(packed)[:, ::2]
    assert_same_bits(fast(apart, fmt), reference(np.ascontiguousarray(packed[:, ::2]), fmt.name), fmt)


@every_format
def test_no_rows_and_empty_rows(fmt):
    assert fast(torch.empty(0, 2 * fmt.nbytes, dtype=torch.uint8), fmt).shape == (0, 2 * fmt.weights)
    assert fast(torch.empty(3, 0, dtype=torch.uint8), fmt).shape == (3, 0)


def test_every_format_has_one_way_in():
    numbers = {name for name, fmt in FORMATS.items() if fmt.is_float or fmt.is_integer}
    assert set(cpu.DECODERS) == set(FORMATS) - numbers


@every_format
def test_bytes_are_left_alone(fmt):
    packed = torch.from_numpy(random_rows(fmt, 2, 2))
    before = packed.clone()
    fast(packed, fmt)
    assert torch.equal(packed, before)


def test_two_threads_do_not_share_scratch():
    names = ("Q4_K", "IQ3_S", "Q5_0", "TQ1_0")
    wrong: list[str] = []

    def work(seed: int) -> None:
        for turn in range(6):
            fmt = FORMATS[names[(turn + seed) % len(names)]]
            packed = random_rows(fmt, 64, 2048 // fmt.weights, seed)
            if not np.array_equal(fast(torch.from_numpy(packed), fmt), reference(packed, fmt.name)):
                wrong.append(f"{fmt.name} seed {seed}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_scratch_made_in_inference_mode_serves_outside_it():
    packed = torch.from_numpy(random_rows(FORMATS["Q4_K"], 2, 2))
    results: list[torch.Tensor] = []

    def work() -> None:  # a thread of its own has no scratch yet
        for inference in (True, False):
            with torch.inference_mode(inference):
                results.append(dequantize(packed, "Q4_K"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(results) == 2
    assert torch.equal(results[0], results[1])


def test_scratch_stays_small():
    """A matrix of 16 M weights must not leave more than some tiles and headers behind."""

    def held() -> int:
        for fmt in FORMATS.values():
            packed = torch.zeros(fmt.row_bytes(1 << 20), dtype=torch.uint8).view(1, -1)
            fast(packed, fmt)
        return sum(workspaces.workspace(use, torch.device("cpu")).nbytes for use in ("tile", "header"))

    with ThreadPoolExecutor(1) as fresh:  # scratch belongs to a thread; this one's may have grown elsewhere
        assert fresh.submit(held).result() <= 20 << 20


@pytest.mark.parametrize(
    ("packed", "out"),
    [
        (torch.zeros(2, 17, dtype=torch.uint8), torch.zeros(2, 32)),
        (torch.zeros(2, 18, dtype=torch.int8), torch.zeros(2, 32)),
        (torch.zeros(2, 18, dtype=torch.uint8), torch.zeros(2, 33)),
        (torch.zeros(2, 18, dtype=torch.uint8), torch.zeros(2, 32).half()),
        (torch.zeros(2, 18, dtype=torch.uint8), torch.zeros(32, 2).t()),
        (torch.zeros((), dtype=torch.uint8), torch.zeros(1)),
    ],
    ids=["half a block", "int8", "wrong width", "half precision", "transposed", "no axes"],
)
def test_shapes_that_do_not_fit_are_named(packed, out):
    with pytest.raises(BadShape, match="Q4_0"):
        cpu.dequantize_into(out, packed, FORMATS["Q4_0"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@every_format
def test_other_dtypes_are_rounded_once(fmt, dtype):
    packed = random_rows(fmt, 3, 2)
    got = dequantize(torch.from_numpy(packed), fmt.name, dtype)
    assert got.dtype == dtype
    if fmt.name in ("F64", "I32", "I64"):  # wider than float32: converted directly
        code = {"F64": "f8", "I32": "i4", "I64": "i8"}[fmt.name]
        wanted = torch.from_numpy(packed.view(code)).to(dtype)
    else:
        wanted = torch.from_numpy(reference(packed, fmt.name)).to(dtype)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
