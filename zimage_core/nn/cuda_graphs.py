"""Steps recorded once as CUDA graphs and replayed: the launches of a thousand kernels become one.

A graph holds addresses, so everything that changes between steps is copied into inputs of its own. One graph
for each set of shapes (image size, padded caption length).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zimage_core.errors import Unsupported
from zimage_core.quant.gpu import hand_over_scratch

WARM_UP = 2
"""Runs before recording: they compile kernels, make planes and grow scratch, which a graph may not."""
MOST_GRAPHS = 4
"""Shapes kept; the least recently used one goes first. Each holds the activations of a step."""

Step = Callable[..., Tensor]
Recorder = Callable[[Callable[[], Tensor], torch.device], tuple[Callable[[], None], Tensor]]
"""(work, device) -> (replay, the result that each replay overwrites)."""


class _Graph:
    """A recorded graph and the scratch whose address is in it."""

    def __init__(self, graph: torch.cuda.CUDAGraph, scratch: Tensor | None) -> None:
        self.graph, self.scratch = graph, scratch

    def __call__(self) -> None:
        self.graph.replay()


def record(work: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Run `work` for warming up, then record it as a CUDA graph on a stream of its own.

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
    # the same stream, so that scratch which belongs to it is not allocated anew inside the graph
    # thread_local: another pipeline's threads may copy and allocate meanwhile
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
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
    """A callable in place of `ZImageTransformer.step`; shapes that are new are recorded, others replayed.

    Weights are read where they were when a graph was recorded: after `.to`, dequantising or another change of
    weights make a new object.

    Args:
        step: Work on tensors alone, without host decisions on their values.
        recorder: See `record`.
    """

    def __init__(self, step: Step, recorder: Recorder = record) -> None:
        self.step = step
        self._recorder = recorder
        self._graphs: dict[Any, _Recorded] = {}

    def __len__(self) -> int:
        """Graphs held."""
        return len(self._graphs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """As `step`; the result is the caller's own."""
        key = tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in inputs)
        graph = self._graphs.pop(key, None) or _Recorded(self.step, inputs, self._recorder)
        self._graphs[key] = graph
        if len(self._graphs) > MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return graph(inputs)
