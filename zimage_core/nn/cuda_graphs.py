"""Records steps as CUDA graphs and replays them, so that a thousand kernel launches become one.

A graph holds addresses, so everything that changes between steps is copied into the graph's own inputs. There
is one graph for each set of shapes (image size, padded caption length).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zimage_core.errors import Unsupported
from zimage_core.quant.gpu import hand_over_scratch

WARM_UP = 2
"""Warm-up runs, which compile kernels, make planes and grow scratch; a graph may do none of these."""
MOST_GRAPHS = 4
"""Most graphs kept; the least recently used one is dropped. Each holds the activations of a step."""

Step = Callable[..., Tensor]
Recorder = Callable[[Callable[[], Tensor], torch.device], tuple[Callable[[], None], Tensor]]
"""(work, device) -> (replay, the result that each replay overwrites)."""


class _Graph:
    """A recorded graph, with the scratch memory whose address it contains."""

    def __init__(self, graph: torch.cuda.CUDAGraph, scratch: Tensor | None) -> None:
        self.graph, self.scratch = graph, scratch

    def __call__(self) -> None:
        self.graph.replay()


def record(work: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Run `work` to warm up, then record it as a CUDA graph on a stream of its own.

    Raises:
        Unsupported: The device is no CUDA GPU.
    """
    if device.type != "cuda":
        raise Unsupported(
            f"steps can be captured on a CUDA GPU only, not on {device}; leave capture out there"
        )
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # the same stream as before, so that its scratch is not allocated again inside the graph;
    # thread_local, because another pipeline's threads may copy and allocate meanwhile; torch waits for the
    # current device
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        out = work()
    return _Graph(graph, hand_over_scratch(out.device, stream.cuda_stream)), out


class _Recorded:
    """One graph and its inputs."""

    def __init__(self, step: Step, inputs: tuple[Tensor, ...], recorder: Recorder) -> None:
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        self.replay, self.out = recorder(lambda: step(*self.inputs), inputs[0].device)

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.replay()
        return self.out.clone()


class StepGraphs:
    """A callable that replaces `step`: new input shapes are recorded as graphs, known ones are replayed.

    A graph reads the weights at the addresses they had when it was recorded. After `.to`, dequantising or
    another change of weights, make a new object.

    Args:
        step: The function, on tensors alone, without host decisions that depend on their values.
        recorder: Function that records a graph, with the arguments and result of `record`.
    """

    def __init__(self, step: Step, recorder: Recorder = record) -> None:
        self.step = step
        self._recorder = recorder
        self._graphs: dict[Any, _Recorded] = {}

    def __len__(self) -> int:
        """Number of graphs held."""
        return len(self._graphs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Compute `step(*inputs)`; later calls do not overwrite the result."""
        key = tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in inputs)
        graph = self._graphs.pop(key, None) or _Recorded(self.step, inputs, self._recorder)
        self._graphs[key] = graph
        if len(self._graphs) > MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return graph(inputs)
