"""Defends: a step whose result is quantised in registers is the step in float32, then its rows quantised."""

from __future__ import annotations

import pytest
import torch

from zimage_core.config import TransformerConfig
from zimage_core.kernels import elementwise, int8, int8_steps
from zimage_core.models.transformer import TransformerBlock
from zimage_core.nn.compute import set_compute
from zimage_core.nn.elementwise import LONGEST
from zimage_core.quant import dispatch

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


@pytest.mark.parametrize("half", [False, True])
@torch.no_grad()
def test_a_block_in_int8_quantises_in_its_steps(half, device, monkeypatch):
    """The same block, its steps by kernels that quantise and by torch; integers may differ at a half."""
    torch.manual_seed(0)
    config = TransformerConfig(dim=64, n_heads=2, hidden_dim=176, axes_dims=(8, 12, 12))
    block = TransformerBlock(config, modulated=True)
    for p in block.parameters():
        p.normal_(0, 0.1)
    network = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([block])})
    set_compute(network, "int8", torch.device("cpu"))
    block.to(device, torch.float16 if half else torch.float32)
    x, temb, angles = torch.randn(9, 64), torch.randn(config.adaln_dim), torch.randn(9, 16)
    x, temb, cos, sin = (t.to(device) for t in (x, temb, angles.cos(), angles.sin()))
    x, temb = x.to(block.attention.to_q.dtype), temb.to(block.attention.to_q.dtype)
    ran: list[str] = []
    for name in ("rms_norm_modulate", "silu_gate"):
        kernel = getattr(int8_steps, name)
        monkeypatch.setattr(int8_steps, name, lambda *a, k=kernel, n=name: (ran.append(n), k(*a))[1])
    results = []
    for choice in ("off", "on"):
        monkeypatch.setattr(dispatch, "KERNELS", choice)
        results.append(block(x, (cos, sin), temb).float())
    assert ran == ["rms_norm_modulate", "rms_norm_modulate", "silu_gate"]
    assert (results[1] - results[0]).norm() < (2e-3 if half else 5e-4) * results[0].norm()


def test_a_hook_on_a_branch_sees_floats(device, monkeypatch):
    monkeypatch.setattr(dispatch, "KERNELS", "on")
    config = TransformerConfig(dim=64, n_heads=2, hidden_dim=176, axes_dims=(8, 12, 12))
    block = TransformerBlock(config, modulated=False).to(device)
    set_compute(torch.nn.ModuleDict({"layers": torch.nn.ModuleList([block])}), "int8", torch.device("cpu"))
    seen = []
    block.feed_forward.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    angles = torch.randn(5, 16, device=device)
    with torch.no_grad():
        block(torch.randn(5, 64, device=device), (angles.cos(), angles.sin()))
    assert isinstance(seen[0], torch.Tensor)


def test_one_length_is_stated_twice():
    assert int8.LARGEST_ROW == LONGEST
