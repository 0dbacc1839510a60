"""Products of int8 rows against `reference.int8`: integers are equal, the rest differs by rounding."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_core.cpu.rotation import hadamard, rotate, rotation_group
from zimage_core.errors import BadShape, Unsupported
from zimage_core.formats import FORMATS
from zimage_core.quant import int8, ops
from zimage_core.quant.tensor import QuantTensor
from zimage_core.quantize.encode import encode
from zimage_core.reference import int8 as reference

ROUNDING = 4 * 2.0**-24
"""Bound of the relative error of scaling, adding a bias and rounding to float32."""


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    rows=st.integers(1, 50),
    width=st.sampled_from([1, 4, 64, 256, 320, 512]),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_a_product_has_the_integers_of_the_reference(tokens, rows, width, seed, scale):
    x, w, bias = drawn(tokens, width, seed=seed), drawn(rows, width, seed=seed + 1), drawn(rows)
    quantised = int8.quantize_rows(x * scale)
    xq, x_scale = reference.quantize_rows((x * scale).numpy())
    wq, w_scale = reference.quantize_rows(w.numpy())
    np.testing.assert_array_equal(quantised.values.numpy(), xq)
    np.testing.assert_array_equal(quantised.scale.numpy(), x_scale)
    wanted = reference.product(xq, x_scale, wq, w_scale, bias.numpy())
    np.testing.assert_array_equal(int8.linear(quantised, w, bias).numpy(), wanted)


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_rotation_is_that_of_the_reference_and_its_own_inverse(group):
    x = drawn(3, 2 * group)
    np.testing.assert_allclose(rotate(x, group).numpy(), reference.rotate(x.numpy(), group), atol=2e-6)
    assert relative(rotate(rotate(x, group), group), x) < 1e-6


@pytest.mark.parametrize(
    ("width", "group"), [(3840, 256), (10240, 256), (9728, 256), (64, 64), (96, 16), (6, 1)]
)
def test_the_group_is_the_largest_power_of_four_in_the_width(width, group):
    assert rotation_group(width) == reference.rotation_group(width) == group


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "Q3_K", "IQ4_XS", "BF16", "F32"])
@pytest.mark.parametrize("rotated", [False, True])
def test_kept_rows_give_the_bits_of_rows_made_in_the_product(name, rotated):
    w = drawn(40, 512) / 20
    packed = QuantTensor(encode(w, name), FORMATS[name], (40, 512))
    x = drawn(2, 7, 512)
    made = int8.linear(x, packed, None, rotated)
    kept = int8.quantize_weight(packed, 256 if rotated else 0)
    torch.testing.assert_close(int8.linear(x, kept), made, rtol=0, atol=0)
    assert relative(made, ops.linear(x, packed)) < 0.02


def test_a_scale_beside_the_blocks_joins_that_of_the_rows():
    w, scale = drawn(12, 64), drawn(12).abs()
    plain = QuantTensor(encode(w, "F32"), FORMATS["F32"], (12, 64), scale)
    x = drawn(5, 64)
    torch.testing.assert_close(int8.linear(x, plain), int8.linear(x, int8.quantize_weight(plain)))
    assert relative(int8.linear(x, plain), ops.linear(x, plain)) < 0.02


def test_int8_rows_are_exact_in_exact_products():
    w, x = drawn(24, 256), drawn(5, 256)
    kept = int8.quantize_weight(w, 256)
    assert relative(ops.linear(x, kept), x @ kept.dequantize().T) < 1e-6
    values = kept.packed.view(torch.int8).float() * kept.scale.unsqueeze(1)
    assert relative(kept.dequantize(), torch.from_numpy(reference.rotate(values.numpy(), 256))) < 1e-6


OUTLIERS = {
    "Gaussian": (lambda x: x, 0.0129, 0.0129),
    "Student-t": (lambda x: torch.from_numpy(np.random.default_rng(0).standard_t(3, x.shape)), 0.059, 0.014),
    "0.1 % x 30": (lambda x: x * torch.where(torch.arange(x.shape[1]) % 1000 == 0, 30, 1), 0.096, 0.015),
    "1 % x 30": (lambda x: x * torch.where(torch.arange(x.shape[1]) % 100 == 0, 30, 1), 0.061, 0.013),
}


@pytest.mark.parametrize("kind", OUTLIERS)
def test_rotation_spreads_outliers_of_activations(kind):
    """Relative error of a product with 3840 channels, plain and rotated; measured values in OUTLIERS."""
    make, plain, rotated = OUTLIERS[kind]
    x, w = make(drawn(64, 3840)).float(), drawn(256, 3840, seed=1)
    wanted = x.double() @ w.double().T
    errors = [relative(int8.linear(x, w, None, turned), wanted) for turned in (False, True)]
    assert errors[1] <= 0.02
    assert errors == pytest.approx([plain, rotated], rel=0.35)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    x = drawn(3, 64)
    x[1, 5] = bad
    out = int8.linear(x, drawn(8, 64))
    assert not torch.isfinite(out[1]).any()
    assert torch.isfinite(out[[0, 2]]).all()


def test_rows_of_zeros_give_zeros():
    assert not int8.linear(torch.zeros(2, 64), drawn(8, 64)).any()


def test_rows_for_another_rotation_are_taken_back():
    x, w = drawn(6, 256), drawn(9, 256)
    rows = int8.quantize_rows(x, 256)
    assert relative(int8.linear(rows, w), x @ w.T) < 0.03
    assert relative((rows * 0.5).dequantize(), x / 2) < 0.01


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadShape, match="last axes"):
        int8.linear(drawn(2, 64), drawn(3, 32))
    with pytest.raises(Unsupported, match="exact"):
        int8.linear(drawn(2, 64).requires_grad_(), drawn(3, 64))


def test_no_rows_and_no_tokens():
    assert int8.linear(drawn(0, 64), drawn(3, 64)).shape == (0, 3)
    assert int8.linear(drawn(2, 0, 64), drawn(3, 64)).shape == (2, 0, 3)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_a_copy_of_rotated_rows_is_multiplied_as_they_are(clone):
    x, kept = drawn(3, 512), int8.quantize_weight(drawn(40, 512), 256)
    assert torch.equal(int8.linear(x, clone(kept)), int8.linear(x, kept))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_default_dtype_of_torch_changes_no_bit(dtype):
    x, w = drawn(3, 320), drawn(40, 320)
    wanted = int8.linear(x, w, rotated=True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    hadamard.cache_clear()  # so that the matrix is made under it
    try:
        found = int8.linear(x, w, rotated=True)
        kept = int8.quantize_weight(w, 64)
    finally:
        torch.set_default_dtype(before)
        hadamard.cache_clear()
    assert torch.equal(found, wanted)
    assert torch.equal(int8.linear(x, kept), wanted)


def test_gradients_through_rotated_rows_are_refused_in_every_mode():
    x, kept = drawn(3, 512).requires_grad_(), int8.quantize_weight(drawn(40, 512), 256)
    for product in (int8.linear, ops.linear):
        with pytest.raises(Unsupported, match="gradients"):
            product(x, kept)
    with pytest.raises(Unsupported, match="gradients"):
        int8.quantize_rows(x)
