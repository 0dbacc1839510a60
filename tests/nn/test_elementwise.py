"""Defends: the plain torch steps are their formulas; public steps check shapes and choose what runs."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.fused import DTYPES, EPS, STEPS, Draw, assert_is_the_oracle, draws, tuple_of
from tests.helpers.tree import ROOT
from zimage_core.errors import BadShape
from zimage_core.nn import elementwise
from zimage_core.quant import dispatch

every_step = pytest.mark.parametrize("step", STEPS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@every_step
@every_dtype
@given(data=st.data())
def test_the_twin_is_the_oracle(step, dtype, data):
    arguments = step.arguments(data.draw(draws(dtype, rows=40)))
    got = getattr(elementwise, f"{step.name}_torch")(*arguments)
    assert_is_the_oracle(got, step.expected(*arguments))
    assert all(r.dtype == a.dtype for r, a in zip(tuple_of(got), arguments, strict=False))


@every_step
@every_dtype
def test_the_sizes_of_the_model(step, dtype):
    size, heads = (128, 30) if step.name == "qk_norm_rope" else (3840, 1)
    arguments = step.arguments(Draw(1, dtype, 7, size, heads=heads))
    assert_is_the_oracle(getattr(elementwise, step.name)(*arguments), step.expected(*arguments))


@every_step
def test_nothing_in_nothing_out(step):
    arguments = step.arguments(Draw(0, torch.float32, 3, 8))
    empty = [a[:0] if isinstance(a, torch.Tensor) and a.ndim > 1 else a for a in arguments]
    assert all(r.shape[0] == 0 for r in tuple_of(getattr(elementwise, step.name)(*empty)))


@pytest.fixture
def kernels(monkeypatch):
    """Kernels that only note their names and give zeros, on every device."""

    def stub(name):
        def call(first, second, *_):
            called.append(name)
            zeros = torch.zeros_like(first)
            return (zeros, torch.zeros_like(second)) if name == "qk_norm_rope" else zeros

        return call

    called: list[str] = []
    module = types.ModuleType("zimage_core.kernels.elementwise")
    for step in STEPS:
        setattr(module, step.name, stub(step.name))
    monkeypatch.setattr(elementwise, "_kernels", lambda: module)
    monkeypatch.setattr(dispatch, "KERNELS", "on")
    return called


@every_step
def test_kernels_run_where_they_are(step, kernels):
    getattr(elementwise, step.name)(*step.arguments(Draw(0, torch.float32, 3, 8)))
    assert kernels == [step.name]


@every_step
def test_torch_runs_where_kernels_are_not(step, kernels, monkeypatch):
    monkeypatch.setattr(dispatch, "KERNELS", "off")
    arguments = step.arguments(Draw(0, torch.float32, 3, 8))
    assert_is_the_oracle(getattr(elementwise, step.name)(*arguments), step.expected(*arguments))
    assert not kernels


@every_step
def test_a_gradient_is_torchs(step, kernels):
    arguments = step.arguments(Draw(0, torch.float32, 3, 8))
    for place, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            asked = [*arguments]
            asked[place] = argument.clone().requires_grad_()
            sum(r.sum() for r in tuple_of(getattr(elementwise, step.name)(*asked))).backward()
            assert asked[place].grad is not None
            assert not kernels
            with torch.no_grad():
                getattr(elementwise, step.name)(*asked)
            assert kernels == [step.name]
            kernels.clear()


@every_step
def test_the_gradient_is_that_of_the_formula(step):
    """The gradient of a smooth function, by central differences in float64 of the oracle's formula."""
    arguments = step.arguments(Draw(4, torch.float32, 2, 6, heads=2))
    asked = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    weights = [
        torch.randn(w.shape, generator=torch.Generator().manual_seed(1)) for w, _ in step.expected(*arguments)
    ]
    sum(
        (r * w).sum() for r, w in zip(tuple_of(getattr(elementwise, step.name)(*asked)), weights, strict=True)
    ).backward()
    tensors = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
    # cosine and sine are no free arguments of the oracle: it knows their angle
    for place in tensors[:4] if step.name == "qk_norm_rope" else tensors:
        wide = arguments[place].double()
        at = tuple(n // 2 for n in wide.shape)
        sides = []
        for h in (1e-5, -1e-5):
            moved = wide.clone()
            moved[at] += h
            shifted = step.expected(*arguments[:place], moved, *arguments[place + 1 :])
            sides.append(
                sum((r * w.double().numpy()).sum() for (r, _), w in zip(shifted, weights, strict=True))
            )
        slope = (sides[0] - sides[1]) / 2e-5
        # 20 sums and products of numbers up to 10 in float32
        assert asked[place].grad[at].item() == pytest.approx(slope, rel=1e-4, abs=1e-4)


@torch.no_grad()
def test_a_vector_for_each_member_is_the_members_alone(kernels):
    draw = Draw(6, torch.float32, 4, 8)
    x, branch = draw.activations(2, 4, 8), draw.activations(2, 4, 8)
    weight, each = draw.vector(1.0), draw.activations(2, 1, 8)
    together = (
        elementwise.rms_norm_modulate(x, weight, EPS, each),
        elementwise.gate_norm_residual(x, branch, weight, EPS, each, 0.5),
    )
    assert not kernels  # they take one vector
    for i in range(2):
        assert torch.equal(together[0][i], elementwise.rms_norm_modulate_torch(x[i], weight, EPS, each[i]))
        alone = elementwise.gate_norm_residual_torch(x[i], branch[i], weight, EPS, each[i], 0.5)
        assert torch.equal(together[1][i], alone)


@torch.no_grad()
@pytest.mark.parametrize("leading", [(), (1,), (1, 1), (1, 1, 1)])
def test_a_vector_may_have_leading_axes_of_one(leading):
    draw = Draw(6, torch.float32, 4, 8)
    x, weight, scale = draw.activations(4, 8), draw.vector(1.0), draw.vector()
    shaped = scale.view(*leading, 8)
    got = elementwise.rms_norm_modulate(x, weight, EPS, shaped)
    assert torch.equal(got, elementwise.rms_norm_modulate(x, weight, EPS, scale))
    got = elementwise.gate_norm_residual(x, x, weight, EPS, shaped)
    assert torch.equal(got, elementwise.gate_norm_residual(x, x, weight, EPS, scale))


def ones(*shape):
    return torch.ones(shape)


WRONG = {
    "weight has shape \\(4,\\)": lambda: elementwise.rms_norm_modulate(ones(2, 8), ones(4), EPS),
    "weight has shape \\(1, 8\\)": lambda: elementwise.rms_norm_modulate(ones(2, 8), ones(1, 8), EPS),
    "scale has shape \\(1,\\)": lambda: elementwise.rms_norm_modulate(ones(2, 8), ones(8), EPS, ones(1)),
    "scale has shape \\(3, 8\\)": lambda: elementwise.rms_norm_modulate(ones(2, 8), ones(8), EPS, ones(3, 8)),
    "scale has shape \\(2, 2, 8\\)": lambda: elementwise.rms_norm_modulate(
        ones(2, 8), ones(8), EPS, ones(2, 2, 8)
    ),
    "x of shape \\(\\) wants \\[D\\]": lambda: elementwise.rms_norm_modulate(ones(), ones(1), EPS),
    "branch has shape \\(1, 8\\)": lambda: elementwise.gate_norm_residual(
        ones(2, 8), ones(1, 8), ones(8), EPS
    ),
    "gate_norm_residual: weight": lambda: elementwise.gate_norm_residual(
        ones(2, 8), ones(2, 8), ones(2), EPS
    ),
    "gate has shape \\(2, 1\\)": lambda: elementwise.gate_norm_residual(
        ones(2, 8), ones(2, 8), ones(8), EPS, ones(2, 1)
    ),
    "up has shape \\(8,\\)": lambda: elementwise.silu_gate(ones(2, 8), ones(8)),
    "even D, not of shape \\(2, 8\\)": lambda: rotated(ones(2, 8)),
    "even D, not of shape \\(2, 3, 7\\)": lambda: rotated(ones(2, 3, 7)),
    "k has shape \\(2, 1, 8\\)": lambda: rotated(ones(2, 3, 8), k=ones(2, 1, 8)),
    "k_weight has shape \\(4,\\)": lambda: rotated(ones(2, 3, 8), k_weight=ones(4)),
    "cos has shape \\(3, 4\\), q wants \\(2, 4\\)": lambda: rotated(ones(2, 3, 8), cos=ones(3, 4)),
    "sin has shape \\(2, 8\\), q wants \\(2, 4\\)": lambda: rotated(ones(2, 3, 8), sin=ones(2, 8)),
}


def rotated(q, k=None, k_weight=None, cos=None, sin=None):
    size, turn = q.shape[-1], ones(2, q.shape[-1] // 2)
    return elementwise.qk_norm_rope(
        q,
        q if k is None else k,
        ones(size),
        ones(size) if k_weight is None else k_weight,
        EPS,
        turn if cos is None else cos,
        turn if sin is None else sin,
    )


@pytest.mark.parametrize("words", WRONG)
def test_shapes_that_do_not_fit_are_refused_in_one_sentence(words, kernels):
    with pytest.raises(BadShape, match=words):
        WRONG[words]()
    assert not kernels


def test_importing_the_steps_loads_no_triton():
    """What torch itself loads aside."""
    script = (
        "import sys, torch\nbefore = set(sys.modules)\n"
        "import zimage_core.nn.elementwise\nprint(*set(sys.modules) - before)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(run.stdout.split())
    assert "zimage_core.nn.elementwise" in loaded
    assert not any(name.startswith(("triton", "zimage_core.kernels", "torch._dynamo")) for name in loaded)
