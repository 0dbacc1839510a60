"""Launches of Triton kernels that cost the host little.

`kernel[grid](...)` looks at every argument to find the compiled kernel that fits them: 16 us, of which the launch is
the smallest part. A `Launch` keeps what the first launch compiled and calls it directly, in 4 us, as long as all that
Triton looked at is the same. Tests: tests/kernels/test_launch.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from triton.compiler import CompiledKernel
from triton.runtime import driver

LARGEST = 2**31 - 1
"""Largest integer that Triton passes in 32 bits."""
MOST = 1024
"""Sets of dtypes and sizes that a launch remembers; the kernels behind them are far fewer."""


class Launch:
    """A kernel with its constants. Parameters are pointers, sizes, lengths, constants, in this order.

    Args:
        kernel: The function under `triton.jit`, whose `do_not_specialize` names the lengths that are integers.
        constants: Its constexpr arguments, in their order.
        options: Options of the launch, such as num_warps.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], **options: Any) -> None:
        self.kernel = kernel
        self._constants, self._options = constants, options
        self._values = tuple(constants.values())
        self._compiled: dict[tuple[Any, ...], CompiledKernel] = {}

    def __call__(
        self,
        grid: tuple[int, int],
        tensors: Sequence[torch.Tensor | None],
        sizes: tuple[int, ...],
        lengths: tuple[float, ...],
    ) -> None:
        """Launch on the device of the first tensor, on its current stream.

        Args:
            grid: Programs along two axes.
            tensors: The pointers, the first of which is never None.
            sizes: Integers that the compiled kernel may depend on, such as rows of a weight and strides.
            lengths: Integers that it does not depend on, such as rows of x, and floats.
        """
        device = tensors[0].get_device()  # type: ignore[union-attr]
        if device < 0:  # the interpreter
            self._by_triton(grid, tensors, sizes, lengths)
        elif device == torch.cuda.current_device():
            self._launch(device, grid, tensors, sizes, lengths)
        else:
            with torch.cuda.device(device):  # Triton launches on the current device
                self._launch(device, grid, tensors, sizes, lengths)

    def _launch(self, device: int, grid: Any, tensors: Any, sizes: Any, lengths: Any) -> None:
        key: list[Any] = [device, *sizes]
        addresses = 0
        for tensor in tensors:
            if tensor is None:
                key.append(None)
            else:
                addresses |= tensor.data_ptr()
                key.append(tensor.dtype)
        known = tuple(key)
        compiled = self._compiled.get(known)
        # lengths of more bits, and addresses that are no multiple of 16, are other kernels
        usual = not addresses % 16 and max(lengths) <= LARGEST
        if compiled is not None and usual:
            compiled[grid[0], grid[1], 1](*tensors, *sizes, *lengths, *self._values)
            return
        found = self._by_triton(grid, tensors, sizes, lengths)
        # AMD's compiler looks at the size of the storage too, so Triton goes on looking there
        if usual and isinstance(found, CompiledKernel) and torch.version.hip is None:
            if len(self._compiled) >= MOST:
                self._compiled.clear()
            self._compiled[known] = found

    def _by_triton(self, grid: Any, tensors: Any, sizes: Any, lengths: Any) -> Any:
        return self.kernel[grid](*tensors, *sizes, *lengths, **self._constants, **self._options)


def current_stream(device: int) -> int:
    """Handle of the current stream of a GPU, by a call that makes no object of torch."""
    return _stream_getter()(device)


@cache
def _stream_getter() -> Callable[[int], int]:
    found: Callable[[int], int] = driver.active.get_current_stream
    return found
