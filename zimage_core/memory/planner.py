"""From sizes, image, budget and rates to a plan: a pure function that reads no file and needs no GPU.

The phases share the device: text encoder (encode), transformer (denoise), VAE (decode).
"""

from __future__ import annotations

from dataclasses import replace

from zimage_core.errors import OverBudget
from zimage_core.files.units import in_bytes
from zimage_core.memory import int8_plan, residency
from zimage_core.memory.activations import collected_bytes, decode_bytes
from zimage_core.memory.allocator import MIDDLE_SEGMENT, segment
from zimage_core.memory.job import AT_ONCE, Job, Way
from zimage_core.memory.nets import NO_NETS, Beside
from zimage_core.memory.plan import PHASES, Component, Phase, Plan, Times, reasons
from zimage_core.memory.rates import Rates
from zimage_core.memory.references import References
from zimage_core.memory.residency import Residency
from zimage_core.memory.sizes import Sizes
from zimage_core.memory.tower import Tower

RUNTIME = 800 << 20
"""Host memory of Python, torch and the driver, about."""
RING = 128 << 20
"""Bytes of the pinned ring that weights pass through, between files and the device."""
LEAST_RING = 32 << 20
"""Bytes of the ring where host memory is short."""


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
    compute: str = "exact",
    encoder_compute: str | None = None,
    nets: Beside = NO_NETS,
    references: References | None = None,
    tower: Tower | None = None,
) -> Plan:
    """Plan a run on a GPU; `Job` and `plan_beside` describe the arguments, `tower` sees the references.

    Raises:
        BadArgument: A size or number is out of range.
        OverBudget: vram or ram does not hold the least that this image needs; the message says what would
            fit.
    """
    job = Job(
        sizes, width, height, images, caption_tokens, rates, guidance, steps,
        compute=compute, encoder_compute=encoder_compute, image=bool(nets.nets), references=references,
    )  # fmt: skip
    plan = plan_beside(job, nets, vram, ram, cpu=False)
    return plan if tower is None else tower.shown(job, plan)


def plan_job(job: Job, vram: int | None = None, ram: int | None = None) -> Plan:
    """Plan a run.

    Args:
        job: The run.
        vram: Bytes that the driver may give; None for a plan with everything resident.
        ram: Bytes of host memory; None for enough.

    Raises:
        OverBudget: vram or ram does not hold the least; the message says what would fit.
    """
    floor, link = job.floor(), job.rates.link
    if vram is not None and vram < floor:
        raise job.over_budget(vram)
    plan = _with_host(job, _placed(job, vram, floor), ram)
    if plan.from_disk:
        slower = min(link, job.rates.disk), plan.component("transformer").kept
        plan = replace(plan, times=_with_rows(job, _in_turn(job, vram, floor, *slower)).times)
    moving = {i for i, block in enumerate(job.net.blocks) if block.nbytes}
    tile_px = (plan.tile or 0) * job.vae_config.spatial_factor
    found = reasons(plan, moving, job.net.always, job.decode_live(AT_ONCE), tile_px)
    return replace(plan, reasons=found)


def plan_beside(job: Job, nets: Beside, limit: int | None, ram: int | None, cpu: bool) -> Plan:
    """Plan a run with ControlNets.

    Args:
        job: The run.
        nets: The ControlNets; none of them for a run without control.
        limit: Bytes of the device, which on a CPU is the host; None for no limit.
        ram: Bytes of host memory beside a GPU; None for enough.
        cpu: Whether it is a run on a CPU.

    Raises:
        OverBudget: The limit does not hold the least; the message says what would fit.
    """

    def rest(taken: int) -> Plan:
        left = None if limit is None else max(0, limit - taken)
        return plan_on_cpu(job, left) if cpu else plan_job(job, left, ram)

    plan, taken, streamed = nets.planned(job, rest)
    if not taken:
        return plan
    vram = None if plan.vram is None else plan.vram + taken
    return nets.shown(job, replace(plan, vram=vram), streamed)


def beside(sizes: Sizes) -> int:
    """Bytes of host memory that a run on a CPU takes beside what its plan counts: Python, torch, tables."""
    return RUNTIME + sum(part.host for part in (sizes.text_encoder, sizes.transformer, sizes.vae))


def plan_on_cpu(job: Job, ram: int | None = None) -> Plan:
    """Plan a run on a CPU, whose memory plays the device's part.

    Args:
        job: The run, with the rates of a CPU.
        ram: Bytes of host memory for the whole process; None for no limit.

    Raises:
        OverBudget: ram does not hold the least.
    """
    if ram is None:
        return plan_job(job)
    around, size = beside(job.sizes), job.shown
    smaller = "make a smaller image" + (" of fewer references" if job.references else "")
    if ram < around + job.floor():
        less = ', or take compute="exact", which needs less' if job.int8 else ""
        raise OverBudget(
            f"ram: {in_bytes(ram)} of host memory are given and {size} need at least "
            f"{in_bytes(job.floor() + around)}; give more or {smaller}{less}"
        )
    plan = plan_job(job, ram - around)
    if plan.maps_on_host:
        raise OverBudget(
            f"ram: {in_bytes(ram)} of host memory do not hold the decoding of {size}, not even in tiles; "
            f"give more or {smaller}"
        )
    return plan


def _all_resident(job: Job, vram: int | None, floor: int) -> Plan | None:
    """All weights stay through all phases; None if that does not fit."""
    live = {"encode": job.encode_live, "denoise": job.denoise_live, "decode": job.decode_live(AT_ONCE)}
    parts = (job.encoder, job.net, job.vae)
    # under a budget the table of tokens and the VAE's encoder stay on the host, else they move with the rest
    host = [0 if vram is None else part.host for part in parts]
    staying = [part.nbytes - apart for part, apart in zip(parts, host, strict=True)]
    weights = sum(staying)
    # an image is encoded in the decoder's memory, with the VAE's encoder beside all that stays
    extra = {"encode": 0, "denoise": 0, "decode": host[2] if job.image else 0}
    most = weights + max(job.around(name, live[name]) + extra[name] for name in PHASES)
    if vram is not None and most > vram:
        return None
    planes = job.planes()
    if vram is not None and most + planes > vram:
        planes = 0
    phases = tuple(
        job.phase(name, own, 0, live[name], weights - own + extra[name], planes)
        for name, own in zip(PHASES, staying, strict=True)
    )
    components = tuple(
        Component(part.name, own, 0, apart, 0, 0, len(part.blocks), tuple(range(len(part.blocks))), True)
        for part, own, apart in zip(parts, staying, host, strict=True)
    )
    step = job.step_seconds()
    times = Times(job.encode_seconds(), 0.0, step, 0.0, 0.0, step, step, job.decode_seconds(AT_ONCE))
    return _plan(job, vram, floor, components, phases, AT_ONCE, times)


def _in_turn(job: Job, vram: int | None, floor: int, link: float, keep: bool = True) -> Plan:
    """Each network in its own phase: those that run once pass through, the steps keep what fits.

    What the steps keep also stays through the other phases, if it fits and `keep` does not forbid it.
    """
    room = vram if vram is not None else job.sizes.nbytes + floor
    texts, sizes = job.encoder.block_bytes, job.net.block_bytes
    # blocks that run once pass through three slots, or stay where that takes less
    through = residency.SLOTS[0] * residency.slot_for(max(texts, default=0))
    encoder = residency.place(texts, min(room - job.encode_need, through), some=False)
    blocks = residency.place(sizes, room - job.denoise_need_with_refiner)
    stays = blocks is not None and not blocks.slots
    if not stays:
        blocks = residency.place(sizes, room - job.denoise_need)
    way = next((way for way in job.ways() if job.decode_need(way) <= room), None)
    if encoder is None or blocks is None or way is None:  # below the floor
        raise job.over_budget(room)
    refiner = sum(job.net.once)
    once = 0 if stays else refiner
    resident = job.net.always + refiner - once + blocks.resident_bytes
    slots = blocks.slots * blocks.slot_bytes
    live = job.denoise_live if stays else job.visited_live
    before = job.phase("encode", job.encoder.always, encoder.nbytes, job.encode_live)
    during = job.phase("denoise", resident, slots, live)
    after = job.phase("decode", job.vae.always, 0, job.decode_live(way))
    kept = keep and max(before.peak, after.peak) + resident + slots <= room
    if kept:
        before, after = (replace(phase, others=resident + slots) for phase in (before, after))
    transformer = Component(
        "transformer", resident, blocks.streamed_bytes + once, job.net.host, blocks.slots, blocks.slot_bytes,
        len(sizes), blocks.resident, kept, once,
    )  # fmt: skip
    text = Component(
        "text_encoder", job.encoder.always, job.encoder.streamable, job.encoder.host, encoder.slots,
        encoder.slot_bytes, len(texts), (), False,
    )  # fmt: skip
    vae = Component("vae", 0, job.vae.always, job.vae.host, 0, 0, 0, (), False)
    times = _streamed_times(job, blocks, way, link)
    return _plan(job, vram, floor, (text, transformer, vae), (before, during, after), way, times)


def _streamed_times(job: Job, blocks: Residency, way: Way, link: float) -> Times:
    """Seconds with so many bytes a second from the host, where blocks pass through slots or stay."""
    sides = job.images * job.captions
    sizes = job.net.block_bytes
    compute, transfer = job.step_seconds(), sides * blocks.streamed_bytes / link
    fill = max((n for i, n in enumerate(sizes) if i not in blocks.resident), default=0) / link
    text = job.captions * job.encoder.streamable / link
    first = max(job.encoder.block_bytes, default=0) / link
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


def _placed(job: Job, vram: int | None, floor: int) -> Plan:
    """The plan: everything resident if it fits, else in turn; in int8 whichever takes less time."""
    link, whole = job.rates.link, _all_resident(job, vram, floor)
    if not job.int8 or vram is None:
        return _with_rows(job, whole or _in_turn(job, vram, floor, link))
    # weights that stay through all phases take memory from int8 rows
    plans = [_in_turn(job, vram, floor, link, keep) for keep in (True, False)]
    with_rows = [_with_rows(job, plan) for plan in (whole, *plans) if plan is not None]
    return min(with_rows, key=lambda plan: plan.seconds)


def _with_rows(job: Job, plan: Plan) -> Plan:
    """The plan with int8 rows instead of packed weights for resident blocks, where there is room for them."""
    if not job.int8:
        return plan
    part = plan.component("transformer")
    blocks = [(i, job.net.blocks[i]) for i in part.resident_blocks if job.net.blocks[i].matrices]
    with_net = [phase for phase in plan.phases if part.kept or phase.name == "denoise"]
    room = None if plan.vram is None else plan.vram - max(phase.peak for phase in with_net)
    # on a GPU making rows takes little, so that less than all of them is not worth the memory
    some = job.rates.architecture == "cpu"
    if not some:
        if part.slots:
            return plan
        room = None if room is None else room - MIDDLE_SEGMENT  # rows have a segment of their own
    costs = [block.int8_bytes - block.nbytes for _, block in blocks]
    chosen = [blocks[place] for place in int8_plan.choose(costs, room, some)]
    kept, packed = tuple(i for i, _ in chosen), sum(block.nbytes for _, block in chosen)
    rows = sum(block.int8_bytes for _, block in chosen)
    if chosen and not some:
        rows = segment(rows)

    def grown(phase: Phase) -> Phase:
        if phase not in with_net:
            return phase
        if phase.name == "denoise":
            return replace(phase, weights=phase.weights + rows - packed)
        return replace(phase, others=phase.others + rows - packed)

    changed = replace(part, resident=part.resident - packed, int8_rows=rows, int8_blocks=kept)
    compute = job.step_seconds(set(kept))
    step = max(compute, plan.times.transfer) + plan.times.fill
    return replace(
        plan,
        components=tuple(changed if each is part else each for each in plan.components),
        phases=tuple(grown(phase) for phase in plan.phases),
        times=replace(plan.times, compute=compute, step=step),  # the first step makes the rows
    )


def _with_host(job: Job, plan: Plan, ram: int | None) -> Plan:
    """The plan with its host memory; steps read from disk where that does not hold what they stream."""
    ring, out = RING, collected_bytes(job.vae_config, job.rows, job.cols, job.images)
    if plan.maps_on_host:
        out += decode_bytes(job.vae_config, job.rows, job.cols, plan.tile)
    table = plan.component("text_encoder").host
    fixed = {"Python and torch": RUNTIME, "the table of tokens": table, "the images": out}
    if job.net.host:
        fixed["the adapters"] = job.net.host
    if ram is not None and sum(fixed.values()) + ring > ram:
        ring = LEAST_RING
    wanted = {**fixed, "the pinned ring": ring}
    need = sum(wanted.values())
    if ram is not None and need > ram:
        parts = ", ".join(f"{in_bytes(count)} for {what}" for what, count in wanted.items())
        raise OverBudget(
            f"plan: {in_bytes(ram)} of host memory are given and {in_bytes(need)} are needed "
            f"({parts}); give more"
        )
    from_disk = ram is not None and plan.component("transformer").each_step > ram - need
    return replace(plan, ram=ram, ring=ring, ram_need=need, from_disk=from_disk)


def _plan(
    job: Job, vram: int | None, floor: int, components: tuple[Component, ...], phases: tuple[Phase, ...],
    way: Way, times: Times,
) -> Plan:  # fmt: skip
    return Plan(
        job.width, job.height, job.images, job.caption, job.guidance, job.steps, job.dtype, vram, None,
        components, phases, *way, floor, 0, 0, False, job.rates, times, compute=job.compute,
    )  # fmt: skip
