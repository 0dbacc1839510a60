"""Defends: few rows times a weight in another form are the product with the dequantised weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.blocks import every_format
from zimage_core.cpu import capability, int4, packed_int8
from zimage_core.errors import BadArgument
from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.quant import few_rows, int8, ops
from zimage_core.quant.few_rows import FewRows
from zimage_core.quant.tensor import QuantTensor
from zimage_core.reference.encode import finite_scales

N = 83
"""Rows of the weights: no multiple of what torch packs together."""

LIMITS = {"bfloat16": 2.0**-7, "exact": 2.0**-15, "int8": 2.0**-5}
"""Relative error of a product. In bfloat16 x, scale, zero and result are rounded by 2^-9 each at most. In the
exact mode each of them keeps 2^-17, and float32 sums of 1,000 numbers are better than that. int8 rounds x and
W to 1/254 of the largest of a row: 4 times the root mean square of Gaussian numbers, and more than that of
blocks of different scales."""


def weight_of(fmt: BlockFormat, blocks: int = 2, seed: int = 0, rows: int = N) -> QuantTensor:
    width = max(fmt.weights, 256) * blocks
    raw = np.random.default_rng(seed).integers(0, 256, (rows, fmt.row_bytes(width)), dtype=np.uint8)
    if fmt.name.startswith(("F", "BF")):  # any bytes would be numbers of any size
        dense = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
        names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
        names |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
        return QuantTensor(dense.to(names[fmt.name]).view(torch.uint8), fmt, (rows, width))
    return QuantTensor(torch.from_numpy(finite_scales(raw, fmt)), fmt, (rows, width))


def relative(got: torch.Tensor, x: torch.Tensor, weight: QuantTensor) -> float:
    """The error's norm over that of a product of independent numbers of this size: few may cancel out."""
    dense = weight.dequantize().double()
    wanted = x.double() @ dense.t()
    return float((got.double() - wanted).norm() / (x.norm() * dense.norm() / x.shape[1] ** 0.5))


def rows_of(count: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _every_form_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms are the same on CPUs where they are slow."""
    for name in ("bfloat16_pays", "int4_pays", "int8_one_row_pays", "int8_pays"):
        monkeypatch.setattr(few_rows, name, lambda: True)


def prepared(weight: QuantTensor, mode: str) -> FewRows:
    found = few_rows.prepare(weight, mode)
    assert found is not None
    return found


@every_format
@pytest.mark.parametrize("mode", LIMITS)
def test_products_of_every_format(fmt: BlockFormat, mode: str) -> None:
    weight = weight_of(fmt)
    found = few_rows.prepare(weight, mode)
    if found is None:  # plain numbers, which are widened as they are
        assert mode == "exact"
        assert fmt.is_float or fmt.is_integer
        return
    assert found.mode == mode
    x = rows_of(3, weight.shape[1])
    assert relative(found(x), x, weight) < LIMITS[mode]


@settings(max_examples=25, deadline=None)
@given(
    fmt=st.sampled_from(["Q4_1", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "IQ4_XS", "TQ2_0"]),
    seed=st.integers(0, 1 << 16),
    rows=st.integers(1, 130),
    blocks=st.integers(1, 5),
    count=st.integers(1, few_rows.MOST),
)
def test_any_size_and_any_bytes(fmt: str, seed: int, rows: int, blocks: int, count: int) -> None:
    weight = weight_of(FORMATS[fmt], blocks, seed, rows)
    x = rows_of(count, weight.shape[1], seed)
    for mode in ("bfloat16", "exact"):
        assert relative(prepared(weight, mode)(x), x, weight) < LIMITS[mode]


@pytest.mark.parametrize("mode", LIMITS)
@pytest.mark.parametrize("fmt", ["Q4_K", "Q6_K"])
def test_x_may_lie_in_memory_in_any_way(fmt: str, mode: str) -> None:
    few = prepared(weight_of(FORMATS[fmt]), mode)
    for x in (rows_of(3, few.shape[1]), rows_of(3, few.shape[1]).bfloat16()):
        wanted, wide = few(x), torch.zeros(3, 2 * few.shape[1], dtype=x.dtype)
        wide[:, ::2] = x
        for other in (x.t().contiguous().t(), wide[:, ::2]):
            assert torch.equal(few(other), wanted)


def test_two_digits_hold_every_code() -> None:
    """Codes of -128 to 127 under a scale of 1, one at a time: bfloat16 holds each of them."""
    fmt = FORMATS["Q8_0"]
    raw = np.zeros((256, fmt.nbytes), np.uint8)
    raw[:, 1] = 0x3C  # 1.0
    raw[:, 2] = np.arange(256)
    weight = QuantTensor(torch.from_numpy(raw), fmt, (256, 32))
    x = torch.zeros(1, 32)
    x[0, 0] = 1
    wanted = torch.arange(256).to(torch.uint8).view(torch.int8).float()
    assert torch.equal(prepared(weight, "bfloat16")(x)[0], wanted)


def test_an_order_of_torch_that_is_not_known_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own conversion gives the same nibbles."""
    weight = weight_of(FORMATS["Q5_K"])
    x = rows_of(1, weight.shape[1])
    wanted = prepared(weight, "bfloat16")(x)
    monkeypatch.setattr(int4, "_height", lambda: 0)
    assert torch.equal(prepared(weight, "bfloat16")(x), wanted)


@pytest.mark.parametrize("mode", LIMITS)
def test_a_scale_beside_the_weight(mode: str) -> None:
    weight = weight_of(FORMATS["Q4_K"])
    weight = weight.like(weight.packed, scale=torch.linspace(0.5, 2, N))
    x = rows_of(2, weight.shape[1])
    assert relative(prepared(weight, mode)(x), x, weight) < LIMITS[mode]


@pytest.mark.parametrize("mode", ["bfloat16", "int8"])
def test_rotated_int8_rows_of_a_file_take_no_memory(mode: str) -> None:
    dense = rows_of(N, 384, seed=5)
    weight = int8.quantize_weight(dense, 64)
    found = prepared(weight, mode)
    x = rows_of(2, 384)
    assert found.nbytes == 0
    assert relative(found(x), x, weight) < LIMITS[mode]


def test_bfloat16_rows_of_a_file_are_not_copied() -> None:
    weight = weight_of(FORMATS["BF16"])
    found = prepared(weight, "bfloat16")
    assert found.nbytes == 0
    assert found.product.weight.data_ptr() == weight.packed.data_ptr()  # type: ignore[attr-defined]


@pytest.mark.parametrize("fmt", ["Q4_K", "Q6_K", "Q2_K", "TQ2_0"])
@pytest.mark.parametrize("mode", ["bfloat16", "exact"])
def test_the_bytes_are_known_before(fmt: str, mode: str) -> None:
    weight = weight_of(FORMATS[fmt])
    form = few_rows.form_of(weight, mode)
    assert form is not None
    assert form.nbytes == prepared(weight, mode).product.planes.nbytes  # type: ignore[attr-defined]


def test_a_bad_x_leaves_no_trace_in_the_exact_form() -> None:
    """The exact form writes its first result into its own scales."""
    weight = weight_of(FORMATS["Q4_K"])
    found = prepared(weight, "exact")
    x = rows_of(1, weight.shape[1])
    wanted = found(x)
    assert not found(torch.full_like(x, float("nan"))).isfinite().any()
    assert torch.equal(found(x), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_result_has_the_dtype_and_axes_of_x(dtype: torch.dtype) -> None:
    weight = weight_of(FORMATS["Q6_K"])
    x = rows_of(4, weight.shape[1]).to(dtype).view(2, 2, -1)
    for mode in LIMITS:
        got = prepared(weight, mode)(x)
        assert got.dtype == dtype
        assert got.shape == (2, 2, N)


def test_a_form_outlives_inference_mode() -> None:
    weight = weight_of(FORMATS["Q4_K"])
    with torch.inference_mode():
        found = prepared(weight, "exact")
    with torch.no_grad():
        assert found(rows_of(1, weight.shape[1])).isfinite().all()


def test_slow_nibbles_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without AVX2: dense float32, which is the exact product."""
    for name in ("int4_pays", "bfloat16_pays", "packed_int8_pays"):
        monkeypatch.setattr(few_rows, name, lambda: False)
    weight = weight_of(FORMATS["Q4_K"])
    x = rows_of(1, weight.shape[1])
    found = prepared(weight, "auto")
    assert found.mode == "exact"
    assert found.nbytes == 4 * weight.shape[0] * weight.shape[1]
    torch.testing.assert_close(found(x), ops.linear(x, weight), rtol=1e-5, atol=1e-5 * float(found(x).norm()))


@pytest.mark.parametrize(
    ("fmt", "mode"), [("Q4_K", "bfloat16"), ("Q6_K", "int8"), ("Q8_0", "int8"), ("BF16", "bfloat16")]
)
def test_auto_takes_int8_for_more_than_four_bits(
    fmt: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_rows, "packed_int8_pays", lambda: True)
    form = few_rows.form_of(weight_of(FORMATS[fmt]), "auto")
    assert form is not None
    assert form.mode == mode


def test_without_fbgemm_int8_rows_are_multiplied_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "packed_int8_pays", lambda: False)
    weight = weight_of(FORMATS["Q6_K"])
    x = rows_of(3, weight.shape[1])
    assert relative(prepared(weight, "int8")(x), x, weight) < LIMITS["int8"]


def test_nan_comes_through() -> None:
    """FBGEMM refuses NaN; the network's own check names the step."""
    weight = weight_of(FORMATS["Q6_K"])
    for mode in LIMITS:
        assert prepared(weight, mode)(torch.full((1, weight.shape[1]), float("nan"))).isnan().all()


def test_dense_weights_and_other_devices_stay() -> None:
    assert few_rows.prepare(torch.zeros(4, 32), "bfloat16") is None
    assert few_rows.prepare(weight_of(FORMATS["Q4_K"]).to("meta"), "bfloat16") is None


def test_an_unknown_mode_names_the_known_ones() -> None:
    with pytest.raises(BadArgument, match="auto, bfloat16, exact, int8"):
        few_rows.prepare(weight_of(FORMATS["Q4_K"]), "fp4")


def test_rates_are_measured_once() -> None:
    found = capability.rates_of_one_row()
    assert found.float32 > 0
    assert found.int4 >= 0
    assert found is capability.rates_of_one_row()


@pytest.mark.skipif(
    packed_int8.ENGINE not in torch.backends.quantized.supported_engines, reason="this torch has no FBGEMM"
)
@pytest.mark.parametrize("fmt", ["Q6_K", "Q8_0"])
def test_rows_are_packed_piece_by_piece_with_the_same_product(
    fmt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_rows, "packed_int8_pays", lambda: True)
    weight = weight_of(FORMATS[fmt])
    whole, x = prepared(weight, "int8"), rows_of(3, weight.shape[1])
    monkeypatch.setattr(packed_int8, "ROWS", 16)
    pieces = prepared(weight, "int8")
    assert len(pieces.product.rows) > len(whole.product.rows) == 1
    assert torch.equal(pieces(x), whole(x))
    assert pieces(torch.full_like(x, float("nan"))).isnan().all()
