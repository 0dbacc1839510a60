"""Records steps as CUDA graphs and replays them, so that a thousand kernel launches become one.

A graph holds addresses, so everything that changes between steps is copied into the graph's own inputs. There
is one graph for each set of shapes (image size, padded caption length). All graphs of a step share memory.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zimage_core.errors import Unsupported, printable
from zimage_core.quant.gpu import Scratch, hand_over_scratch, take_scratch

WARM_UP = 2
"""Warm-up runs, which compile kernels, make planes and grow scratch; a graph may do none of these."""
MOST_GRAPHS = 4
"""Most graphs kept; the least recently used one is dropped."""
MOST_COUNTED = 64
"""Sets of shapes whose calls are counted before one is recorded."""

Step = Callable[..., Tensor]
Recorder = Callable[[Callable[[], Tensor], torch.device], tuple[Callable[[], None], Tensor]]
"""(work, device) -> (replay, the result that each replay overwrites)."""


class _Graph:
    """A recorded graph, with the scratch memory whose address it contains."""

    def __init__(self, graph: torch.cuda.CUDAGraph, scratch: Scratch | None) -> None:
        self.graph, self.buffer = graph, scratch and scratch.buffer

    def __call__(self) -> None:
        self.graph.replay()


class CudaRecorder:
    """Records work as CUDA graphs that share a pool of memory, a stream and its scratch.

    Sharing is safe because only one graph runs at a time and nothing in the pool outlives a replay: inputs
    lie outside it, and results are copied out of it. A replay may overwrite what any other graph left.
    """

    def __init__(self) -> None:
        self._stream: Any = None
        self._pool: Any = None
        self._scratch: Scratch | None = None

    def __call__(self, work: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        """Run `work` to warm up, then record it on a stream of its own.

        Raises:
            Unsupported: The device is no CUDA GPU.
        """
        if device.type != "cuda":
            raise Unsupported(
                f"steps can be captured on a CUDA GPU only, not on {device}; leave capture out there"
            )
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        pool, self._pool = self._pool or torch.cuda.graph_pool_handle(), None  # none after an error
        take_scratch(device, self._stream.cuda_stream, self._scratch)
        try:
            graph, out = self._record(work, device, pool)
        finally:
            # other work that is given the same stream must not write to it
            self._scratch = hand_over_scratch(device, self._stream.cuda_stream)
        self._pool = pool
        return _Graph(graph, self._scratch), out

    def _record(
        self, work: Callable[[], Tensor], device: torch.device, pool: Any
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                work()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # the same stream as before, so that its scratch is not allocated again inside the graph;
        # thread_local, because another pipeline's threads may copy and allocate meanwhile; torch waits for
        # the current device
        with torch.cuda.device(device), torch.cuda.graph(graph, pool, stream, "thread_local"):
            out = work()
        return graph, out


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
        recorder: Function that records a graph, as `CudaRecorder` does, which is the default.
        after: Calls with the same shapes that run `step` itself before a graph is recorded for them.
        asked: Whether graphs were asked for. Otherwise an error while one is recorded becomes a warning,
            and `step` itself runs from then on.
    """

    def __init__(
        self, step: Step, recorder: Recorder | None = None, after: int = 0, asked: bool = True
    ) -> None:
        self.step, self.asked = step, asked
        self._after: float = after
        self._recorder = recorder or CudaRecorder()
        self._graphs: dict[Any, _Recorded] = {}
        self._calls: dict[Any, int] = {}

    def __len__(self) -> int:
        """Number of graphs held."""
        return len(self._graphs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Compute `step(*inputs)`; later calls do not overwrite the result."""
        key = tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in inputs)
        graph = self._graphs.pop(key, None)
        if graph is None:
            if self._count(key) <= self._after:
                return self.step(*inputs)
            try:
                graph = _Recorded(self.step, inputs, self._recorder)
            except RuntimeError as error:
                if self.asked:
                    raise
                self._give_up(error)
                return self.step(*inputs)
        self._graphs[key] = graph
        if len(self._graphs) > MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return graph(inputs)

    def _count(self, key: Any) -> int:
        """Calls with these shapes so far, this one included."""
        self._calls[key] = self._calls.pop(key, 0) + 1
        if len(self._calls) > MOST_COUNTED:
            del self._calls[next(iter(self._calls))]
        return self._calls[key]

    def _give_up(self, error: RuntimeError) -> None:
        self._graphs.clear()
        self._after = math.inf
        reason = printable((str(error).splitlines() or [type(error).__name__])[0], 120)
        warnings.warn(
            f"steps are not recorded as CUDA graphs ({reason}) and run one by one; "
            "pipe.capture(False) does not try",
            UserWarning,
            stacklevel=2,
        )
