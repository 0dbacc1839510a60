"""What each block of a transformer does in chosen steps: set aside from one model, compared in another.

Two errors a block. `own`: the block of B on the input that A's block had, as a share of what A's block adds
to its input; it is the fault of this block's weights alone. `stream`: the residual stream behind the block
where both models began the step with the same latents; what the blocks before have done is in it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.models.transformer import Prepared, ZImageTransformer
from zimage_core.study.metrics import relative_error
from zimage_core.study.spool import Spool
from zimage_core.study.step_hook import StepHook

STACKS = ("context_refiner", "noise_refiner", "layers")
"""In the order in which they run; the first only at the beginning of a run."""


@dataclass(frozen=True)
class BlockError:
    """Of one block in one step; see the head of this file.

    Args:
        block: Name in the module, such as layers.3.
        step: From 0.
        own: Relative to what the block adds.
        stream: Relative to the stream.
    """

    block: str
    step: int
    own: float
    stream: float


class BlockWatch:
    """Hooks on the blocks of a transformer; a context manager that takes them back.

    Of the images and sides of a step the first is looked at, which is the positive side of the first image.

    Args:
        net: The transformer.
        steps: Which to look at.
        spool: Where A's tensors lie.
        compare: False sets aside what is seen, True compares with what is there.
    """

    def __init__(self, net: ZImageTransformer, steps: Collection[int], spool: Spool, compare: bool) -> None:
        self.errors: list[BlockError] = []
        self._net, self._steps, self._spool, self._compare = net, frozenset(steps), spool, compare
        self._step = 0  # captions are refined ahead of the first step
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
            # the input of a block is the output of the one before it, but for the first of a stack
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
        before: tuple[int, str],
        after: tuple[int, str],
    ) -> None:
        if before not in self._spool or after not in self._spool:
            return
        start, end = self._spool.get(before), self._spool.get(after)
        if end.shape != out.shape:
            return  # another caption: there is nothing to compare token by token
        # forward, not a call: the hooks must not see it
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
    """`count` of the steps, spread evenly from the first to the last."""
    count = min(count, steps)
    return tuple(int(i) for i in torch.linspace(0, steps - 1, count).round()) if count else ()
