"""What `zimage_core.encode` accepts and refuses, and that slabs and threads change no bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import zimage_core
from tests.helpers.quantized import BLOCK_TYPES, importance, weights
from zimage_core.errors import BadArgument, BadShape, BadWeights, UnknownFormat, Unsupported
from zimage_core.formats import FORMATS, by_name
from zimage_core.quantize import encode as encode_module
from zimage_core.quantize.encode import ENCODERS, encode

NUMBERS = ("F32", "F16", "BF16")


@pytest.fixture(scope="module")
def x():
    return torch.from_numpy(weights("student", (6, 512)))


@pytest.fixture(scope="module")
def costs():
    return torch.from_numpy(importance(512))


def test_every_format_has_an_encoder_or_says_so():
    for name in FORMATS:
        if name not in ENCODERS:
            with pytest.raises(Unsupported, match=f"{name} has no encoder; use one of F32"):
                encode(torch.zeros(1, 256), name)
    assert set(ENCODERS) >= {*NUMBERS, *BLOCK_TYPES}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_the_public_function_and_dequantize_are_inverse(name, weighted, x, costs):
    """Errors stay below that of ternary weights without importance, 0.83, the largest of all formats."""
    packed = zimage_core.encode(x.view(2, 3, 512), name, costs if weighted else None)
    back = zimage_core.dequantize(packed, name)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, FORMATS[name].row_bytes(512))
    assert back.shape == (2, 3, 512)
    assert (back.view_as(x) - x).norm() < 0.9 * x.norm()


@pytest.mark.parametrize("name", [*NUMBERS, *BLOCK_TYPES])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_slabs_rows_and_threads_change_no_bit(name, weighted, x, costs, monkeypatch):
    costs = costs if weighted else None
    whole = encode(x, name, costs)
    assert whole.shape == (6, by_name(name).row_bytes(512))
    assert whole.dtype == torch.uint8
    alone = torch.stack([encode(row, name, costs) for row in x])
    torch.testing.assert_close(alone, whole, rtol=0, atol=0)
    monkeypatch.setattr(encode_module, "SLAB", 256)  # half a row: importance has to follow the columns
    torch.testing.assert_close(encode(x, name, costs), whole, rtol=0, atol=0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.testing.assert_close(encode(x, name, costs), whole, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_types_are_read_as_float32(dtype, x, costs):
    other = x.to(dtype)
    assert torch.equal(encode(other, "Q4_K", costs), encode(other.float(), "Q4_K", costs))


def test_leading_axes_strides_and_gradients_do_not_matter(x, costs):
    want = encode(x, "Q3_K", costs)
    assert torch.equal(encode(x.view(2, 3, 512), "Q3_K", costs), want.view(2, 3, -1))
    assert torch.equal(encode(x.t().contiguous().t().requires_grad_(), "Q3_K", costs), want)
    assert torch.equal(encode(x, by_name("Q3_K"), costs), want)


def test_only_ratios_of_importance_count(x, costs):
    assert torch.equal(encode(x, "Q4_K", costs * 2**40), encode(x, "Q4_K", costs))
    assert torch.equal(encode(x, "Q4_K", torch.ones(512)), encode(x, "Q4_K"))


def test_nothing_to_encode(x):
    assert encode(x[:0], "Q4_K").shape == (0, 288)
    assert encode(torch.zeros(3, 0), "Q4_K").shape == (3, 0)


@pytest.mark.parametrize(
    ("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")]
)
def test_weights_that_are_no_numbers_are_counted_and_placed(value, shown, x):
    bad = x.clone()
    bad[2, 300] = bad[4, 1] = bad[5, 511] = value
    with pytest.raises(BadWeights, match=f"3 of 3072 weights are NaN.* {shown} in row 2, column 300;"):
        encode(bad, "Q4_K")


def test_a_float64_beyond_float32_is_refused(x):
    bad = x.double()
    bad[1, 7] = 1e39
    with pytest.raises(BadWeights, match=r"1 of 3072 .* 1e\+39 in row 1, column 7"):
        encode(bad, "Q8_0")


def test_float16_does_not_turn_large_weights_into_infinities(x):
    bad = x.clone()
    bad[0, 5] = 65519  # still rounds to 65504
    assert encode(bad, "F16").view(torch.float16).isfinite().all()
    bad[3, 9] = 65520
    with pytest.raises(BadWeights, match=r"1 of 3072 weights are beyond the range of F16.*use BF16"):
        encode(bad, "F16")
    bad[0, 1] = float("nan")
    with pytest.raises(BadWeights, match=r"NaN, infinite or beyond.*the first is nan in row 0, column 1"):
        encode(bad, "F16")


def test_bad_arguments_are_named(x, costs):
    with pytest.raises(UnknownFormat):
        encode(x, "Q4")
    with pytest.raises(BadArgument, match=r"weights must be a torch\.Tensor of floats, not ndarray"):
        encode(x.numpy(), "Q4_K")
    with pytest.raises(BadArgument, match=r"importance must be a torch\.Tensor of floats, not list"):
        encode(x, "Q4_K", [1.0] * 512)
    with pytest.raises(BadArgument, match=r"weights must be floating point, not torch\.int32"):
        encode(x.int(), "Q4_K")
    with pytest.raises(BadShape, match="multiple of 256"):
        encode(x[:, :300], "Q4_K")
    with pytest.raises(BadShape, match="at least one axis"):
        encode(torch.tensor(1.0), "F32")
    with pytest.raises(BadShape, match=r"each of the 512 weights of a row, not the shape \(511,\)"):
        encode(x, "Q4_K", costs[1:])
    with pytest.raises(BadArgument, match="importance must be floating point"):
        encode(x, "Q4_K", costs.int())
    for value in (-1.0, float("nan"), float("inf")):
        broken = costs.clone()
        broken[17] = value
        with pytest.raises(BadArgument, match=f"1 of 512 numbers are not, the first is {value} at index 17"):
            encode(x, "Q4_K", broken)


def test_slabs_cover_every_block_once_and_none_is_larger_than_a_slab():
    fmt = by_name("Q5_K")
    boxes = encode_module._boxes(torch.Size((3000, 3840)), fmt, encode_module.SLAB)
    assert max((r.stop - r.start) * (c.stop - c.start) for r, c in boxes) <= encode_module.SLAB
    boxes = encode_module._boxes(torch.Size((2, 2**20 + 256)), fmt, encode_module.SLAB)
    assert max((r.stop - r.start) * (c.stop - c.start) for r, c in boxes) <= encode_module.SLAB
    covered = np.zeros((2, 4097), int)  # blocks
    for rows, columns in boxes:
        covered[rows, columns.start // 256 : columns.stop // 256] += 1
    assert (covered == 1).all()
