"""Test weights are valid and of the wanted size; the simple quantisers are ggml's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.blocks import every_format
from zimage_core.errors import BadShape, UnknownFormat, Unsupported
from zimage_core.formats import FORMATS
from zimage_core.reference.dequantize import dequantize
from zimage_core.reference.encode import ENCODERS, encode, random_blocks

gguf = pytest.importorskip("gguf")


@every_format
@pytest.mark.parametrize("std", [0.005, 0.02, 0.5])
def test_random_blocks_have_mean_zero_and_the_wanted_deviation(fmt, std):
    packed = random_blocks(fmt, (64, 1024), np.random.default_rng(1), std)
    assert packed.shape == (64, fmt.row_bytes(1024))
    weights = dequantize(packed, fmt).astype(np.float64)
    assert np.isfinite(weights).all()
    wanted = max(std, 16.0) if fmt.is_integer else std
    # 256 scales or more are drawn: 10 % is four standard errors of the deviation. NVFP4 has no scale
    # between 2^-9 and 2^-10, where a deviation of 0.005 would need it
    rel = 0.25 if fmt.name == "NVFP4" else 0.1
    assert weights.std() == pytest.approx(wanted, rel=rel)
    assert abs(weights.mean()) < 0.1 * wanted
    assert np.abs(weights).max() < 12 * wanted  # no outlier that a trained matrix would not have


@every_format
def test_random_blocks_repeat_with_their_seed_and_use_all_codes(fmt):
    first, again = (random_blocks(fmt.name, (3, 768), np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (random_blocks(fmt, (3, 768), np.random.default_rng(6)) != first).any()
    assert first.flags.writeable


def test_random_blocks_refuse_bad_requests():
    rng = np.random.default_rng(0)
    with pytest.raises(BadShape, match="multiple of 256"):
        random_blocks("Q4_K", (4, 100), rng)
    with pytest.raises(BadShape, match="at least one axis"):
        random_blocks("Q4_K", (), rng)
    with pytest.raises(UnknownFormat):
        random_blocks("Q4", (4, 256), rng)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-3, 0.02, 1.0, 300.0]))
def test_encode_is_what_gguf_writes(name, seed, scale):
    weights = (np.random.default_rng(seed).standard_normal((3, 64)) * scale).astype(np.float32)
    weights[0, :32] = 0
    theirs = gguf.quantize(weights, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(encode(weights, name), theirs.view(np.uint8).reshape(3, -1))


@pytest.mark.parametrize(
    ("name", "dtype", "step"),
    [
        ("BF16", torch.bfloat16, 2**-7),
        ("F16", torch.float16, 2**-10),
        ("F8_E5M2", torch.float8_e5m2, 2**-2),
        ("F8_E4M3", torch.float8_e4m3fn, 2**-3),
    ],
)
def test_halfway_values_go_to_the_even_neighbour(name, dtype, step):
    weights = (1 + step * np.arange(0, 8, 0.5) / 2).astype(np.float32)
    weights = np.concatenate([weights, -weights, weights * 2**-14])
    wanted = torch.from_numpy(weights).to(dtype).view(torch.uint8).numpy()
    np.testing.assert_array_equal(encode(weights, name), wanted)


@pytest.mark.parametrize(
    ("name", "dtype"), [("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)]
)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-4, 0.02, 1.0, 100.0]))
def test_encode_of_fp8_is_what_torch_rounds_to(name, dtype, seed, scale):
    # float16 values: encode rounds to E5M2 through float16, which is exact for them
    weights = (np.random.default_rng(seed).standard_normal(256) * scale).astype(np.float16).astype(np.float32)
    weights[:4] = 0.0, -0.0, 448.0, -448.0
    weights = np.clip(weights, -448, 448)
    wanted = torch.from_numpy(weights).to(dtype).view(torch.uint8).numpy()
    np.testing.assert_array_equal(encode(weights, name), wanted)


@pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2", "F32", "F16", "F64", "BF16"])
def test_encode_keeps_nan(name):
    assert np.isnan(dequantize(encode(np.full(4, np.nan, np.float32), name), name)).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_encoding_decoded_weights_again_changes_little(name):
    """Once on the grid of the format, weights stay within one rounding of the scale."""
    fmt = FORMATS[name]
    rng = np.random.default_rng(7)
    weights = (rng.standard_normal((4, 256)) * (20 if fmt.is_integer else 0.05)).astype(np.float32)
    once = dequantize(encode(weights, name), name)
    twice = dequantize(encode(once, name), name)
    levels = min(2 ** int(fmt.bits_per_weight), 2**16)
    np.testing.assert_allclose(twice, once, atol=4 * float(np.abs(weights).max()) / levels, rtol=0)
    error = float(np.sqrt(np.mean((once - weights) ** 2)) / weights.std())
    # Q4_0 0.09, F8_E5M2 with its two bits of mantissa 0.052, the others less
    assert error < (0.12 if fmt.bits_per_weight < 6 else 0.06)


@pytest.mark.parametrize("name", ["I8", "I16", "I32", "I64"])
def test_integers_saturate(name):
    ends = dequantize(encode(np.array([-1e30, -2.4, 2.6, 1e30], np.float32), name), name)
    limits = np.iinfo(f"int{8 * FORMATS[name].nbytes}")
    np.testing.assert_array_equal(ends, np.array([limits.min, -2, 3, limits.max], np.float32))


def test_formats_without_a_quantiser_say_so():
    with pytest.raises(Unsupported, match="no simple quantiser for IQ2_S"):
        encode(np.zeros((1, 256), np.float32), "IQ2_S")
    with pytest.raises(BadShape, match="multiple of 32"):
        encode(np.zeros((1, 33), np.float32), "Q8_0")
    with pytest.raises(BadShape, match="at least one axis"):
        encode(np.float32(1).reshape(()), "Q8_0")
    assert encode(np.zeros((0, 32), np.float32), "Q8_0").shape == (0, 34)
