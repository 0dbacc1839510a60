"""Measures the errors of each block of a transformer: A's tensors are kept on disk, then B is compared.

A block has two errors. `own` is the error of B's block on the input of A's block, relative to what A's block
adds to this input; only the weights of this block cause it. `stream` is the error of the residual stream
after the block, if both models began the step with the same latents; the blocks before it contribute.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.errors import BadFile
from zimage_core.models.transformer import Prepared, ZImageTransformer
from zimage_core.study.metrics import relative_error
from zimage_core.study.step_hook import StepHook

STACKS = ("context_refiner", "noise_refiner", "layers")
"""Stacks of blocks in the order in which they run; the first runs only at the beginning of a run."""

Key = tuple[int, str]
"""(step, block whose output it is), or (step, stack) for the input of the first block."""


@dataclass(frozen=True)
class BlockError:
    """Errors of one block in one step.

    Args:
        block: Name of the module, such as layers.3.
        step: Number of the step, from 0.
        own: Error of the block alone, relative to what A's block adds to its input.
        stream: Error of the residual stream after the block, relative to A's stream.
    """

    block: str
    step: int
    own: float
    stream: float


class Spool:
    """Storage on disk for tensors during a comparison; a context manager that removes them.

    The files are in a temporary folder of the system (TMPDIR).
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="zimage-")
        self._kept: dict[Key, tuple[Path, torch.dtype, torch.Size]] = {}

    def put(self, key: Key, tensor: Tensor) -> None:
        """Write a tensor.

        Raises:
            BadFile: The disk is full or cannot be written.
        """
        path = Path(self._folder.name) / str(len(self._kept))
        data = tensor.detach().cpu().contiguous()
        try:
            path.write_bytes(data.flatten().view(torch.uint8).numpy().data)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            hint = "free some space, set TMPDIR to another folder, or compare fewer steps of blocks"
            raise BadFile(path, f"blocks could not be set aside ({reason})", hint) from None
        self._kept[key] = path, data.dtype, data.shape

    def get(self, key: Key) -> Tensor:
        """Read a tensor back, on the CPU."""
        path, dtype, shape = self._kept[key]
        return torch.from_file(str(path), size=shape.numel(), dtype=dtype).view(shape)

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder and what is in it."""
        self._folder.cleanup()


class BlockWatch:
    """Hooks on the blocks of a transformer; a context manager that removes them.

    In each step only the positive side of the first image is compared.

    Args:
        net: The transformer.
        steps: Steps in which blocks are compared.
        spool: Storage of A's tensors.
        compare: False stores the tensors of this model, True compares them with the stored ones.
    """

    def __init__(self, net: ZImageTransformer, steps: Collection[int], spool: Spool, compare: bool) -> None:
        self.errors: list[BlockError] = []
        self._net, self._steps, self._spool, self._compare = net, frozenset(steps), spool, compare
        self._step = 0  # captions are refined before the first step
        self._seen: set[str] = set()
        self._handles: list[Any] = []

    def __enter__(self) -> BlockWatch:
        self._handles.append(StepHook(self._net, before=self._begin))
        for name in STACKS:
            for i, block in enumerate(getattr(self._net, name)):
                hook = self._hook(name, i)
                self._handles.append(block.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin(self, latent: Tensor, prepared: Prepared, step: int, caption: int) -> None:
        self._step = step if caption == 0 else -1
        self._seen.clear()

    def _hook(self, stack: str, index: int) -> Any:
        name = f"{stack}.{index}"

        def look(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            if self._step not in self._steps or name in self._seen:
                return
            self._seen.add(name)
            # the input of a block is the output of the previous one, except for the first of a stack
            before = (self._step, f"{stack}.{index - 1}") if index else (self._step, stack)
            after = (self._step, name)
            if self._compare:
                self._measure(block, args, kwargs, out, before, after)
                return
            if not index:
                self._spool.put(before, args[0])
            self._spool.put(after, out)

        return look

    def _measure(
        self,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Tensor,
        before: Key,
        after: Key,
    ) -> None:
        if before not in self._spool or after not in self._spool:
            return
        start, end = self._spool.get(before), self._spool.get(after)
        if end.shape != out.shape:
            return  # captions of different length cannot be compared
        # call forward directly, so that the hooks do not run
        own = block.forward(start.to(out.device, out.dtype), *args[1:], **kwargs).cpu().double()
        added = end.double() - start.double()
        error = BlockError(
            after[1],
            self._step,
            relative_error(own - start.double(), added),
            relative_error(out.cpu(), end),
        )
        self.errors.append(error)


def probes(steps: int, count: int) -> tuple[int, ...]:
    """Numbers of `count` steps, spread evenly from the first to the last."""
    count = min(count, steps)
    return tuple(int(i) for i in torch.linspace(0, steps - 1, count).round()) if count else ()
