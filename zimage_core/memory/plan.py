"""A plan: what lies where in each phase of a run, how much that is, and how long it should take.

`make_plan` is a pure function of sizes, picture, budget and rates; it reads no file and needs no GPU. The
phases share one arena: text encoder (encode), transformer (denoise), VAE (decode).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from zimage_core.errors import OverBudget
from zimage_core.memory import explain, residency
from zimage_core.memory.activations import collected_bytes, decode_bytes
from zimage_core.memory.job import AT_ONCE, LEAST_RING, RING, RUNTIME, Job, Way, bytes_of
from zimage_core.memory.rates import Rates, known
from zimage_core.memory.residency import Residency
from zimage_core.memory.sizes import Sizes
from zimage_core.memory.times import Times, resident_times, streamed_times
from zimage_core.quant.dispatch import PLANES_MARGIN

PHASES = ("encode", "denoise", "decode")


@dataclass(frozen=True)
class Component:
    """Where the bytes of one network lie; resident + streamed + host is all of it, each byte once.

    Args:
        name: "text_encoder", "transformer" or "vae".
        resident: Bytes on the device as long as the network runs.
        streamed: Bytes that pass through slots; of the VAE, what is loaded for its phase.
        host: Bytes that stay in host memory.
        slots: Of the device.
        slot_bytes: Of one slot.
        blocks: How many blocks it has.
        resident_blocks: Indices in the network's `blocks` of those that stay.
        kept: Whether its resident bytes also stay through the other phases.
        once: Of the streamed bytes, those that come once for each caption and not in every step: a
            transformer's context refiner.
    """

    name: str
    resident: int
    streamed: int
    host: int
    slots: int
    slot_bytes: int
    blocks: int
    resident_blocks: tuple[int, ...]
    kept: bool
    once: int = 0

    @property
    def each_step(self) -> int:
        """Of the streamed bytes, those that come again in every step."""
        return self.streamed - self.once


@dataclass(frozen=True)
class Phase:
    """Bytes on the device at the phase's peak.

    Args:
        name: One of PHASES.
        weights: Of this phase, resident.
        others: Weights of the other networks that are kept.
        slots: For weights that pass through.
        activations: Tensors of the computation, latents and pictures; before the first step the context
            refiner where it does not stay.
        scratch: Dense weights, one matrix at a time.
        planes: Copies of weights in the layout of the fused kernel.
        workspace: Of libraries.
    """

    name: str
    weights: int
    others: int
    slots: int
    activations: int
    scratch: int
    planes: int
    workspace: int

    @property
    def peak(self) -> int:
        """All of it."""
        return (
            self.weights + self.others + self.slots + self.activations
            + self.scratch + self.planes + self.workspace
        )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The answer of `make_plan`.

    Args:
        width: Of the picture in pixels.
        height: Likewise.
        images: Pictures of the run.
        caption_tokens: Of each caption.
        guidance: Whether each step runs a negative side too.
        steps: Of the run.
        dtype: Of the computation.
        vram: Budget in bytes; None for no limit.
        ram: Likewise, of the host.
        components: In the order of PHASES.
        phases: In that order.
        tile: Latents a side of the tiles in which the VAE decodes; None for the picture at once.
        maps_on_host: Whether the maps between its layers are kept in host memory.
        floor: Smallest budget that this picture has a plan for.
        ring: Bytes of pinned host memory that weights pass through.
        ram_need: Bytes of host memory beside the files' pages.
        from_disk: Whether streamed bytes are read from disk in every step, for want of host memory.
        rates: That the times were computed from.
        times: Expected.
        reasons: Why it is so, in sentences.
    """

    width: int
    height: int
    images: int
    caption_tokens: int
    guidance: bool
    steps: int
    dtype: str
    vram: int | None
    ram: int | None
    components: tuple[Component, ...]
    phases: tuple[Phase, ...]
    tile: int | None
    maps_on_host: bool
    floor: int
    ring: int
    ram_need: int
    from_disk: bool
    rates: Rates
    times: Times
    reasons: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Most bytes of device memory at once."""
        return max(phase.peak for phase in self.phases)

    @property
    def resident(self) -> bool:
        """Whether all weights stay on the device from the first phase to the last."""
        return all(component.kept for component in self.components)

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        later = (self.steps - 1) * self.times.step
        return self.times.encode + self.times.first_step + later + self.times.decode

    def component(self, name: str) -> Component:
        """By its name."""
        return next(component for component in self.components if component.name == name)

    def phase(self, name: str) -> Phase:
        """By its name."""
        return next(phase for phase in self.phases if phase.name == name)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        data = asdict(self)
        for shown, phase in zip(data["phases"], self.phases, strict=True):
            shown["peak"] = phase.peak
        data["times"]["hidden"] = self.times.hidden
        return {**data, "peak": self.peak, "resident": self.resident, "seconds": self.seconds}


def make_plan(
    sizes: Sizes,
    width: int,
    height: int,
    images: int = 1,
    caption_tokens: int = 128,
    *,
    vram: int | None = None,
    ram: int | None = None,
    rates: Rates | None = None,
    guidance: bool = False,
    steps: int = 8,
) -> Plan:
    """Plan a run.

    Args:
        sizes: Of the networks, and the dtype of the computation.
        width: In pixels, a multiple of VAE factor and patch (16).
        height: Likewise.
        images: Pictures of the run.
        caption_tokens: Of each caption, template included.
        vram: Bytes for our allocations; None for a plan with everything resident.
        ram: Bytes of host memory; None for enough.
        rates: Of the machine; default those known of sm_86.
        guidance: Whether there is a negative side.
        steps: Of the run.

    Raises:
        BadArgument: A size or number is out of range.
        OverBudget: vram or ram does not hold the least that this picture needs; the message says what would
            fit.
    """
    job = Job(sizes, width, height, images, caption_tokens, guidance, steps, rates or known("sm_86"))
    floor = job.floor()
    if vram is not None and vram < floor:
        raise OverBudget(explain.over_budget(job, vram, floor))
    plan = _everything_resident(job, vram, floor) or _shared_arena(job, vram, floor, job.rates.link)
    plan = _with_host(job, plan, ram)
    if plan.from_disk:
        slow = _shared_arena(job, vram, floor, min(job.rates.link, job.rates.disk))
        plan = replace(plan, times=slow.times)
    return replace(plan, reasons=explain.reasons(job, plan))


def _everything_resident(job: Job, vram: int | None, floor: int) -> Plan | None:
    """All weights stay through all phases; None if that does not fit."""
    live = {"encode": job.encode_live, "denoise": job.denoise_live, "decode": job.decode_live(AT_ONCE)}
    parts = (job.encoder, job.net, job.vae)
    weights = job.sizes.nbytes
    most = weights + job.around + max(live.values())
    if vram is not None and most > vram:
        return None
    planes = job.planes()
    if vram is not None:
        planes = max(0, min(planes, vram - most - PLANES_MARGIN))
    phases = tuple(
        Phase(name, part.nbytes, weights - part.nbytes, 0, live[name], job.scratch, planes, job.workspace)
        for name, part in zip(PHASES, parts, strict=True)
    )
    components = tuple(
        Component(part.name, part.nbytes, 0, 0, 0, 0, len(part.blocks), tuple(range(len(part.blocks))), True)
        for part in parts
    )
    return _plan(job, vram, floor, components, phases, AT_ONCE, resident_times(job))


def _shared_arena(job: Job, vram: int | None, floor: int, link: float) -> Plan:
    """Each network in its own phase: those that run once pass through, the steps keep what fits."""
    room = vram if vram is not None else job.sizes.nbytes + floor
    encoder = _through(bytes_of(job.encoder.blocks), job.encode_room(room))
    sizes = bytes_of(job.net.blocks)
    blocks = residency.place(sizes, job.denoise_room(room, refiner_stays=True))
    stays = blocks is not None and not blocks.slots
    if not stays:
        blocks = residency.place(sizes, job.denoise_room(room))
    refiner = sum(job.net.once)
    once = 0 if stays else refiner
    way = next((way for way in job.ways() if job.decode_room(room, way) >= 0), None)
    if encoder is None or blocks is None or way is None:  # below the floor
        raise OverBudget(explain.over_budget(job, room, floor))
    rest = (job.scratch, 0, job.workspace)
    before = Phase("encode", job.encoder.always, 0, encoder.nbytes, job.encode_live, *rest)
    resident = job.net.always + refiner - once + blocks.resident_bytes
    held = resident + blocks.slots * blocks.slot_bytes
    live = job.denoise_live if stays else job.visited_live
    during = Phase("denoise", resident, 0, held - resident, live, *rest)
    after = Phase("decode", job.vae.always, 0, 0, job.decode_live(way), *rest)
    kept = max(before.peak, after.peak) + held <= room
    if kept:
        before, after = replace(before, others=held), replace(after, others=held)
    transformer = Component(
        "transformer", resident, blocks.streamed_bytes + once, job.net.host, blocks.slots, blocks.slot_bytes,
        len(job.net.blocks), blocks.resident, kept, once,
    )  # fmt: skip
    text = Component(
        "text_encoder", job.encoder.always, job.encoder.streamable, job.encoder.host, encoder.slots,
        encoder.slot_bytes, len(job.encoder.blocks), (), False,
    )  # fmt: skip
    vae = Component("vae", 0, job.vae.always, job.vae.host, 0, 0, 0, (), False)
    times = streamed_times(job, blocks, way, link)
    return _plan(job, vram, floor, (text, transformer, vae), (before, during, after), way, times)


def _through(sizes: list[int], room: int) -> Residency | None:
    """Slots for blocks that run once, or their own bytes where that is less."""
    most = residency.SLOTS[0] * residency.slot_for(max(sizes, default=0))
    return residency.place(sizes, min(room, most), some=False)


def _with_host(job: Job, plan: Plan, ram: int | None) -> Plan:
    """The plan with its host memory; steps read from disk where that does not hold what they stream."""
    ring, out = RING, collected_bytes(job.vae_config, job.rows, job.cols, job.images)
    if plan.maps_on_host:
        out += decode_bytes(job.vae_config, job.rows, job.cols, plan.tile)
    table = 0 if plan.resident else plan.component("text_encoder").host
    fixed = {"Python and torch": RUNTIME, "the table of tokens": table, "the pictures": out}
    if ram is not None and sum(fixed.values()) + ring > ram:
        ring = LEAST_RING
    wanted = {**fixed, "the pinned ring": ring}
    need = sum(wanted.values())
    if ram is not None and need > ram:
        raise OverBudget(explain.over_host(ram, wanted))
    from_disk = ram is not None and plan.component("transformer").each_step > ram - need
    return replace(plan, ram=ram, ring=ring, ram_need=need, from_disk=from_disk)


def _plan(
    job: Job, vram: int | None, floor: int, components: tuple[Component, ...], phases: tuple[Phase, ...],
    way: Way, times: Times,
) -> Plan:  # fmt: skip
    return Plan(
        job.width, job.height, job.images, job.caption, job.guidance, job.steps, job.dtype, vram, None,
        components, phases, *way, floor, 0, 0, False, job.rates, times,
    )  # fmt: skip
