"""Defends: a step whose result is quantised in registers is the step in float32, then its rows quantised."""

from __future__ import annotations

import pytest
import torch

from zimage_core.kernels import elementwise, int8, int8_steps

EPS = 1e-5

# NumPy, the arithmetic of the interpreter, warns of the infinite exp of silu and of planted NaN
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

every_group = pytest.mark.parametrize("group", [0, 16])


def drawn(*shape: int, device: torch.device, dtype: torch.dtype = torch.float16, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def assert_rows(got, wide: torch.Tensor, group: int) -> None:
    """The same numbers; a GPU may fuse a multiply-add in one of the two, so an integer may be the next."""
    values, scale = int8.quantize_rows(wide, group)
    slack = 0 if wide.device.type == "cpu" else 1
    assert (got[0].int() - values.int()).abs().max() <= slack
    torch.testing.assert_close(got[1], scale, rtol=1e-6, atol=0)


@every_group
@pytest.mark.parametrize("size", [48, 1280])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_norm_is_quantised(size, scaled, group, device):
    x, weight = drawn(3, 2 * size, device=device)[:, ::2], drawn(size, device=device, seed=1)
    scale = drawn(size, device=device, dtype=torch.float32, seed=2) if scaled else None
    wide = elementwise.rms_norm_modulate(x.float(), weight, EPS, scale)
    assert_rows(int8_steps.rms_norm_modulate(x, weight, EPS, scale, group), wide, group)


@every_group
@pytest.mark.parametrize("size", [48, 1280])
def test_a_gate_is_quantised(size, group, device):
    both = drawn(3, 2 * size, device=device) * 4
    gate, up = both[:, :size], both[:, size:]
    wide = elementwise.silu_gate(gate.float(), up.float(), 0.5)
    assert_rows(int8_steps.silu_gate(gate, up, 0.5, group), wide, group)


def test_nothing_is_launched_for_nothing(device):
    none = drawn(0, 32, device=device)
    assert [len(part) for part in int8_steps.silu_gate(none, none, 1.0, 0)] == [0, 0]
    weight = drawn(32, device=device)
    assert [len(part) for part in int8_steps.rms_norm_modulate(none, weight, EPS, None, 0)] == [0, 0]


def test_what_is_not_finite_stays_in_its_row(device):
    gate, up = drawn(3, 32, device=device), drawn(3, 32, device=device, seed=1)
    gate[1, 4] = float("nan")
    assert int8_steps.silu_gate(gate, up, 1.0, 16)[1].isfinite().tolist() == [True, False, True]
    found = int8_steps.rms_norm_modulate(gate, up[0], EPS, None, 0)[1]
    assert found.isfinite().tolist() == [True, False, True]
