"""dequantize_weights: the largest weights first, under a budget, the same image."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch

from tests.helpers import tiny
from zimage_core.errors import BadArgument, Unsupported
from zimage_core.nn.linear import Linear
from zimage_core.pipeline import ZImagePipeline
from zimage_core.quant.tensor import QuantTensor
from zimage_core.run import placement


@pytest.fixture
def packed():
    return ZImagePipeline.from_default(dtype=torch.bfloat16)  # Q8_0 files


def linears(pipe):
    return {n: m for n, m in pipe.transformer.named_modules() if isinstance(m, Linear)}


def test_a_budget_is_kept_and_the_largest_come_first(packed):
    before = {
        f"{n}.weight": m.weight.nbytes
        for n, m in linears(packed).items()
        if isinstance(m.weight, QuantTensor)
    }
    assert before, "the embedded model holds packed weights"
    everything = sum(ZImagePipeline.from_default(dtype=torch.bfloat16).dequantize_weights(1 << 40).values())
    grown = packed.dequantize_weights(everything // 2)
    assert 0 < sum(grown.values()) <= everything // 2
    assert list(grown.values()) == sorted(grown.values(), reverse=True)
    dense = {
        f"{n}.weight"
        for n, m in linears(packed).items()
        if not isinstance(m.weight, QuantTensor) and f"{n}.weight" in before
    }
    assert dense == set(grown)
    for name in grown:
        weight = packed.transformer.get_parameter(name)
        assert weight.dtype == torch.bfloat16
        assert weight.numel() * 2 - before[name] == grown[name]


def test_the_image_is_nearly_the_same(packed):
    """A dense bfloat16 weight is a rounded one; on a CPU the packed one is used unrounded."""
    a = packed("a red circle", seed=1, num_inference_steps=2, output_type="np").images
    assert packed.dequantize_weights(1 << 40)
    b = packed("a red circle", seed=1, num_inference_steps=2, output_type="np").images
    assert float(abs(a - b).mean()) < 0.01
    assert packed.dequantize_weights(1 << 40) == {}


def test_on_a_cpu_nothing_grows_by_itself(packed):
    assert packed.dequantize_weights() == {}


@pytest.mark.parametrize("budget", [-1, 1.5, "much", True])
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(BadArgument, match="budget"):
        tiny.pipeline().dequantize_weights(budget)


@pytest.mark.slow
def test_a_compiled_transformer_runs_compiled():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plain, compiled = tiny.pipeline(), tiny.pipeline()
    compiled.transformer = torch.compile(compiled.transformer, backend=backend)
    arguments = {"seed": 1, "num_inference_steps": 2, "output_type": "latent"}
    want, got = plain("a", **arguments).images, compiled("a", **arguments).images
    assert graphs, "the steps went past the compiler"
    assert torch.equal(got, want)


def test_a_copied_network_belongs_to_no_file():
    pipe = ZImagePipeline.from_default()
    pipe.transformer = copy.deepcopy(pipe.transformer)
    assert set(pipe.files()) == {"text_encoder", "vae"}
    with pytest.raises(Unsupported, match="transformer came from none"):
        pipe.limit_memory(ram="2GiB")


def test_files_are_read_ahead_once_and_only_where_the_weights_are_mapped(monkeypatch):
    read = []

    def reading(file):
        read.append(file)
        return nullcontext()

    monkeypatch.setattr(placement.page_cache, "reading_ahead", reading)
    pipe = ZImagePipeline.from_default()
    for _ in range(2):
        pipe("a red circle", seed=1, num_inference_steps=1)
    files = pipe.files()
    assert read == [files[name] for name in ("text_encoder", "transformer", "vae")]
