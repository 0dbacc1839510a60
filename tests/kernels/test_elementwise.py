"""Defends: each fused step is its formula with one rounding, for every dtype, shape and stride."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.fused import (
    DTYPES,
    EPS,
    STEPS,
    Draw,
    Step,
    assert_is_the_oracle,
    draws,
    silu_gate,
    tuple_of,
)
from zimage_core.config import TransformerConfig
from zimage_core.kernels import elementwise as kernels
from zimage_core.models.transformer import TransformerBlock
from zimage_core.nn import elementwise
from zimage_core.quant import dispatch

# NumPy, the arithmetic of the interpreter, warns of the infinite exp of silu and of planted NaN
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

every_step = pytest.mark.parametrize("step", STEPS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture
def switched_on(monkeypatch):
    monkeypatch.setattr(dispatch, "KERNELS", "on")


@contextmanager
def poisoned_memory():
    """torch.empty gives NaN: what a kernel leaves out is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run(step: Step, arguments):
    with poisoned_memory():
        return getattr(kernels, step.name)(*arguments)


def check(step: Step, draw: Draw):
    arguments = step.arguments(draw)
    got = run(step, arguments)
    assert_is_the_oracle(got, step.expected(*arguments), truncates=draw.device.type == "cpu")
    for result, like in zip(tuple_of(got), arguments, strict=False):
        assert result.dtype == like.dtype
        assert result.is_contiguous()


@every_step
@every_dtype
@given(data=st.data())
def test_the_kernel_is_the_oracle(step, dtype, device, data):
    check(step, replace(data.draw(draws(dtype)), device=device))


@every_step
@pytest.mark.parametrize("rows", [1, 2, 63, 257])
def test_any_number_of_rows(step, rows, device):
    check(step, Draw(rows, torch.float16, rows, 20, heads=2, device=device))


@every_step
@every_dtype
def test_the_sizes_of_the_model(step, dtype, device):
    size, heads = (128, 30) if step.name == "qk_norm_rope" else (3840, 1)
    check(step, Draw(1, dtype, 3, size, heads=heads, device=device))


@every_step
def test_a_batch_has_leading_axes(step, device):
    """The rotation belongs to the place in a member, everything else to the element alone."""
    draw = Draw(3, torch.float32, 4, 10, device=device)
    arguments = step.arguments(draw)
    places = 2 if step.name in ("qk_norm_rope", "silu_gate", "gate_norm_residual") else 1
    doubled = [torch.stack((a, a.flip(0))) for a in arguments[:places]]
    for member, flipped in enumerate((False, True)):
        alone = [a.flip(0) if flipped else a for a in arguments[:places]]
        want = tuple_of(run(step, (*alone, *arguments[places:])))
        got = tuple_of(run(step, (*doubled, *arguments[places:])))
        assert all(torch.equal(g[member], w) for g, w in zip(got, want, strict=True))


@every_step
def test_slices_of_one_projection_need_no_copy(step, device):
    draw = Draw(
        5, torch.float32, 6, 2048 + 10 if step.name == "silu_gate" else 12, strided=True, device=device
    )
    check(step, draw)
    if step.name == "silu_gate":
        common = torch.randn(3, 2, 40, device=device)
        gate, up = common.unbind(1)
        assert_is_the_oracle(kernels.silu_gate(gate, up, 1.0), silu_gate(gate, up))
        columns = torch.randn(8, 3, device=device).t()  # no axis but the rows' is dense
        assert_is_the_oracle(kernels.silu_gate(columns, columns, 1.0), silu_gate(columns, columns))


@every_step
def test_nothing_is_launched_for_nothing(step, device, monkeypatch):
    monkeypatch.setattr(kernels, f"_{step.name}_kernel", None)
    arguments = step.arguments(Draw(0, torch.float32, 3, 8, device=device))
    empty = [a[:0] if isinstance(a, torch.Tensor) and a.ndim > 1 else a for a in arguments]
    for result in tuple_of(run(step, empty)):
        assert result.numel() == 0
        assert result.shape[0] == 0


@every_step
def test_nan_stays_in_its_row(step, device):
    arguments = step.arguments(Draw(7, torch.float32, 5, 12, device=device))
    clean = tuple_of(run(step, arguments))
    arguments[0][2].view(-1)[1] = float("nan")
    marked = tuple_of(run(step, arguments))
    assert marked[0][2].isnan().any()
    for before, after in zip(clean, marked, strict=True):
        others = [0, 1, 3, 4]
        assert torch.equal(before[others], after[others])


def test_silu_is_right_at_both_ends(device):
    gate = torch.tensor([0.0, -0.0, 1e-30, 1.0, -1.0, 80.0, -80.0, -88.0, -104.0, 1e6, -1e6], device=device)
    up = torch.full_like(gate, 3.0)
    assert_is_the_oracle(kernels.silu_gate(gate, up, 0.5), silu_gate(gate, up, 0.5))


def test_a_power_of_two_taken_out_of_the_branch_changes_no_bit(device):
    x, branch, weight, eps, gate, _ = STEPS[1].arguments(
        Draw(11, torch.float32, 5, 64, magnitudes=(1e-3,), device=device)  # eps matters here
    )
    plain = kernels.gate_norm_residual(x, branch, weight, eps, gate, 1.0)
    assert torch.equal(plain, kernels.gate_norm_residual(x, branch * 2.0**-7, weight, eps, gate, 2.0**-7))


def test_a_product_beyond_float16_fits_after_the_factor(device):
    gate, up = (
        torch.full((2, 8), 1000.0, device=device).half(),
        torch.full((2, 8), 1000.0, device=device).half(),
    )
    got = kernels.silu_gate(gate, up, 2.0**-7)
    assert torch.equal(got, torch.full_like(got, 1e6 / 128))


@every_step
@pytest.mark.parametrize("optional", [False, True])
def test_the_operator_keeps_its_promises(step, optional, device):
    """Schema, fake tensors and dynamic shapes, by torch's own check."""
    arguments = step.arguments(Draw(2, torch.float32, 3, 8, strided=True, optional=optional, device=device))
    torch.library.opcheck(getattr(torch.ops.zimage, step.name).default, arguments)


@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_a_compiled_graph_holds_the_operators_and_gives_the_same_bits(device, dynamic):
    def all_four(x, w, s, cos, sin):
        y = elementwise.rms_norm_modulate(x, w, EPS, s)
        y = elementwise.silu_gate(y, x, 0.5)
        q, k = elementwise.qk_norm_rope(
            y.unflatten(-1, (2, 8)), x.unflatten(-1, (2, 8)), w[:8], w[8:], EPS, cos, sin
        )
        return elementwise.gate_norm_residual(x, q.flatten(-2) + k.flatten(-2), w, EPS, s)

    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    g = torch.Generator().manual_seed(0)
    x, w, s = (torch.randn(*shape, generator=g).to(device) for shape in ((5, 16), (16,), (1, 16)))
    turn = (torch.randn(5, 4, generator=g).to(device), torch.randn(5, 4, generator=g).to(device))
    want = all_four(x, w, s, *turn)
    torch._dynamo.reset()
    assert torch.equal(
        torch.compile(all_four, fullgraph=True, dynamic=dynamic, backend="aot_eager")(x, w, s, *turn), want
    )
    torch._dynamo.reset()
    assert torch.equal(
        torch.compile(all_four, fullgraph=True, dynamic=dynamic, backend=backend)(x, w, s, *turn), want
    )
    for step in STEPS:
        assert any(f"zimage.{step.name}" in target for target in seen), f"{step}: not in {seen}"


@pytest.mark.parametrize("modulated", [False, True])
@torch.no_grad()
def test_a_block_through_kernels_is_the_block_through_torch(device, modulated, monkeypatch):
    torch.manual_seed(0)
    config = TransformerConfig(dim=64, n_heads=2, hidden_dim=170, axes_dims=(8, 12, 12))
    block = TransformerBlock(config, modulated)
    for p in block.parameters():
        p.normal_(0, 0.1)
    block.to(device)
    x, temb, angles = torch.randn(9, 64), torch.randn(config.adaln_dim), torch.randn(9, 16)
    inputs = [t.to(device) for t in (x, angles.cos(), angles.sin(), temb)]
    results = []
    for choice in ("off", "on"):
        monkeypatch.setattr(dispatch, "KERNELS", choice)
        results.append(block(inputs[0], (inputs[1], inputs[2]), inputs[3] if modulated else None))
    # the parity tests' bar: one formula, sums in another order
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    assert not torch.equal(results[0], inputs[0])
