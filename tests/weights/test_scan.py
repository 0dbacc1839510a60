"""A scan names every tensor that holds NaN, infinity or more than float16, and no other."""

from __future__ import annotations

import os
import re
import tracemalloc

import numpy as np
import pytest

from tests.helpers.gguf_writer import Packed, random_packed, write_gguf
from tests.weights.test_safetensors import write_safetensors
from zimage_core.errors import BadFile
from zimage_core.formats import FORMATS
from zimage_core.reference.blocks import as_blocks
from zimage_core.reference.dequantize import dequantize
from zimage_core.reference.encode import random_blocks
from zimage_core.weights.opened import open_weights
from zimage_core.weights.scan import _CHUNK, _LARGEST, _blocks, findings, scan

PACKED = [fmt for fmt in FORMATS.values() if fmt.weights > 1]
WITH_SCALE = [name for name in _LARGEST if name not in ("MXFP4", "IQ1_M")]


def scanned(tmp_path, **tensors):
    with open_weights(write_gguf(tmp_path / "a.gguf", tensors)) as file:
        return scan(file)


def patched(name, field, bits, block=5):
    """Random blocks with one scale replaced."""
    fmt = FORMATS[name]
    data = bytearray(random_blocks(fmt, (4, 4 * fmt.weights), np.random.default_rng(0)).tobytes())
    start = block * fmt.nbytes + fmt.offset(field)
    data[start : start + 2] = bits.to_bytes(2, "little")
    return Packed(fmt, (4, 4 * fmt.weights), bytes(data))


def test_good_weights_of_every_format_give_no_finding(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {}
    for fmt in FORMATS.values():
        if fmt.ggml_type is not None:
            shape = (3, 4 * fmt.weights)
            tensors[fmt.name] = Packed(fmt, shape, random_blocks(fmt, shape, rng).tobytes())
    assert scanned(tmp_path, **tensors) == []


@pytest.mark.parametrize("name", WITH_SCALE)
def test_a_scale_that_is_nan_or_infinite_is_found_in_every_format(tmp_path, name):
    for field in _LARGEST[name]:
        nan = patched(name, field, 0x7E01)
        inf = patched(name, field, 0xFC00)
        got = scanned(
            tmp_path, nan=nan, inf=inf, **({} if name == "Q2_0_128" else {"w": patched(name, field, 0)})
        )
        assert got == [
            "tensor nan: 1 NaN of 16 blocks in their scales",
            "tensor inf: 1 Inf of 16 blocks in their scales",
        ]


def test_scales_kept_in_odd_places_are_found_too(tmp_path):
    mxfp4 = random_packed("MXFP4", (2, 64), np.random.default_rng(0))
    spoilt = bytearray(mxfp4.data)
    spoilt[17] = 255
    iq1_m = random_packed("IQ1_M", (2, 512), np.random.default_rng(0))
    blocks = as_blocks(np.frombuffer(bytearray(iq1_m.data), np.uint8), iq1_m.format)
    blocks["scales"][1, 3] |= 0x7000  # the top nibble of the float16
    blocks["scales"][1, 2] |= 0xF000
    blocks["scales"][1, 2] &= 0xCFFF
    wanted = Packed(iq1_m.format, (2, 512), blocks.tobytes())
    assert not np.isfinite(dequantize(np.frombuffer(wanted.data, np.uint8), "IQ1_M")).all()
    got = scanned(tmp_path, a=Packed(mxfp4.format, (2, 64), bytes(spoilt)), b=wanted, c=mxfp4, d=iq1_m)
    assert [text.split(":")[0] for text in got] == ["tensor a", "tensor b"]
    assert got[0] == "tensor a: 1 NaN of 4 blocks in their scales"


@pytest.mark.parametrize("fmt", PACKED, ids=lambda fmt: fmt.name)
def test_no_weight_is_larger_than_its_scales_allow(fmt):
    """The factors in the table against the reference, on random bytes."""
    if fmt.name not in _LARGEST:
        assert fmt.name == "NVFP4"
        worst = dequantize(np.full((1, fmt.nbytes), 0x7E, np.uint8), fmt)
        assert np.abs(worst).max() < 65504
        return
    packed = np.frombuffer(random_packed(fmt, (64, 4 * fmt.weights), np.random.default_rng(1)).data, np.uint8)
    for block in packed.reshape(-1, fmt.nbytes):
        weights = np.abs(dequantize(block, fmt)).max()
        if weights == 0:
            continue
        # scaled until the weights reach the limit; then the bound must have been reached before
        _, largest = _bound(block, fmt)
        assert largest >= weights * (1 - 1e-6)


def _bound(block, fmt):
    """The bound of one block, whatever the limit."""
    import zimage_core.weights.scan as module

    limit, module.FLOAT16_MAX = module.FLOAT16_MAX, -1.0
    try:
        return _blocks(memoryview(block.tobytes()), fmt)
    finally:
        module.FLOAT16_MAX = limit


def test_scales_that_allow_more_than_float16_are_a_warning(tmp_path):
    (text,) = scanned(tmp_path, w=patched("Q6_K", "d", 0x7BFF))
    assert text == (
        "tensor w: 1 of 16 blocks can exceed the range of float16 (65504), magnitudes up to 2.683e+08"
    )


@pytest.mark.parametrize("order", ["<", ">"])
def test_plain_numbers_are_judged_one_by_one(tmp_path, order):
    values = {}
    for code in ("float64", "float32"):
        array = np.zeros((50, 100), code)
        array[3, 4], array[5, 6], array[7, 8:10], array[1, 1] = np.nan, -np.inf, (-65536, 1e6), 65504
        values[code] = array
    values["float16"] = np.zeros((50, 100), np.float16)
    values["float16"][2, :2] = np.nan, np.inf
    values["fine"] = np.full((4, 4), -65504, np.float16)
    with open_weights(write_gguf(tmp_path / "a.gguf", values, order=order)) as file:
        found = {finding.tensor: finding for finding in findings(file)}
    assert set(found) == {"float64", "float32", "float16"}
    for code in ("float64", "float32"):
        finding = found[code]
        assert (finding.nan, finding.inf, finding.range, finding.largest) == (1, 1, 2, 1e6)
        assert str(finding) == (
            f"tensor {code}: 1 NaN and 1 Inf of 5000 values; "
            "2 of 5000 values exceed the range of float16 (65504), magnitudes up to 1e+06"
        )
    assert str(found["float16"]) == "tensor float16: 1 NaN and 1 Inf of 5000 values"


@pytest.mark.parametrize(
    ("dtype", "data", "wanted"),
    [
        ("BF16", b"\x80\x7f\xc0\x7f\x80\x47\x7f\x47", ["1 NaN and 1 Inf of 4 values; 1 of 4 values exceed"]),
        ("F8_E4M3", b"\x7f\xff\x7e\xfe", ["2 NaN of 4 values"]),
        ("F8_E5M2", b"\x7c\xfd\x7b\xfb", ["1 NaN and 1 Inf of 4 values"]),
        ("BOOL", b"\x00\x01\x02\xff", ["2 of 4 values are neither 0 nor 1"]),
        ("I8", b"\x7f\xff\x80\x00", []),
        ("U8", b"\x7f\xff\x80\x00", []),
    ],
)
def test_the_types_of_safetensors(tmp_path, dtype, data, wanted):
    path = write_safetensors(tmp_path / "a.safetensors", {"a": (dtype, [4], data)})
    with open_weights(path) as file:
        got = scan(file)
    assert len(got) == len(wanted)
    assert all(text.startswith(f"tensor a: {start}") for text, start in zip(got, wanted, strict=True))


def test_names_are_escaped(tmp_path):
    from zimage_core.weights.scan import Finding

    assert "\x1b" not in str(Finding("a\x1b[2J", "values", 1, nan=1))


def test_a_scan_takes_little_memory_and_sees_every_chunk(tmp_path):
    big = np.zeros((3 * _CHUNK // 4 + 5,), np.float32)
    big[-1] = np.nan
    path = write_gguf(tmp_path / "a.gguf", {"w": big})
    del big
    with open_weights(path) as file:
        tracemalloc.start()
        got = scan(file)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert got == [f"tensor w: 1 NaN of {3 * _CHUNK // 4 + 5} values"]
    assert peak < 3 * _CHUNK


def test_a_file_cut_or_changed_meanwhile_is_an_error(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {"w": np.zeros((64, 64), np.float32)})
    with open_weights(path) as file:
        os.truncate(path, 4096)
        with pytest.raises(BadFile, match="truncated while it was read"):
            scan(file)
    path = write_gguf(tmp_path / "a.gguf", {"w": np.zeros((64, 64), np.float32)})
    with open_weights(path) as file:
        os.utime(path, ns=(1, 1))
        with pytest.raises(BadFile, match="changed while in use"):
            scan(file)


def test_long_runs_of_zeros_are_found_in_matrices_of_every_kind_of_type(tmp_path):
    rng = np.random.default_rng(0)
    names = ("Q8_0", "Q4_K", "IQ2_XS", "MXFP4")
    tensors = {name: random_packed(name, (512, 2048), rng) for name in names}
    holed = {}
    for name, tensor in tensors.items():
        data = bytearray(tensor.data)
        data[50_000:130_000] = bytes(80_000)
        holed[f"holed.{name}"] = Packed(tensor.format, tensor.shape, bytes(data))
    plain = rng.normal(size=(512, 512)).astype(np.float32)
    zero = np.zeros((64, 64), np.float16)
    dead = plain.copy()
    dead[100:110] = 0  # ten dead channels, 20 kB
    vector, small = np.zeros(1 << 17, np.float32), np.zeros((16, 16), np.float32)
    got = scanned(tmp_path, **tensors, **holed, dead=dead, bias=vector, small=small, all=zero)
    assert [text.split(":")[0] for text in got[:-1]] == [*(f"tensor {name}" for name in holed), "tensor all"]
    assert all("a run of 73.7 kB is zero" in text for text in got[:4])
    assert got[4] == "tensor all: all 4096 values are zero"
    assert "download it again" in got[5]


def test_a_run_of_zeros_goes_on_through_chunks(tmp_path):
    fmt = FORMATS["Q8_0"]
    shape = (80, 1 << 17)
    data = bytearray(b"\x01" * (shape[0] * fmt.row_bytes(shape[1])))
    data[_CHUNK - (40 << 10) : _CHUNK + (40 << 10)] = bytes(80 << 10)
    (text, _) = scanned(tmp_path, w=Packed(fmt, shape, bytes(data)))
    assert re.fullmatch(r"tensor w: a run of (77|81)\.\d kB is zero", text)
