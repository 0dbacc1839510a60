"""What ControlNets and adapters take beside a pipeline's networks; from headers, or from what is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from zimage_core.errors import OverBudget, WrongModel
from zimage_core.files.units import in_bytes
from zimage_core.memory.activations import FLOAT32, ITEMSIZE, image_tokens, padded
from zimage_core.memory.job import Job
from zimage_core.memory.plan import Plan
from zimage_core.memory.residency import SLOTS
from zimage_core.memory.sizes import Matrix, Sizes
from zimage_core.weights.adapters import is_down
from zimage_core.weights.controlnets import LAYERS, REFINER
from zimage_core.weights.opened import Opened
from zimage_core.weights.source import WeightFile

MAPS = 3
"""Maps of the joint sequence that live for each control image beside those of a block: its tokens, a hint,
and the base's tokens that it begins with."""
_BLOCK = re.compile(rf"((?:{LAYERS}|{REFINER})\.\d+)\.(?!adaLN_modulation)")


@dataclass(frozen=True)
class Net:
    """One ControlNet.

    Args:
        always: Bytes that lie on the device as long as it runs.
        blocks: Bytes of the matrices of each block, which may be moved in turn.
        matrices: Weights of its Linear layers.
    """

    always: int
    blocks: tuple[int, ...]
    matrices: tuple[Matrix, ...]


@dataclass(frozen=True)
class Beside:
    """The ControlNets of a run.

    Args:
        nets: The networks.
        images: Control images of the run.
    """

    nets: tuple[Net, ...] = ()
    images: int = 0

    def live(self, job: Job) -> int:
        """Bytes of temporary tensors that are alive beside the transformer's."""
        if not self.nets:
            return 0
        config, item = job.net_config, ITEMSIZE[job.dtype]
        image, text = padded(image_tokens(config, job.rows, job.cols)), padded(job.caption)
        # the embedded latents stay for all steps, and each image of the run may have its own
        maps = self.images * (MAPS * (image + text) + job.images * image) * config.dim * item
        modulations = sum(len(net.blocks) for net in self.nets) * job.steps * 4 * config.dim * FLOAT32
        scratch = (matrix.scratch(job.dtype, job.kernels) for net in self.nets for matrix in net.matrices)
        # tensors that stay between those of a block split the memory for its largest; a CPU has no gaps
        largest = (image + text) * config.hidden_dim * item if job.gaps("denoise", maps) else 0
        return maps + modulations + largest + max(scratch, default=0)

    def weights(self, streamed: bool) -> int:
        """Bytes of the networks on the device, whole or with their blocks in turn."""
        moving = [SLOTS[0] * max(net.blocks, default=0) if streamed else sum(net.blocks) for net in self.nets]
        return sum(net.always for net in self.nets) + sum(moving)

    def least(self, job: Job) -> int:
        """Bytes without which they do not run."""
        return self.live(job) + self.weights(streamed=True) if self.nets else 0

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
        if not self.nets:
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

    def shown(self, job: Job, plan: Plan, streamed: bool) -> Plan:
        """A plan that `planned` made, with the networks in the phase of the steps."""
        weights, how = self.weights(streamed), "block by block" if streamed else "whole"
        phases = tuple(
            replace(phase, others=phase.others + weights, activations=phase.activations + self.live(job))
            if phase.name == "denoise"
            else phase
            for phase in plan.phases
        )
        reason = f"ControlNets take {in_bytes(weights)} beside the transformer, {how}; times are without them"
        return replace(
            plan, phases=phases, floor=plan.floor + self.least(job), reasons=(*plan.reasons, reason)
        )


NO_NETS = Beside()
"""A run without control."""


def net_of(opened: Opened, dtype: str) -> Net:
    """What the ControlNet in a file weighs.

    Raises:
        WrongModel: The file holds another model.
    """
    file, card = opened.file, opened.card
    if card.kind != "controlnet":
        raise WrongModel(file.path, f"this is {card.title}", "give a ControlNet of Z-Image as the ControlNet")
    always, blocks, matrices = 0, dict[str, int](), []
    for name, info in file.tensors.items():
        if len(info.shape) != 2 or not name.endswith(".weight"):
            always += math.prod(info.shape) * ITEMSIZE[dtype]
            continue
        matrix = Matrix(info.format.name, *info.shape)
        matrices.append(matrix)
        found = _BLOCK.match(name.removeprefix(card.prefix))
        if found is None:
            always += matrix.nbytes
        else:
            blocks[found[1]] = blocks.get(found[1], 0) + matrix.nbytes
    return Net(always, tuple(blocks.values()), tuple(matrices))


def with_adapters(job: Job, files: Sequence[WeightFile]) -> Sizes:
    """The sizes of a run with adapters from files: factors on the device, and what was read on the host."""
    item, device, host, ranks = ITEMSIZE[job.dtype], 0, 0, 0
    for file in files:
        highest = 0
        for name, info in file.tensors.items():
            count = math.prod(info.shape)
            host += info.nbytes
            device += count * max(item, info.nbytes // max(1, count))
            if is_down(name):
                device += count * item  # once more for activations that were rotated
                highest = max(highest, info.shape[0])
        ranks += highest
    tokens = padded(image_tokens(job.net_config, job.rows, job.cols)) + padded(job.caption)
    grown = job.net.always + device + tokens * ranks * FLOAT32
    return replace(job.sizes, transformer=replace(job.net, always=grown, host=job.net.host + host))
