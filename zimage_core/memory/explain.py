"""What a plan says in sentences: why it is so, and what would fit where nothing does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from zimage_core.files.units import in_bytes, in_seconds
from zimage_core.memory.job import AT_ONCE, Job

if TYPE_CHECKING:
    from zimage_core.memory.plan import Plan

COMMON = 4.5 / 16
"""Bits a weight of a common quantisation over those of bfloat16."""
FINEST = 2.0625 / 16
"""Bits a weight of the smallest usual quantisation over those of bfloat16."""


def reasons(job: Job, plan: Plan) -> tuple[str, ...]:
    """Why each network lies where it does, and what that costs."""
    if plan.resident:
        return _resident(plan)
    found = [_text_encoder(plan), _transformer(job, plan), _vae(job, plan)]
    if plan.from_disk and plan.ram is not None:
        found.append(
            f"{in_bytes(plan.ram)} of host memory hold no copy of what is streamed: steps read it from disk "
            f"at {in_bytes(min(plan.rates.disk, plan.rates.link))}/s"
        )
    return tuple(found)


def _resident(plan: Plan) -> tuple[str, ...]:
    weights = plan.phases[0].weights + plan.phases[0].others
    limit = "without a limit" if plan.vram is None else f"in {in_bytes(plan.vram)}"
    found = [f"everything stays on the device, {in_bytes(weights)} of weights {limit}: nothing is streamed"]
    if planes := plan.phases[0].planes:
        found.append(f"{in_bytes(planes)} more are used for weights in the fused kernel's layout")
    return tuple(found)


def _text_encoder(plan: Plan) -> str:
    part, times = plan.component("text_encoder"), plan.times
    return (
        f"the text encoder is streamed, it runs once: {in_bytes(part.streamed)} pass in "
        f"{in_seconds(times.encode)}; its table of tokens, {in_bytes(part.host)}, stays in host memory"
    )


def _transformer(job: Job, plan: Plan) -> str:
    part, times = plan.component("transformer"), plan.times
    moved = [i for i, block in enumerate(job.net.blocks) if block.nbytes]
    staying = len(set(moved) & set(part.resident_blocks))
    if not part.slots:
        return f"the transformer stays while it runs: all {part.blocks} blocks, {in_bytes(part.resident)}"
    sides = job.images * job.captions
    amount = f"{in_bytes(sides * part.each_step)} a step take {in_seconds(times.transfer)}"
    if times.hidden:
        pace = f"hidden behind {in_seconds(times.compute)} of compute"
    else:
        pace = f"more than the {in_seconds(times.compute)} of compute, so steps wait for the link"
    kept = (
        f"{staying} of {len(moved)} blocks stay, spread evenly"
        if staying
        else (f"none of {len(moved)} blocks stays")
    )
    fixed = in_bytes(job.net.always)
    return (
        f"{kept}, beside {fixed} that always do; the others pass through {part.slots} slots of "
        f"{in_bytes(part.slot_bytes)}: {amount}, {pace}; the context refiner comes for each caption, "
        f"{in_bytes(part.once)}"
    )


def _vae(job: Job, plan: Plan) -> str:
    whole = in_bytes(job.decode_live(AT_ONCE))
    if plan.tile is None:
        return f"the VAE is loaded for its phase and decodes at once ({whole})"
    side = plan.tile * job.vae_config.spatial_factor
    taken = in_bytes(job.decode_live((plan.tile, plan.maps_on_host)))
    maps = " with its maps in host memory" if plan.maps_on_host else ""
    return f"the VAE decodes in tiles of {side} px{maps}, {taken}: at once it would take {whole}"


def over_budget(job: Job, vram: int, floor: int) -> str:
    """One sentence: the floor, what was given, what would fit."""
    phase, _ = max(job.floors().items(), key=lambda item: item[1])
    fits = []
    if smaller := _largest_picture(job, vram):
        fits.append("a picture of {} x {} px".format(*smaller))
    if (most := _largest_block(job, vram)) and phase != "decode":
        fits.append(
            f"a quantisation whose blocks have at most {in_bytes(most)} (here: {in_bytes(_block(job))})"
        )
    hint = f"what would fit is {' or '.join(fits)}" if fits else "give as much, no smaller picture would fit"
    return (
        f"plan: {in_bytes(vram)} of GPU memory are given and {job.width} x {job.height} px need at least "
        f"{in_bytes(floor)} ({phase}, all blocks streamed, VAE in tiles); {hint}"
    )


def over_host(ram: int, wanted: Mapping[str, int]) -> str:
    """One sentence on host memory."""
    parts = ", ".join(f"{in_bytes(count)} for {what}" for what, count in wanted.items())
    return (
        f"plan: {in_bytes(ram)} of host memory are given and {in_bytes(sum(wanted.values()))} are needed "
        f"({parts}); give more"
    )


def _block(job: Job) -> int:
    return max((block.nbytes for block in job.net.blocks), default=0)


def _largest_picture(job: Job, vram: int) -> tuple[int, int] | None:
    """The largest picture of this shape, or near it, with a floor within the budget."""
    unit, long = job.multiple, max(job.width, job.height)

    def sides(count: int) -> tuple[int, int]:
        scale = count * unit / long
        return tuple(max(1, round(side * scale / unit)) * unit for side in (job.width, job.height))  # type: ignore[return-value]

    low, high = 0, long // unit - 1  # low fits, or nothing does
    while low < high:
        middle = (low + high + 1) // 2
        if job.resized(*sides(middle)).floor() <= vram:
            low = middle
        else:
            high = middle - 1
    return sides(low) if low else None


def _largest_block(job: Job, vram: int) -> int:
    """Bytes of a block with which the picture would fit; 0 where smaller blocks do not help."""
    room = min(job.encode_room(vram), job.denoise_room(vram))
    most = room // 2 - (2 << 20)
    fits = all(need <= vram for name, need in job.floors().items() if name == "decode")
    weights = max((sum(m.weights for m in block.matrices) for block in job.net.blocks), default=0)
    return most if fits and most >= 2 * weights * FINEST else 0
