"""Without importance: the bytes of gguf-py and of ggml, for any weights that their scales can hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import ggml
from tests.helpers.quantized import importance, weighted_error, weights
from zimage_core.formats import by_name
from zimage_core.quantize.encode import encode
from zimage_core.reference.dequantize import dequantize

gguf = pytest.importorskip("gguf")

SAME_BYTES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
same_bytes = pytest.mark.parametrize("name", SAME_BYTES)
LARGEST = 30000.0
"""Scales and minima stay below 65504, where ggml would store an infinity and we the largest float16."""

SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1e-45,
    -1e-40,
    1.2e-38,
    2.0**-126,
    3e-8,
    6e-5,
    0.1,
    7.5,
    LARGEST,
    -LARGEST,
]
numbers = st.one_of(
    st.sampled_from(SPECIAL),
    st.floats(-LARGEST, LARGEST, width=32),
    st.integers(-64, 64).map(lambda i: i / 4),  # ties
)


def theirs(x, name):
    with np.errstate(all="ignore"):
        return gguf.quantize(x, gguf.GGMLQuantizationType[name]).view(np.uint8).reshape(len(x), -1)


def ours(x, name, costs=None):
    return encode(torch.from_numpy(x), name, None if costs is None else torch.from_numpy(costs)).numpy()


@st.composite
def blocks(draw):
    """Two rows of 256: drawn numbers one after the other, tiled, in one of several orders of magnitude."""
    few = draw(st.lists(numbers, min_size=1, max_size=40))
    shift = draw(st.sampled_from([1.0, 2.0**-20, 2.0**-100]))
    row = np.resize(np.array(few, np.float32) * np.float32(shift), 256)
    return np.stack([row, row[::-1].copy()])


@same_bytes
@given(x=blocks())
def test_bytes_are_those_of_gguf(name, x):
    if (x == 0).any() and (np.signbit(x) & (x == 0)).any() and name in ("Q4_1", "Q5_1"):
        x = x + np.float32(0)  # the sign of a minimum of zero depends on the order of numpy's minimum
    np.testing.assert_array_equal(ours(x, name), theirs(x, name))


@same_bytes
@pytest.mark.parametrize("kind", ["gaussian", "student"])
def test_bytes_of_a_whole_matrix_are_those_of_gguf(name, kind):
    x = weights(kind, (64, 1024))
    np.testing.assert_array_equal(ours(x, name), theirs(x, name))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"])
def test_a_scale_beyond_float16_becomes_the_largest_one(name):
    x = weights("gaussian", (2, 256)) * np.float32(1e38)
    decoded = dequantize(ours(x, name), name)
    assert np.isfinite(decoded).all()
    assert not np.isfinite(dequantize(theirs(x, name), name)).all()
    assert np.abs(decoded).max() >= 65504


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"])
@pytest.mark.parametrize("kind", ["gaussian", "student"])
def test_encoding_decoded_weights_changes_nothing(name, kind):
    decoded = dequantize(ours(weights(kind, (8, 512)), name), name)
    np.testing.assert_array_equal(dequantize(ours(decoded, name), name), decoded)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"])
@pytest.mark.parametrize("kind", ["gaussian", "student"])
@pytest.mark.parametrize("costs", [np.ones(1024, np.float32), importance(1024)], ids=["ones", "log-normal"])
def test_importance_lowers_the_error_it_weights(name, kind, costs):
    x = weights(kind, (16, 1024))
    plain = weighted_error(ours(x, name), name, x, costs)
    searched = weighted_error(ours(x, name, costs), name, x, costs)
    # 0.97 to 0.92 for Q8_0 and MXFP4 under ones, 0.95 to 0.5 for the others
    assert searched < 0.985 * plain


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ2_0"])
def test_the_one_weight_that_counts_is_kept(name):
    """Some level meets it, whatever the others are: exact to the rounding of scale and minimum to float16."""
    x = weights("student", (64, 256))
    costs = np.zeros(256, np.float32)
    costs[3] = 1
    error = np.abs(dequantize(ours(x, name, costs), name) - x)[:, 3]
    # half a unit in the last place of the scale, 2^-11, and of the minimum, which is as large as the block
    block = 256 if name == "TQ2_0" else 32
    extent = np.abs(x[:, :block]).max(1) if name.endswith("_1") else np.abs(x[:, 3])
    # 127 halves of the smallest float16, where the scale of Q8_0 is subnormal
    assert (error <= 2.0**-10 * extent + 127 * 2.0**-25).all()


@pytest.mark.ggml
@ggml.needs_ggml
@pytest.mark.parametrize("name", [n for n in SAME_BYTES if by_name(n).weights > 1])
@pytest.mark.parametrize("kind", ["gaussian", "student"])
def test_bytes_are_those_of_ggml(name, kind):
    x = weights(kind, (32, 2048), seed=3)
    np.testing.assert_array_equal(ours(x, name), ggml.quantize(name, x, None))
