"""A whole run through the kernels: the embedded model, packed weights, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from zimage_core.nn.linear import Linear
from zimage_core.pipeline import ZImagePipeline
from zimage_core.quant import dispatch
from zimage_core.quant.tensor import QuantTensor

PROMPT = "a small red circle on the left of a blue background"
SMALL = {"height": 16, "width": 16, "num_inference_steps": 1}


def latents(pipe, **more):
    return pipe(PROMPT, seed=1, output_type="latent", **more).images


@pytest.fixture(scope="module")
def reference():
    """On the CPU, without kernels: one step of a small image."""
    return latents(ZImagePipeline.from_default(dtype="float32"), **SMALL)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_a_run_through_the_kernels_is_the_run_of_the_cpu(device, dtype, reference, monkeypatch):
    """The same weights, dequantised in float32 and fused in float16: to rounding, the same latents."""
    monkeypatch.setattr(dispatch, "KERNELS", "on")
    pipe = ZImagePipeline.from_default(dtype=dtype, device=device)
    got = latents(pipe, **SMALL)
    fused = [
        m
        for m in pipe.transformer.modules()
        if isinstance(m, Linear) and isinstance(m.weight, QuantTensor) and m.weight.planes.planes is not None
    ]
    assert bool(fused) == (dtype == "float16")
    tolerance = {"float32": 1e-3, "float16": 0.05}[dtype]
    assert float((got - reference).abs().max()) < tolerance * float(reference.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_a_gpu_draws_the_same(dtype):
    want = latents(ZImagePipeline.from_default(dtype="float32"))
    pipe = ZImagePipeline.from_default(dtype=dtype, device="cuda")
    got = latents(pipe)
    assert float((got - want).abs().mean()) < 0.05 * float(want.abs().mean())


@pytest.mark.gpu
def test_a_captured_run_is_the_run_bit_for_bit():
    pipe = ZImagePipeline.from_default(dtype="bfloat16", device="cuda")
    pipe.capture(False)
    want = latents(pipe)
    pipe.capture()
    assert torch.equal(latents(pipe), want)
    assert torch.equal(latents(pipe), want)  # replayed from the first step on


@pytest.mark.gpu
def test_graphs_that_share_memory_are_replayed_in_any_order():
    pipe = ZImagePipeline.from_default(dtype="bfloat16", device="cuda")
    sizes = ({"height": 64, "width": 64}, {"height": 32, "width": 64}, {"height": 64, "width": 48})
    pipe.capture(False)
    want = [latents(pipe, **size) for size in sizes]
    pipe.capture()
    for i in (0, 1, 2, 0, 0, 2, 1, 1, 0):
        assert torch.equal(latents(pipe, **sizes[i]), want[i])


@pytest.mark.gpu
def test_resident_weights_on_a_gpu_give_nearly_the_same():
    pipe = ZImagePipeline.from_default(dtype="bfloat16", device="cuda")
    want = latents(pipe)
    assert pipe.dequantize_weights()
    got = latents(pipe)
    assert float((got - want).abs().mean()) < 0.05 * float(want.abs().mean())


@pytest.mark.gpu
def test_every_forced_path_draws_the_same(monkeypatch):
    images = []
    for mode in ("fused", "dequantise"):
        monkeypatch.setattr(dispatch, "MODE", mode)
        images.append(latents(ZImagePipeline.from_default(dtype="bfloat16", device="cuda")))
    assert float((images[0] - images[1]).abs().mean()) < 0.05 * float(images[1].abs().mean())
