"""The reference is ggml's arithmetic, bit for bit."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.blocks import assert_same_bits, every_format, packed_rows
from zimage_core.errors import BadArgument, BadShape, UnknownFormat
from zimage_core.formats import FORMATS
from zimage_core.reference.blocks import as_blocks, block_dtype
from zimage_core.reference.dequantize import DEQUANTIZERS, dequantize
from zimage_core.reference.encode import finite_scales

gguf = pytest.importorskip("gguf")
GOLDEN = json.loads((Path(__file__).parent / "golden" / "blocks.json").read_text(encoding="utf-8"))


def _gguf_decodes(fmt):
    if fmt.ggml_type is None or fmt.name in ("Q1_0", "Q2_0"):
        return False
    return fmt.name in ("F32", "F16") or gguf.GGMLQuantizationType(fmt.ggml_type) in gguf.quants._type_traits


DECODED_BY_GGUF = [fmt for fmt in FORMATS.values() if _gguf_decodes(fmt)]
every_format_of_gguf = pytest.mark.parametrize("fmt", DECODED_BY_GGUF, ids=[f.name for f in DECODED_BY_GGUF])


def _theirs(packed, fmt):
    with np.errstate(all="ignore"):
        return gguf.dequantize(packed.copy(), gguf.GGMLQuantizationType(fmt.ggml_type)).astype(np.float32)


def test_every_format_has_a_dequantiser_and_an_oracle():
    assert list(DEQUANTIZERS) == list(FORMATS), "reference/dequantize.py and formats.py disagree"
    assert len(DECODED_BY_GGUF) == 26
    assert set(GOLDEN) == set(FORMATS) - {fmt.name for fmt in DECODED_BY_GGUF}


@every_format_of_gguf
@given(data=st.data())
def test_any_bytes_with_finite_scales_are_what_gguf_says(fmt, data):
    packed = data.draw(packed_rows(fmt))
    assert_same_bits(dequantize(packed, fmt.name), _theirs(packed, fmt), fmt)


@every_format_of_gguf
@given(data=st.data())
def test_any_bytes_at_all_are_what_gguf_says(fmt, data):
    packed = data.draw(packed_rows(fmt, finite=False))
    assert_same_bits(dequantize(packed, fmt.name), _theirs(packed, fmt), fmt)


@every_format_of_gguf
def test_many_random_blocks_are_what_gguf_says(fmt):
    packed = np.random.default_rng(fmt.ggml_type).integers(0, 256, (16, 64 * fmt.nbytes), dtype=np.uint8)
    assert_same_bits(dequantize(packed, fmt.name), _theirs(packed, fmt), fmt)


@every_format_of_gguf
@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x7F, 0x80, 0x55])
def test_blocks_of_one_byte_value_are_what_gguf_says(fmt, byte):
    packed = np.full((2, 3 * fmt.nbytes), byte, np.uint8)
    assert_same_bits(dequantize(packed, fmt.name), _theirs(packed, fmt), fmt)


@every_format_of_gguf
@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -0.0, 6e-8, 65504.0])
def test_special_scales_are_what_gguf_says(fmt, scale):
    packed = np.random.default_rng(1).integers(0, 256, (2, 4 * fmt.nbytes), dtype=np.uint8)
    blocks = as_blocks(packed, fmt)
    for field in fmt.fields:
        if field.code == "f2":
            blocks[field.name] = scale
        elif (fmt.name, field.name) == ("IQ1_M", "scales"):
            bits = np.float16(scale).view(np.uint16) >> np.array([0, 4, 8, 12], np.uint16)
            blocks["scales"] = (blocks["scales"] & 0x0FFF) | (bits << 12)
    assert_same_bits(dequantize(packed, fmt.name), _theirs(packed, fmt), fmt)


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_every_code_of_a_byte_scale_is_what_gguf_says(name):
    fmt = FORMATS[name]
    packed = np.tile(np.arange(fmt.nbytes, dtype=np.uint8) * 16 + 1, (256, 1))
    packed[:, : fmt.fields[0].count] = np.arange(256, dtype=np.uint8)[:, None]
    assert_same_bits(dequantize(packed, name), _theirs(packed, fmt), fmt)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_blocks(name):
    fmt = FORMATS[name]
    packed = np.frombuffer(bytes.fromhex(GOLDEN[name]["packed"]), np.uint8).reshape(-1, fmt.nbytes)
    weights = np.frombuffer(bytes.fromhex(GOLDEN[name]["weights"]), "<f4").reshape(-1, fmt.weights)
    assert_same_bits(dequantize(packed, name), weights, fmt)


def test_the_golden_file_is_what_its_maker_computes():
    maker = runpy.run_path(str(Path(__file__).parent / "golden" / "make.py"))
    assert maker["golden"]() == GOLDEN


def test_q1_0_by_hand():
    block = np.array([0x00, 0x38, 0b00000101, *[0] * 14, 0b10000000], np.uint8)  # 0x3800 is 0.5
    wanted = np.full(128, -0.5, np.float32)
    wanted[[0, 2, 127]] = 0.5
    np.testing.assert_array_equal(dequantize(block, "Q1_0"), wanted)


@pytest.mark.parametrize("name", ["Q2_0", "Q2_0_128"])
def test_q2_0_by_hand(name):
    block = np.full(FORMATS[name].nbytes, 0b01010101, np.uint8)
    block[:3] = 0x00, 0x38, 0b11100100  # d = 0.5; codes 0, 1, 2, 3 in the first byte
    wanted = np.zeros(FORMATS[name].weights, np.float32)
    wanted[:4] = -0.5, 0, 0.5, 1
    np.testing.assert_array_equal(dequantize(block, name), wanted)


@pytest.mark.parametrize(
    ("name", "dtype", "codes"),
    [
        ("F8_E4M3", torch.float8_e4m3fn, np.arange(256, dtype=np.uint8)),
        ("F8_E5M2", torch.float8_e5m2, np.arange(256, dtype=np.uint8)),
        ("F16", torch.float16, np.arange(2**16, dtype=np.uint16)),
        ("BF16", torch.bfloat16, np.arange(2**16, dtype=np.uint16)),
    ],
)
def test_every_code_of_a_small_float_is_what_torch_says(name, dtype, codes):
    packed = codes.view(np.uint8)
    wanted = torch.from_numpy(packed.copy()).view(dtype).float().numpy()
    assert_same_bits(dequantize(packed, name), wanted, FORMATS[name])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("I8", torch.int8),
        ("I16", torch.int16),
        ("I32", torch.int32),
        ("I64", torch.int64),
        ("F64", torch.float64),
        ("F32", torch.float32),
    ],
)
def test_plain_numbers_are_what_torch_says(name, dtype):
    packed = np.random.default_rng(2).integers(0, 256, (4, 64 * FORMATS[name].nbytes), dtype=np.uint8)
    wanted = torch.from_numpy(packed.copy()).view(dtype).to(torch.float32).numpy()
    assert_same_bits(dequantize(packed, name), wanted, FORMATS[name])


@every_format
@given(data=st.data())
def test_strategy_makes_finite_weights_of_any_shape(fmt, data):
    packed = data.draw(packed_rows(fmt))
    before = packed.copy()
    weights = dequantize(packed, fmt)
    assert weights.shape == (packed.shape[0], packed.shape[1] // fmt.nbytes * fmt.weights)
    assert weights.dtype == np.float32
    assert np.isfinite(weights).all()
    np.testing.assert_array_equal(packed, before)


@every_format
def test_strategy_leaves_all_bits_but_one_of_a_float_alone(fmt):
    rng = np.random.default_rng(3)
    packed = rng.integers(0, 256, (64, 8 * fmt.nbytes), dtype=np.uint8)
    changed = np.unpackbits(packed ^ finite_scales(packed, fmt)).mean()
    floats = sum(field.count for field in fmt.fields if field.code[0] == "f")
    special = fmt.name in ("BF16", "F8_E4M3", "F8_E5M2", "IQ1_M", "MXFP4")
    assert changed == pytest.approx((floats + special) / 2 / (8 * fmt.nbytes), rel=0.2)


@every_format
@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3), (2, 0, 3)])
def test_leading_axes_are_kept(fmt, lead):
    for blocks in (0, 1, 3):
        packed = np.zeros((*lead, blocks * fmt.nbytes), np.uint8)
        assert dequantize(packed, fmt.name).shape == (*lead, blocks * fmt.weights)


@every_format
def test_rows_do_not_depend_on_each_other_or_on_the_memory_layout(fmt):
    rng = np.random.default_rng(4)
    packed = finite_scales(rng.integers(0, 256, (5, 3 * fmt.nbytes), dtype=np.uint8), fmt)
    whole = dequantize(packed, fmt)
    for row in range(5):
        assert_same_bits(dequantize(packed[row], fmt), whole[row], fmt)
    assert_same_bits(dequantize(packed[::2], fmt), whole[::2], fmt)
    assert_same_bits(dequantize(np.asfortranarray(packed), fmt), whole, fmt)
    frozen = packed.copy()
    frozen.flags.writeable = False
    assert_same_bits(dequantize(frozen, fmt), whole, fmt)


@every_format
def test_structured_dtype_has_the_offsets_of_the_descriptor(fmt):
    dtype = block_dtype(fmt)
    assert dtype.itemsize == fmt.nbytes
    for field in fmt.fields:
        assert dtype.fields[field.name][1] == fmt.offset(field.name)


@pytest.mark.parametrize("name", ["Q4_k", "Q4_K_M", "", 12, None])
def test_unknown_name_is_refused(name):
    with pytest.raises(UnknownFormat, match="unknown format"):
        dequantize(np.zeros(144, np.uint8), name)


@pytest.mark.parametrize(
    "packed", [np.zeros(144, np.int8), np.zeros(144, np.float32), [0] * 144, bytes(144), torch.zeros(144)]
)
def test_data_that_is_not_uint8_is_refused(packed):
    with pytest.raises(BadArgument, match="must be a NumPy array of uint8, found"):
        dequantize(packed, "Q4_K")


@every_format
def test_rows_that_are_not_whole_blocks_are_refused(fmt):
    with pytest.raises(BadShape, match=rf"packed {fmt.name} data of shape \(\)"):
        dequantize(np.zeros((), np.uint8), fmt)
    if fmt.nbytes > 1:
        with pytest.raises(BadShape, match=f"not whole blocks of {fmt.nbytes} bytes"):
            dequantize(np.zeros((2, fmt.nbytes + 1), np.uint8), fmt)
