"""Replayed steps copy their inputs, return results of their own, and have one graph per set of shapes."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers import tiny
from tests.helpers.recorder import Recorder
from zimage_core.errors import Unsupported
from zimage_core.nn import cuda_graphs
from zimage_core.nn.cuda_graphs import MOST_GRAPHS, StepGraphs
from zimage_core.quant import gpu


def add(a, b):
    return a + 2 * b


def test_a_replay_computes_from_the_inputs_of_its_call():
    recorder = Recorder()
    step = StepGraphs(add, recorder)
    for i in range(4):
        a, b = torch.full((3,), float(i)), torch.ones(3)
        assert torch.equal(step(a, b), a + 2)
    assert (recorder.recorded, recorder.replayed) == (1, 4)


def test_results_and_inputs_are_the_callers_own():
    step = StepGraphs(add, Recorder())
    a, b = torch.zeros(2), torch.ones(2)
    first = step(a, b)
    a.fill_(7)
    second = step(a, b)
    assert first.tolist() == [2, 2]
    assert second.tolist() == [9, 9]


def test_each_shape_and_dtype_has_a_graph_and_the_oldest_goes():
    recorder = Recorder()
    step = StepGraphs(add, recorder)
    for n in range(1, MOST_GRAPHS + 2):
        step(torch.zeros(n), torch.zeros(n))
    assert len(step) == MOST_GRAPHS
    step(torch.zeros(2), torch.zeros(2))  # still there
    assert recorder.recorded == MOST_GRAPHS + 1
    step(torch.zeros(1), torch.zeros(1))  # recorded anew
    step(torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    assert recorder.recorded == MOST_GRAPHS + 3


def test_a_graph_may_wait_for_some_calls_with_its_shapes():
    recorder = Recorder()
    step = StepGraphs(add, recorder, after=2)
    for n in (1, 2, 1, 1, 2, 1):
        assert torch.equal(step(torch.zeros(n), torch.ones(n)), torch.full((n,), 2.0))
    assert (recorder.recorded, recorder.replayed) == (1, 2)  # of n = 1: two calls of four


def no_memory(work, device):
    raise torch.OutOfMemoryError("no memory\nfor a graph")


def test_a_graph_nobody_asked_for_may_fail():
    step = StepGraphs(add, no_memory, asked=False)
    with pytest.warns(UserWarning, match=r"not recorded as CUDA graphs \(no memory\)"):
        assert step(torch.zeros(2), torch.ones(2)).tolist() == [2, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is not tried again
        assert step(torch.zeros(2), torch.ones(2)).tolist() == [2, 2]
    with pytest.raises(torch.OutOfMemoryError):
        StepGraphs(add, no_memory)(torch.zeros(2), torch.ones(2))


def test_scratch_is_handed_over_once():
    """A graph owns the scratch whose address it holds; the thread makes a new one."""
    device = torch.device("cpu")
    mine = gpu.scratch(device, 10, 10, torch.uint8)
    assert gpu.hand_over_scratch(device, 0).buffer.data_ptr() == mine.data_ptr()
    assert gpu.hand_over_scratch(device, 0) is None
    other = gpu.scratch(device, 10, 10, torch.uint8)
    assert other.data_ptr() != mine.data_ptr()


def test_scratch_is_taken_again_and_released():
    """The graphs of a step share theirs; `release_scratch` drops what no graph has."""
    device = torch.device("cpu")
    mine = gpu.scratch(device, 10, 10, torch.uint8).data_ptr()
    scratch = gpu.hand_over_scratch(device, 0)
    gpu.take_scratch(device, 0, scratch)
    assert gpu.scratch(device, 10, 10, torch.uint8).data_ptr() == mine
    gpu.release_scratch(torch.device("cuda", 0))
    assert gpu.hand_over_scratch(device, 0) is scratch
    gpu.take_scratch(device, 0, scratch)
    gpu.release_scratch(device)
    assert gpu.hand_over_scratch(device, 0) is None
    for place, gone in (("cuda:1", True), ("cuda", True), ("cuda:0", False), ("cpu", False)):
        gpu.take_scratch(torch.device("cuda", 1), 7, scratch)
        gpu.release_scratch(torch.device(place))
        assert (gpu.hand_over_scratch(torch.device("cuda", 1), 7) is None) == gone


def test_without_a_gpu_capture_is_refused_in_a_sentence():
    pipe = tiny.pipeline()
    with pytest.raises(Unsupported, match=r"CUDA GPU only, not on cpu"):
        pipe.capture()
    pipe.capture(False)
    with pytest.raises(Unsupported, match="CUDA GPU only"):
        StepGraphs(add)(torch.zeros(1), torch.zeros(1))


def captured(pipe):
    recorder = Recorder()
    pipe._placement.graphs = StepGraphs(pipe.transformer.predict, recorder)
    return recorder


def test_a_captured_run_gives_the_same_latents():
    pipe, plain = tiny.pipeline(), tiny.pipeline()
    recorder = captured(pipe)
    arguments = {"guidance_scale": 1.5, "negative_prompt": "b", "seed": 3, "output_type": "latent"}
    for prompt in ("a", "a much longer prompt of some words"):
        assert torch.equal(pipe(prompt, **arguments).images, plain(prompt, **arguments).images)
    assert recorder.replayed == 2 * 8 * 2
    assert 1 <= recorder.recorded <= 3  # one for each padded length of a caption


def test_graphs_do_not_outlive_the_weights_they_read(monkeypatch):
    pipe = tiny.pipeline()
    captured(pipe)
    pipe("a", seed=1, num_inference_steps=1)
    monkeypatch.setattr(cuda_graphs.StepGraphs, "__call__", lambda self, *inputs: self.step(*inputs))
    old = pipe._placement.graphs
    pipe.transformer = tiny.transformer(seed=5)
    pipe("a", seed=1, num_inference_steps=1)
    assert pipe._placement.graphs is not old
    old = pipe._placement.graphs
    pipe.to(torch.float16)
    assert pipe._placement.graphs is not old


class OnlyMeta(TorchDispatchMode):
    """Every tensor that is made or read lies on the meta device, whose numbers nobody can read."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                raise AssertionError(f"{func} touches a tensor on {tensor.device}")
        self.seen.append(str(func))
        return out


@torch.no_grad()
def test_a_step_does_no_work_on_the_host():
    """Nothing is read back and nothing is brought from the host, so a graph can hold a step."""
    model, taken = tiny.transformer(), []

    def record(*inputs):
        taken.append(inputs)
        return model.predict(*inputs)

    prepared = model.prepare([torch.randn(7, 24)], [0.5], (4, 4))
    model.step(torch.randn(16, 4, 4), prepared, 0, predict=record)
    far = model.to("meta")
    inputs = [tensor.to("meta") for tensor in taken[0]]
    with OnlyMeta() as mode:
        out = far.predict(*inputs)
    assert out.shape == (16, 4, 4)
    assert any("mm" in name for name in mode.seen), mode.seen


@pytest.mark.parametrize(
    "work", [lambda t: float(t.sum()), lambda t: t + torch.ones(3), lambda t: torch.arange(3).to("meta")]
)
def test_host_work_would_be_seen(work):
    with pytest.raises((AssertionError, RuntimeError)), OnlyMeta():
        work(torch.zeros(3, device="meta"))


def test_graphs_are_recorded_anew_after_a_weight_was_replaced_and_not_used_with_hooks():
    pipe = tiny.pipeline()
    recorder = captured(pipe)
    draw = {"prompt": "a", "seed": 1, "num_inference_steps": 1, "output_type": "latent"}
    before = pipe(**draw).images
    old = pipe._placement.graphs
    layer = pipe.transformer.layers[0].attention.to_v
    with torch.no_grad():
        layer.weight.mul_(-1)  # read at its address
    pipe(**draw)
    assert pipe._placement.graphs is old
    layer.weight = torch.nn.Parameter(layer.weight.clone())
    seen = []
    pipe.transformer.layers[0].register_forward_hook(lambda *_: seen.append(1))
    replayed = recorder.replayed
    assert not torch.equal(pipe(**draw).images, before)
    assert pipe._placement.graphs is not old
    assert seen
    assert recorder.replayed == replayed
