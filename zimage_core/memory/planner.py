"""From sizes, image, budget and rates to a plan: a pure function that reads no file and needs no GPU.

The phases share the device: text encoder (encode), transformer (denoise), VAE (decode).
"""

from __future__ import annotations

from dataclasses import replace

from zimage_core.config import MIN_TILE, AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.errors import BadArgument, OverBudget
from zimage_core.files.units import in_bytes
from zimage_core.memory import residency
from zimage_core.memory.activations import (
    ITEMSIZE,
    collected_bytes,
    decode_bytes,
    denoise_bytes,
    encode_bytes,
    image_tokens,
    images_bytes,
    padded,
)
from zimage_core.memory.plan import PHASES, Component, Phase, Plan, Times, reasons
from zimage_core.memory.rates import Rates, decode_flops, encode_flops, known, step_flops, step_traffic
from zimage_core.memory.residency import Residency
from zimage_core.memory.sizes import Block, Sizes, matrices
from zimage_core.quant.dispatch import PLANES_MARGIN, family

WORKSPACE = {"sm_90": 32 << 20, "sm_100": 32 << 20}
"""Bytes that the library of products takes for itself, by family; 9 MiB elsewhere. Source: PyTorch, notes on
CUDA semantics, cuBLAS workspaces."""
_WORKSPACE = 9 << 20
RUNTIME = 800 << 20
"""Host memory of Python, torch and the driver, about."""
RING = 128 << 20
"""Bytes of the pinned ring that weights pass through, between files and the device."""
LEAST_RING = 32 << 20
"""Bytes of the ring where host memory is short."""
MAP_PASSES = 6
"""How often a map of the image crosses the link at each resolution, where it is kept on the host."""
FINEST = 2.0625 / 8
"""Bytes a weight of the smallest usual quantisation."""

Way = tuple[int | None, bool]
"""How to decode: latents a side of the tiles or None, whether maps of the image are kept on the host."""
AT_ONCE: Way = (None, False)


class Job:
    """One run to be planned, with the bytes and seconds that follow from it for any budget.

    Args:
        sizes: Sizes of the networks, and the dtype of the computation.
        width: Pixels, a multiple of VAE factor and patch (16).
        height: Pixels, such a multiple.
        images: Images of the run.
        caption_tokens: Tokens of each caption, template included.
        rates: Rates of the machine; default those known of sm_86.
        guidance: Whether there is a negative side.
        steps: Steps of the run.

    Raises:
        BadArgument: A size or number is out of range.
    """

    def __init__(
        self, sizes: Sizes, width: int, height: int, images: int = 1, caption_tokens: int = 128,
        rates: Rates | None = None, guidance: bool = False, steps: int = 8,
    ) -> None:  # fmt: skip
        self.sizes, self.rates, self.dtype = sizes, rates or known("sm_86"), sizes.dtype
        self.width, self.height, self.images, self.caption = width, height, images, caption_tokens
        self.guidance, self.steps = guidance, steps
        self.captions = 2 if guidance else 1
        self.net, self.encoder, self.vae = sizes.transformer, sizes.text_encoder, sizes.vae
        net, encoder, vae = self.net.config, self.encoder.config, self.vae.config
        if not isinstance(net, TransformerConfig) or not isinstance(encoder, TextEncoderConfig):
            raise BadArgument("plan: the parts are not those of a Z-Image pipeline")
        if not isinstance(vae, AutoencoderConfig):
            raise BadArgument("plan: the VAE's part is not that of a VAE")
        self.net_config, self.encoder_config, self.vae_config = net, encoder, vae
        self.multiple = vae.spatial_factor * net.patch_size
        for name, value in (("images", images), ("caption tokens", caption_tokens), ("steps", steps)):
            if value < 1:
                raise BadArgument(f"{name}: got {value}, wanted at least 1")
        for name, side in (("width", width), ("height", height)):
            if side < 1 or side % self.multiple:
                raise BadArgument(f"{name}: got {side}, wanted a multiple of {self.multiple}")
        self.rows, self.cols = height // vae.spatial_factor, width // vae.spatial_factor
        self.flops_rate = self.rates.flops32 if self.dtype == "float32" else self.rates.flops
        self.scratch = max(part.scratch(sizes.dtype) for part in (self.net, self.encoder))
        gpu = self.rates.architecture != "cpu"
        self.workspace = WORKSPACE.get(family(self.rates.architecture), _WORKSPACE) if gpu else 0
        self.around = self.scratch + self.workspace  # in every phase
        self.encode_live = encode_bytes(encoder, caption_tokens, self.dtype, self.captions)
        rest = (caption_tokens, self.dtype, images, self.captions, steps)
        self.denoise_live = denoise_bytes(net, self.rows, self.cols, *rest)
        # a caption alone, and an image of one patch beside it
        refine = denoise_bytes(net, net.patch_size, net.patch_size, *rest)
        self.visited_live = max(self.denoise_live, max(self.net.once, default=0) + refine)
        # bytes on the device beside the blocks: the context refiner's blocks come one by one before the
        # first step, in the memory of its activations, or stay beside the steps
        self.encode_need = self.encoder.always + self.around + self.encode_live
        self.denoise_need = self.net.always + self.around + self.visited_live
        self.denoise_need_with_refiner = (
            self.net.always + sum(self.net.once) + self.around + self.denoise_live
        )

    def decode_live(self, way: Way) -> int:
        """Activations of decoding, finished images among them."""
        config, rows, cols = self.vae_config, self.rows, self.cols
        during = decode_bytes(config, rows, cols, *way) + images_bytes(config, rows, cols, self.images)
        return max(during, collected_bytes(config, rows, cols, self.images))

    def ways(self) -> list[Way]:
        """How to decode, quickest first: at once, in tiles from large to small, with maps on the host."""
        sides = range((max(self.rows, self.cols) - 1) // 8 * 8, MIN_TILE - 1, -8)
        return [AT_ONCE, *((side, False) for side in sides), (MIN_TILE, True)]

    def decode_need(self, way: Way) -> int:
        """Bytes on the device while the VAE decodes."""
        return self.vae.always + self.around + self.decode_live(way)

    def floors(self) -> dict[str, int]:
        """Least budget of each phase."""
        return {
            "encode": self.encode_need + residency.floor(self.encoder.block_bytes, some=False),
            "denoise": self.denoise_need + residency.floor(self.net.block_bytes),
            "decode": min(self.decode_need(way) for way in self.ways()),
        }

    def floor(self) -> int:
        """Least budget of the whole run."""
        return max(self.floors().values())

    def planes(self) -> int:
        """Bytes of the planes that products of few rows ask for, if there is room."""
        architecture = self.rates.architecture
        image, text = padded(image_tokens(self.net_config, self.rows, self.cols)), padded(self.caption)

        def tokens(name: str) -> int:
            stack = name.partition(".")[0]
            if ".adaLN_modulation." in name or stack == "t_embedder":
                return self.steps
            return {"layers": image + text, "context_refiner": text, "cap_embedder": text}.get(stack, image)

        wanted = sum(m.planes(self.caption, architecture) for _, m in matrices(self.encoder))
        return wanted + sum(m.planes(tokens(name), architecture) for name, m in matrices(self.net))

    def encode_seconds(self) -> float:
        """Compute of all captions."""
        flops = encode_flops(self.encoder_config, self.caption) / self.flops_rate
        return self.captions * (flops + self._unpacking(self.encoder.blocks) / self.rates.bandwidth)

    def step_seconds(self) -> float:
        """Compute of one step: all images and sides, one after the other."""
        args = (self.net_config, self.rows, self.cols, self.caption)
        moved = step_traffic(*args, ITEMSIZE[self.dtype]) + self._unpacking(self.net.blocks)
        one = step_flops(*args) / self.flops_rate + moved / self.rates.bandwidth
        return self.images * self.captions * one

    def decode_seconds(self, way: Way) -> float:
        """Compute of decoding all images."""
        config, (tile, apart) = self.vae_config, way
        one = decode_flops(config, self.rows, self.cols) / self.rates.flops32
        if tile is not None:  # a convolution's rim, two pixels on each side, is computed twice
            one *= (1 + 4 / (tile * config.spatial_factor)) ** 2
        if apart:
            channels = sum(4**i * c for i, c in enumerate(config.block_out_channels[::-1]))
            maps = channels * self.rows * self.cols
            one += MAP_PASSES * maps * ITEMSIZE["float32"] / self.rates.pageable
        return self.images * one

    def _unpacking(self, blocks: tuple[Block, ...]) -> int:
        """Bytes read and written to make the weights of blocks dense, once each."""
        item = ITEMSIZE[self.dtype]
        return sum(m.nbytes + m.weights * item for block in blocks for m in block.matrices)

    def over_budget(self, vram: int) -> OverBudget:
        """The error that says in one sentence what is needed, what was given, and what would fit."""
        floors = self.floors()
        phase, floor = max(floors.items(), key=lambda item: item[1])
        fits = []
        if smaller := self._largest_image(vram):
            fits.append("an image of {} x {} px".format(*smaller))
        if phase != "decode" and (most := self._largest_block(vram, floors["decode"])):
            here = in_bytes(max(self.net.block_bytes, default=0))
            fits.append(f"a quantisation whose blocks have at most {in_bytes(most)} (here: {here})")
        hint = (
            f"what would fit is {' or '.join(fits)}" if fits else "give as much, no smaller image would fit"
        )
        return OverBudget(
            f"plan: {in_bytes(vram)} of GPU memory are given and {self.width} x {self.height} px need at "
            f"least {in_bytes(floor)} ({phase}, all blocks streamed, VAE in tiles); {hint}"
        )

    def _largest_image(self, vram: int) -> tuple[int, int] | None:
        """The largest image of this shape, or near it, whose floor is within the budget."""
        unit, long = self.multiple, max(self.width, self.height)

        def scaled(count: int) -> tuple[int, int]:
            scale = count * unit / long
            width, height = (max(1, round(side * scale / unit)) * unit for side in (self.width, self.height))
            return width, height

        def floor(width: int, height: int) -> int:
            rest = (self.rates, self.guidance, self.steps)
            return Job(self.sizes, width, height, self.images, self.caption, *rest).floor()

        low, high = 0, long // unit - 1  # low fits, or nothing does
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if floor(*scaled(middle)) <= vram else (low, middle - 1)
        return scaled(low) if low else None

    def _largest_block(self, vram: int, decode_floor: int) -> int:
        """Bytes of a block with which the image would fit; 0 where smaller blocks do not help."""
        most = (vram - max(self.encode_need, self.denoise_need)) // 2 - residency.GRAIN
        weights = max((sum(m.weights for m in block.matrices) for block in self.net.blocks), default=0)
        return most if decode_floor <= vram and most >= weights * FINEST else 0


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
    """Plan a run; `Job` and `plan_job` describe the arguments.

    Raises:
        BadArgument: A size or number is out of range.
        OverBudget: vram or ram does not hold the least that this image needs; the message says what would
            fit.
    """
    job = Job(sizes, width, height, images, caption_tokens, rates, guidance, steps)
    return plan_job(job, vram, ram)


def plan_job(job: Job, vram: int | None = None, ram: int | None = None) -> Plan:
    """Plan a run.

    Args:
        job: The run.
        vram: Bytes for our allocations; None for a plan with everything resident.
        ram: Bytes of host memory; None for enough.

    Raises:
        OverBudget: vram or ram does not hold the least; the message says what would fit.
    """
    floor, link = job.floor(), job.rates.link
    if vram is not None and vram < floor:
        raise job.over_budget(vram)
    plan = _with_host(job, _all_resident(job, vram, floor) or _in_turn(job, vram, floor, link), ram)
    if plan.from_disk:
        plan = replace(plan, times=_in_turn(job, vram, floor, min(link, job.rates.disk)).times)
    moving = {i for i, block in enumerate(job.net.blocks) if block.nbytes}
    tile_px = (plan.tile or 0) * job.vae_config.spatial_factor
    found = reasons(plan, moving, job.net.always, job.decode_live(AT_ONCE), tile_px)
    return replace(plan, reasons=found)


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
    around, size = beside(job.sizes), f"{job.width} x {job.height} px"
    if ram < around + job.floor():
        raise OverBudget(
            f"ram: {in_bytes(ram)} of host memory are given and {size} need at least "
            f"{in_bytes(job.floor() + around)}; give more or make a smaller image"
        )
    plan = plan_job(job, ram - around)
    if plan.maps_on_host:
        raise OverBudget(
            f"ram: {in_bytes(ram)} of host memory do not hold the decoding of {size}, not even in tiles; "
            "give more or make a smaller image"
        )
    return plan


def _all_resident(job: Job, vram: int | None, floor: int) -> Plan | None:
    """All weights stay through all phases; None if that does not fit."""
    live = {"encode": job.encode_live, "denoise": job.denoise_live, "decode": job.decode_live(AT_ONCE)}
    weights = job.sizes.nbytes
    most = weights + job.around + max(live.values())
    if vram is not None and most > vram:
        return None
    planes = job.planes()
    if vram is not None:
        planes = max(0, min(planes, vram - most - PLANES_MARGIN))
    parts = (job.encoder, job.net, job.vae)
    phases = tuple(
        Phase(name, part.nbytes, weights - part.nbytes, 0, live[name], job.scratch, planes, job.workspace)
        for name, part in zip(PHASES, parts, strict=True)
    )
    components = tuple(
        Component(part.name, part.nbytes, 0, 0, 0, 0, len(part.blocks), tuple(range(len(part.blocks))), True)
        for part in parts
    )
    step = job.step_seconds()
    times = Times(job.encode_seconds(), 0.0, step, 0.0, 0.0, step, step, job.decode_seconds(AT_ONCE))
    return _plan(job, vram, floor, components, phases, AT_ONCE, times)


def _in_turn(job: Job, vram: int | None, floor: int, link: float) -> Plan:
    """Each network in its own phase: those that run once pass through, the steps keep what fits."""
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
    rest = (job.scratch, 0, job.workspace)
    before = Phase("encode", job.encoder.always, 0, encoder.nbytes, job.encode_live, *rest)
    during = Phase("denoise", resident, 0, slots, live, *rest)
    after = Phase("decode", job.vae.always, 0, 0, job.decode_live(way), *rest)
    kept = max(before.peak, after.peak) + resident + slots <= room
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


def _with_host(job: Job, plan: Plan, ram: int | None) -> Plan:
    """The plan with its host memory; steps read from disk where that does not hold what they stream."""
    ring, out = RING, collected_bytes(job.vae_config, job.rows, job.cols, job.images)
    if plan.maps_on_host:
        out += decode_bytes(job.vae_config, job.rows, job.cols, plan.tile)
    table = 0 if plan.resident else plan.component("text_encoder").host
    fixed = {"Python and torch": RUNTIME, "the table of tokens": table, "the images": out}
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
        components, phases, *way, floor, 0, 0, False, job.rates, times,
    )  # fmt: skip
