"""Adapters under each arithmetic, compiled, recorded as graphs, and within a memory budget."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import adapters, tiny
from tests.helpers.recorder import Recorder
from zimage_core import ZImagePipeline
from zimage_core.adapters.change import ROWS, Branch
from zimage_core.errors import OverBudget, Unsupported
from zimage_core.memory.phases import MemoryBudget
from zimage_core.memory.planner import RUNTIME
from zimage_core.nn import cuda_graphs
from zimage_core.nn.linear import Linear, ready
from zimage_core.quant.arithmetic import Arithmetic
from zimage_core.run import placement

DRAW = {"prompt": "a", "seed": 1, "num_inference_steps": 6, "output_type": "latent"}
SMALL = {"height": 48, "width": 64, "num_inference_steps": 2, "output_type": "pt", "seed": 4}
MIB = 1 << 20


def tensors_for(pipe, kind="lora", names=("to_q", "to_v", "w2", "w3"), seed=0, scale=1.0):
    """An adapter of the named layers of all blocks, by ai-toolkit's names."""
    found = {}
    for i, (name, module) in enumerate(pipe.transformer.named_modules()):
        if isinstance(module, Linear) and name.endswith(names) and "refiner" not in name:
            found[f"diffusion_model.{name}"] = {
                leaf: value * scale if value.ndim == 2 and "up" in leaf else value
                for leaf, value in adapters.kind(kind, module.out_features, module.in_features, seed + i)[
                    0
                ].items()
            }
    return adapters.file_of(found)


def branched(kind, dtype=torch.float32, mode="exact", n=20, k=64):
    layer = Linear(k, n)
    layer.weight = torch.nn.Parameter(adapters.random(n, k).to(dtype), requires_grad=False)
    layer.dtype, layer.arithmetic = dtype, Arithmetic(mode, mode == "int8")
    pipe = tiny.pipeline()
    pipe.transformer.probe = layer  # a layer of any size, so that its change is made as any other
    from tests.adapters.test_kinds import change

    own, delta = change(kind, layer)
    layer.branch = Branch(layer, [(own, 0.5)])
    return layer, 0.5 * delta(adapters.dense(layer))


@pytest.mark.parametrize("kind", ["lora", "lokr half", "oft in", "dora", "diff"])
@pytest.mark.parametrize("rows", [7, ROWS + 9])
def test_int8_rows_are_multiplied_by_the_adapters_own_numbers(kind, rows):
    layer, delta = branched(kind, mode="int8")
    with torch.no_grad():
        x = ready(adapters.random(rows, 64, seed=3, scale=1.0), layer)
        assert not isinstance(x, torch.Tensor)
        got = layer(x) - layer.product(x)
    want = x.dequantize().double() @ delta.T
    # turns, gains and norms multiply what int8 has rounded already
    limit = 1e-4 if kind in ("lora", "lokr half", "diff") else 0.05
    assert float((got.double() - want).abs().max()) < limit * float(want.abs().max())


@pytest.mark.parametrize("kind", ["lora", "lokr both", "loha", "oft out", "oft in", "dora"])
def test_in_float16_a_scaled_input_gives_a_scaled_result(kind):
    layer, _ = branched(kind, torch.float16)
    x = adapters.random(5, 64, seed=3, scale=4.0).half()
    with torch.no_grad():
        whole, scaled = layer(x), layer(x * 2.0**-7)
    assert torch.allclose(
        scaled.float() * 2**7, whole.float(), rtol=4e-3, atol=4e-3 * float(whole.abs().max())
    )


def test_bfloat16_products_leave_the_adapter_its_float32():
    layer, delta = branched("lora", mode="bfloat16")
    x = adapters.random(5, 64, seed=3, scale=1.0)
    with torch.no_grad():
        got = layer(x) - layer.product(x)
    assert torch.allclose(got.double(), x.double() @ delta.T, atol=1e-6)


@pytest.mark.parametrize("compute", ["int8", "bfloat16"])
def test_images_in_rounded_arithmetic_change_as_exact_ones_do(compute):
    pipe = ZImagePipeline.from_default(compute=compute)
    exact = ZImagePipeline.from_default(compute="exact")
    tensors = tensors_for(pipe)
    before = pipe("a red circle", **SMALL).images, exact("a red circle", **SMALL).images
    pipe.load_lora(tensors)
    exact.load_lora(tensors)
    after = pipe("a red circle", **SMALL).images, exact("a red circle", **SMALL).images
    moved = float((after[1] - before[1]).abs().mean())
    assert moved > 0.005
    assert float((after[0] - after[1]).abs().mean()) < 0.3 * moved
    pipe.unload_lora()
    assert torch.equal(pipe("a red circle", **SMALL).images, before[0])


def test_a_compiled_block_follows_its_adapters():
    pipe, plain = tiny.pipeline(), tiny.pipeline()
    parts = [each.transformer.layers[0].feed_forward for each in (pipe, plain)]
    compiled = torch.compile(parts[0], backend="eager", fullgraph=True)
    x = adapters.random(9, 32, scale=1.0)
    changes = (
        lambda p: p.load_lora(tensors),
        lambda p: p.set_adapters("lora", 0.5),
        lambda p: p.unload_lora(),
    )
    tensors = tensors_for(pipe)
    with torch.no_grad():
        assert torch.equal(compiled(x, 1.0), parts[1](x, 1.0))
        for change in changes:
            change(pipe)
            change(plain)
            assert torch.allclose(compiled(x, 1.0), parts[1](x, 1.0), atol=1e-6)


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()
    monkeypatch.setattr(cuda_graphs, "CudaRecorder", lambda: found)
    monkeypatch.setattr(placement, "pays", lambda *_: True)
    monkeypatch.setattr(placement, "has_room", lambda *_: True)
    return found


def test_recorded_steps_are_recorded_again_when_adapters_change(recorder):
    pipe, plain = tiny.pipeline(), tiny.pipeline()
    plain.capture(False)
    other = ZImagePipeline.from_pipe(pipe)
    tensors = tensors_for(pipe)
    for each in (pipe, plain):
        each.load_lora(tensors)
    for _ in range(2):
        assert torch.equal(pipe(**DRAW).images, plain(**DRAW).images)
    assert recorder.recorded == 1
    for change in (lambda p: p.set_adapters("lora", 0.5), lambda p: p.unload_lora()):
        change(other)  # it shares the transformer, but not the graphs
        change(plain)
        for _ in range(2):
            assert torch.equal(pipe(**DRAW).images, plain(**DRAW).images)
    assert recorder.recorded == 3


def fits(pipe, ram):
    """Whether a run of SMALL is planned within so many bytes."""
    memory = pipe._placement.memory
    memory.budget = MemoryBudget(ram=ram)
    try:
        memory.begin(width=64, height=48, images=1, caption_tokens=40, guidance=False, steps=2)
    except OverBudget:
        return False
    return True


def least(pipe):
    """Bytes below which that run is refused."""
    low, high = RUNTIME, RUNTIME + 400 * MIB
    while high - low > MIB // 8:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(pipe, middle) else (middle, high)
    return high


@pytest.mark.parametrize("kind", ["dora", "lokr half"])
def test_images_under_a_budget_are_the_same_to_the_bit(kind):
    plain = ZImagePipeline.from_default(compute="exact")
    before = plain("a red circle", **SMALL).images
    tensors = tensors_for(plain, kind, scale=0.05)
    norm = plain.transformer.layers[0].attention_norm1.weight
    tensors["layers.0.attention_norm1.diff"] = 0.1 * torch.ones_like(norm)
    pipe = ZImagePipeline.from_default(ram="64GiB", compute="exact")
    for each in (plain, pipe):
        each.load_lora(tensors, name="x")
    pipe._placement.memory.budget = MemoryBudget(ram=least(pipe))
    for weight in (1.0, 0.5):
        for each in (plain, pipe):
            each.set_adapters("x", weight)
        result = pipe("a red circle", **SMALL)
        assert result.memory.plan.component("transformer").streamed > 0
        assert torch.equal(result.images, plain("a red circle", **SMALL).images)
    with pytest.raises(Unsupported, match="fuse_lora: this pipeline has a memory budget"):
        pipe.fuse_lora()
    pipe.unload_lora()
    assert torch.equal(pipe("a red circle", **SMALL).images, before)


def test_the_plan_counts_the_adapters_bytes():
    pipe = ZImagePipeline.from_default(ram="64GiB", compute="exact")
    before = least(pipe)
    layer = pipe.transformer.layers[0].feed_forward.w1
    names = [f"layers.{i}.feed_forward.{part}" for i in range(4) for part in ("w1", "w3")]
    pairs = {name: adapters.split_lora(layer.out_features, layer.in_features, rank=512)[0] for name in names}
    pipe.load_lora(adapters.file_of(pairs))
    size = pipe.loras[0].nbytes
    # as it was read, and twice as factors, which another rotation of x may double
    assert 2 * size < least(pipe) - before < 4 * size
    pipe.unload_lora()
    assert abs(least(pipe) - before) < MIB
