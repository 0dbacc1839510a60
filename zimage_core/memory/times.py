"""How long a plan should take: a model of compute and transfer; nothing is run."""

from __future__ import annotations

from dataclasses import dataclass

from zimage_core.memory.job import AT_ONCE, Job, Way, bytes_of
from zimage_core.memory.residency import Residency


@dataclass(frozen=True)
class Times:
    """Expected seconds, from rates; nothing was run.

    Args:
        encode: Of all captions, transfer included.
        encode_transfer: Of that, what its bytes need on the link.
        compute: Of one step, all pictures and sides.
        transfer: Of the bytes streamed in one step.
        fill: Of the first block of a step, which nothing hides; as long as the largest that is streamed.
        step: max(compute, transfer) + fill.
        first_step: The same with the captions' way through the context refiner, where the blocks that stay
            are still to be loaded; where everything is resident it was loaded before the run.
        decode: Of all pictures, loading included.
    """

    encode: float
    encode_transfer: float
    compute: float
    transfer: float
    fill: float
    step: float
    first_step: float
    decode: float

    @property
    def hidden(self) -> bool:
        """Whether the streamed bytes arrive before they are needed."""
        return self.transfer <= self.compute


def resident_times(job: Job) -> Times:
    """With everything on the device from before the run."""
    step = job.step_seconds()
    return Times(
        encode=job.encode_seconds(), encode_transfer=0.0, compute=step, transfer=0.0, fill=0.0, step=step,
        first_step=step, decode=job.decode_seconds(AT_ONCE),
    )  # fmt: skip


def streamed_times(job: Job, blocks: Residency, way: Way, link: float) -> Times:
    """With so many bytes a second from the host, where blocks pass through slots or stay for their phase."""
    sides = job.images * job.captions
    compute, transfer = job.step_seconds(), sides * blocks.streamed_bytes / link
    moved = [n for i, n in enumerate(bytes_of(job.net.blocks)) if i not in blocks.resident]
    fill = max(moved, default=0) / link
    text = job.captions * job.encoder.streamable / link
    first = max(bytes_of(job.encoder.blocks), default=0) / link
    load = (job.net.always + blocks.resident_bytes) / link
    refine = (sides if blocks.slots else 1) * sum(job.net.once) / link
    return Times(
        encode=max(job.encode_seconds(), text) + first,
        encode_transfer=text,
        compute=compute,
        transfer=transfer,
        fill=fill,
        step=max(compute, transfer) + fill,
        first_step=max(compute, transfer + load) + fill + refine,
        decode=job.vae.always / link + job.decode_seconds(way),
    )
