"""The vision tower in a plan: it runs once, between the texts and the steps, whole or layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from zimage_core.config import VisionConfig
from zimage_core.errors import BadWeights, OverBudget, printable
from zimage_core.files.units import in_bytes
from zimage_core.memory.activations import FLOAT32, ITEMSIZE
from zimage_core.memory.job import Job
from zimage_core.memory.plan import Component, Phase, Plan
from zimage_core.memory.residency import SLOTS
from zimage_core.memory.sizes import matrices, part_of
from zimage_core.weights.opened import Opened


@dataclass(frozen=True)
class Tower:
    """The vision tower of a run.

    Args:
        config: Its sizes.
        always: Bytes that lie on the device as long as it runs.
        blocks: Bytes of the matrices of each layer, which may be moved in turn.
        tokens: Most patches of an image.
        dtype: Dtype of its computation.
        scratch: Bytes of the dense form of its largest matrix.
    """

    config: VisionConfig
    always: int
    blocks: tuple[int, ...]
    tokens: int
    dtype: str
    scratch: int

    @classmethod
    def of_file(cls, opened: Opened, dtype: str, tokens: int) -> Tower:
        """The tower in a file, from its header.

        Raises:
            BadWeights: Its sizes are not known.
        """
        part = part_of("siglip", opened, dtype)
        if not isinstance(part.config, VisionConfig):
            raise BadWeights(f"{printable(opened.file.path)}: this is no vision tower")
        scratch = max((matrix.scratch(dtype) for _, matrix in matrices(part)), default=0)
        return cls(part.config, part.always, tuple(part.block_bytes), tokens, dtype, scratch)

    @property
    def live(self) -> int:
        """Bytes of temporary tensors."""
        item, hidden, inner = ITEMSIZE[self.dtype], self.config.hidden_size, self.config.intermediate_size
        # the stream and a norm in float32, the branch's tensors, the pixels in float64, the table resized
        each = FLOAT32 * 4 * hidden + item * (6 * hidden + 2 * inner) + 16 * self.config.patch_dim
        return self.tokens * each + 2 * FLOAT32 * self.config.num_patches * hidden

    def weights(self, streamed: bool) -> int:
        """Bytes of the tower on the device, whole or with its layers in turn."""
        return self.always + (SLOTS[0] * max(self.blocks, default=0) if streamed else sum(self.blocks))

    def phase(self, job: Job, streamed: bool) -> Phase:
        """Its phase, where nothing else is on the device."""
        slots = SLOTS[0] * max(self.blocks, default=0) if streamed else 0
        weights = self.weights(streamed) - slots
        apart = (job.workspace, job.gaps("denoise", self.live), job.small("denoise"))
        return Phase("vision", weights, 0, slots, self.live, self.scratch, 0, *apart)

    def need(self, job: Job, streamed: bool) -> int:
        """Bytes of its phase."""
        return self.phase(job, streamed).peak

    def shown(self, job: Job, plan: Plan) -> Plan:
        """The plan with the phase in which the tower runs, after the texts are encoded.

        Raises:
            OverBudget: The budget does not hold the tower layer by layer.
        """
        room, least = plan.vram, self.need(job, streamed=True)
        if room is not None and least > room:
            raise OverBudget(
                f"plan: {in_bytes(room)} are left for the vision tower, which sees the reference images and "
                f"needs at least {in_bytes(least)}, layer by layer; give more"
            )
        streamed = room is not None and self.need(job, streamed=False) > room
        whole, staying = self.weights(streamed=False), self.always if streamed else 0
        slots, slot = (SLOTS[0], max(self.blocks, default=0)) if streamed else (0, 0)
        component = Component("siglip", staying, whole - staying, 0, slots, slot, len(self.blocks), (), False)
        how = "layer by layer" if streamed else "whole"
        reason = (
            f"the vision tower, {in_bytes(whole)}, is loaded {how} for the references; times are without it"
        )
        first, *others = plan.phases
        return replace(
            plan,
            components=(*plan.components, component),
            phases=(first, self.phase(job, streamed), *others),
            floor=max(plan.floor, least),
            reasons=(*plan.reasons, reason),
        )
