"""A block in int8 under the driver that is not there: each kernel launches, none more often than needed."""

from __future__ import annotations

from functools import cache

import pytest

from tests.host_gpu import driven

pytestmark = pytest.mark.fake_cuda

STEPS = {
    "_rms_norm_modulate_int8_kernel": 2, "_silu_gate_int8_kernel": 1, "_quantize_kernel": 1,
    "_qk_norm_rope_kernel": 1, "_gate_norm_residual_kernel": 2,
}  # fmt: skip
"""Launches of a block besides attention and products: activations are quantised four times for seven."""
ATTENTION = {"_sum_keys_kernel": 1, "_quantize_heads_kernel": 1, "_attend_kernel": 1}
SEVEN = {"_int8_matmul_kernel": 7}
WEIGHTS = {"_requantize_kernel": 7}


@cache
def run(architecture):
    return driven.run("int8", FAKE_ARCH=architecture)


def test_hopper_multiplies_by_kernels():
    found = run(90)
    assert found["packed"] == STEPS | SEVEN | WEIGHTS
    assert found["other"] == STEPS | SEVEN | WEIGHTS
    assert found["kept"] == STEPS | SEVEN
    assert found["by_library"] == 0


def test_geforce_attends_by_kernels_too_but_not_for_a_caption():
    found = run(89)
    assert found["packed"] == STEPS | SEVEN | WEIGHTS | ATTENTION
    assert found["other"] == STEPS | SEVEN | WEIGHTS
    assert found["kept"] == STEPS | SEVEN | ATTENTION


@pytest.mark.parametrize("architecture", [75, 100])
def test_the_library_multiplies_where_kernels_do_not_and_its_sums_are_scaled_once(architecture):
    found = run(architecture)
    assert found["packed"] == STEPS | WEIGHTS | {"_rescale_kernel": 7}
    assert found["by_library"] == 7
