"""Networks that run beside the transformer in a budget, block by block with it: ControlNets.

They are on the device in the phase of the steps alone: whole where that leaves enough for the transformer,
else block by block as its own blocks are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zimage_core.errors import OverBudget
from zimage_core.files.units import in_bytes
from zimage_core.memory.activations import ITEMSIZE, image_tokens, padded
from zimage_core.memory.attach import blocks_of, stream_model, unstream
from zimage_core.memory.job import Job
from zimage_core.memory.plan import Plan
from zimage_core.memory.sizes import Matrix
from zimage_core.memory.stream import SLOTS, Stream
from zimage_core.memory.traffic import Traffic
from zimage_core.nn.linear import Linear, tensors_of
from zimage_core.quant.tensor import QuantTensor
from zimage_core.weights.opened import Opened

MAPS = 3
"""Maps of the joint sequence that live for each control image beside those of a block: its tokens, a hint,
and the base's tokens that it begins with."""


@dataclass(frozen=True)
class Beside:
    """The networks of a run beside its transformer.

    Args:
        networks: ControlNets, each with `blocks` and `stream`, on the host.
        images: Control images of the run.
    """

    networks: tuple[nn.Module, ...] = ()
    images: int = 0

    def live(self, job: Job) -> int:
        """Bytes of temporary tensors that are alive beside the transformer's."""
        if not self.networks:
            return 0
        config, item = job.net_config, ITEMSIZE[job.dtype]
        image, text = padded(image_tokens(config, job.rows, job.cols)), padded(job.caption)
        maps = self.images * (MAPS * (image + text) + image) * config.dim * item
        modulations = sum(len(blocks(net)) for net in self.networks) * job.steps * 4 * config.dim * 4
        scratch = max(_scratch(net, job) for net in self.networks)
        return maps + modulations + scratch

    def weights(self, streamed: bool) -> int:
        """Bytes of the networks on the device, whole or with their blocks in turn."""
        total = sum(tensor.nbytes for net in self.networks for tensor in tensors_of(net))
        if not streamed:
            return total
        moving = [[block.nbytes for block in blocks_of(blocks(net), (), _HOST)] for net in self.networks]
        return total - sum(map(sum, moving)) + sum(SLOTS * max(each, default=0) for each in moving)

    def least(self, job: Job) -> int:
        """Bytes without which they do not run."""
        return self.live(job) + self.weights(streamed=True) if self.networks else 0

    def planned(self, job: Job, plan_with: Callable[[int], Plan]) -> tuple[Plan, int, bool]:
        """The plan of what remains beside the networks.

        Args:
            job: The run.
            plan_with: Makes a plan where so many bytes of the budget are taken.

        Returns:
            The plan, the bytes that the networks take, and whether their blocks are streamed.

        Raises:
            OverBudget: The budget is too small; the message says what the networks take of it.
        """
        if not self.networks:
            return plan_with(0), 0, False
        whole = self.live(job) + self.weights(streamed=False)
        try:
            return plan_with(whole), whole, False
        except OverBudget:
            pass  # then block by block
        least = self.least(job)
        try:
            return plan_with(least), least, True
        except OverBudget as error:
            fault = f"{in_bytes(least)} of the budget are for the ControlNets; of the rest {error}"
            raise OverBudget(fault) from None

    @contextmanager
    def on(
        self, device: torch.device, ring: int, streamed: bool, traffic: dict[str, Traffic]
    ) -> Iterator[None]:
        """Inside, the networks are on the device; what was moved of each is told in `traffic`."""
        with ExitStack() as stack:
            for net in self.networks:
                everything: Any = net
                opened = everything.opened
                file = opened.file if isinstance(opened, Opened) else None
                resident = () if streamed else range(len(everything.blocks))
                stream = stream_model(everything, file, resident, device, ring=ring)
                stack.callback(_off, everything, stream, traffic)
            yield


_HOST = torch.device("cpu")


def blocks(net: nn.Module) -> Sequence[nn.Module]:
    """The blocks of a network that runs beside the transformer, in their order."""
    found: Any = net
    return found.blocks  # type: ignore[no-any-return]


def _off(net: Any, stream: Stream, traffic: dict[str, Traffic]) -> None:
    traffic[f"controlnet {net.name}"] = stream.traffic()
    unstream(net)


def _scratch(net: nn.Module, job: Job) -> int:
    """Most bytes that a product of a network needs for the dense form of its weight."""
    found = 0
    for module in net.modules():
        if isinstance(module, Linear) and isinstance(weight := module.weight, QuantTensor):
            rows, columns = weight.shape
            matrix = Matrix(weight.format.name, rows, columns, weight.scale is not None)
            found = max(found, matrix.scratch(job.dtype, job.kernels))
    return found
