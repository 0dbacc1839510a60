"""A plan: what lies where in each phase of a run, how much that is, how long it should take, and why."""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass
from typing import Any

from zimage_core.files.units import in_bytes, in_seconds
from zimage_core.memory.rates import Rates

PHASES = ("encode", "denoise", "decode")


@dataclass(frozen=True)
class Component:
    """Where the bytes of one network lie.

    resident + streamed + host is all of it, each byte once, but for blocks that are kept as int8 rows.

    Args:
        name: "text_encoder", "transformer" or "vae".
        resident: Bytes on the device as long as the network runs.
        streamed: Bytes that pass through slots; of the VAE, what is loaded for its phase.
        host: Bytes that stay in host memory.
        slots: How many slots on the device.
        slot_bytes: Bytes of one slot.
        blocks: How many blocks the network has.
        resident_blocks: Indices in the network's `blocks` of those that stay.
        kept: Whether its resident bytes also stay through the other phases.
        once: Streamed bytes that come once for each caption and not in every step: a transformer's context
            refiner.
        int8_rows: Bytes on the device of the blocks that are kept as int8 rows; they are in none of the
            others.
        int8_blocks: Indices of these blocks, some of the resident ones.
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
    int8_rows: int = 0
    int8_blocks: tuple[int, ...] = ()

    @property
    def each_step(self) -> int:
        """Streamed bytes that come again in every step."""
        return self.streamed - self.once


@dataclass(frozen=True)
class Phase:
    """Bytes on the device at the phase's peak.

    Args:
        name: One of PHASES.
        weights: Resident weights of this phase's network.
        others: Weights of the other networks that are kept.
        slots: For weights that pass through.
        activations: Tensors of the computation, latents and images; before the first step the context
            refiner where it does not stay.
        scratch: Dense weights, one matrix at a time.
        planes: Copies of weights in the layout of the fused kernel; on a CPU, forms that a language model
            multiplies one token by, and what making them takes.
        workspace: What libraries take.
        gaps: What torch's allocator leaves unused between temporary tensors; none on a CPU.
        small: What it takes for small tensors; none on a CPU.
    """

    name: str
    weights: int
    others: int
    slots: int
    activations: int
    scratch: int
    planes: int
    workspace: int
    gaps: int
    small: int

    @property
    def peak(self) -> int:
        """All of it."""
        _, *amounts = astuple(self)
        return sum(amounts)


@dataclass(frozen=True)
class Times:
    """Expected seconds, from rates; nothing was run.

    Args:
        encode: All captions, transfer included.
        encode_transfer: What the encoder's bytes need on the link, a part of `encode`.
        compute: One step, all images and sides.
        transfer: The bytes streamed in one step.
        fill: The first block of a step, which nothing hides; as long as the largest that is streamed.
        step: max(compute, transfer) + fill.
        first_step: A step with the captions' way through the context refiner, where the blocks that stay
            are still to be loaded; where everything is resident it was loaded before the run.
        decode: All images, loading included.
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


@dataclass(frozen=True)
class Plan:
    """What `planner.make_plan` answers.

    Args:
        width: Pixels of an image.
        height: Pixels of an image.
        images: Images of the run.
        caption_tokens: Tokens of each caption.
        guidance: Whether each step runs a negative side too.
        steps: Steps of the run.
        dtype: Dtype of the computation.
        vram: Budget of the device in bytes; None for no limit.
        ram: Budget of the host in bytes; None for no limit.
        components: In the order of PHASES.
        phases: In the order of PHASES.
        tile: Latents a side of the tiles in which the VAE decodes; None for the image at once.
        maps_on_host: Whether the maps between its layers are kept in host memory.
        floor: Smallest budget that this image has a plan for.
        ring: Bytes of pinned host memory that weights pass through.
        ram_need: Bytes of host memory beside the files' pages.
        from_disk: Whether streamed bytes are read from disk in every step, for want of host memory.
        rates: What the times were computed from.
        times: Expected seconds.
        reasons: Why it is so, in sentences.
        compute: In which numbers the blocks multiply: "exact", "bfloat16" or "int8".
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
    compute: str = "exact"

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
        """Expected seconds of the whole run."""
        later = (self.steps - 1) * self.times.step
        return self.times.encode + self.times.first_step + later + self.times.decode

    def component(self, name: str) -> Component:
        """A network by its name."""
        return next(component for component in self.components if component.name == name)

    def phase(self, name: str) -> Phase:
        """A phase by its name."""
        return next(phase for phase in self.phases if phase.name == name)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        data = asdict(self)
        for shown, phase in zip(data["phases"], self.phases, strict=True):
            shown["peak"] = phase.peak
        data["times"]["hidden"] = self.times.hidden
        return {**data, "peak": self.peak, "resident": self.resident, "seconds": self.seconds}


def reasons(plan: Plan, moving: set[int], always: int, decode_at_once: int, tile_px: int) -> tuple[str, ...]:
    """Why each network lies where it does, and what that costs.

    Args:
        plan: The plan, without reasons yet.
        moving: Indices of the transformer's blocks that have bytes to move.
        always: Bytes of the transformer outside of its blocks.
        decode_at_once: Bytes of activations if the VAE decodes without tiles.
        tile_px: Pixels a side of the VAE's tiles.
    """
    if plan.resident:
        weights = plan.phases[0].weights + plan.phases[0].others
        limit = "without a limit" if plan.vram is None else f"in {in_bytes(plan.vram)}"
        found = [
            f"everything stays on the device, {in_bytes(weights)} of weights {limit}: nothing is streamed"
        ]
        if planes := plan.phases[0].planes:
            found.append(f"{in_bytes(planes)} more are used for weights in the fused kernel's layout")
        return (*found, *_int8(plan, moving))
    text, times = plan.component("text_encoder"), plan.times
    found = [
        f"the text encoder is streamed, it runs once: {in_bytes(text.streamed)} pass in "
        f"{in_seconds(times.encode)}; its table of tokens, {in_bytes(text.host)}, stays in host memory",
        _transformer(plan, moving, always),
    ]
    whole = in_bytes(decode_at_once)
    if plan.tile is None:
        found.append(f"the VAE is loaded for its phase and decodes at once ({whole})")
    else:
        maps = " with its maps in host memory" if plan.maps_on_host else ""
        taken = in_bytes(plan.phase("decode").activations)
        found.append(
            f"the VAE decodes in tiles of {tile_px} px{maps}, {taken}: at once it would take {whole}"
        )
    if plan.from_disk and plan.ram is not None:
        found.append(
            f"{in_bytes(plan.ram)} of host memory hold no copy of what is streamed: steps read it from disk "
            f"at {in_bytes(min(plan.rates.disk, plan.rates.link))}/s"
        )
    return (*found, *_int8(plan, moving))


def _int8(plan: Plan, moving: set[int]) -> list[str]:
    """What is kept as int8 rows, where the blocks multiply int8."""
    if plan.compute != "int8":
        return []
    part = plan.component("transformer")
    kept = len(moving & set(part.int8_blocks))
    if not kept:
        return ["no int8 rows are kept: they are made from the packed weights in every step"]
    rest = "" if kept == len(moving) else "; the others are made from packed weights in every step"
    rows = in_bytes(part.int8_rows)
    return [f"int8 rows of {kept} of {len(moving)} blocks are kept ({rows}) in place of packed weights{rest}"]


def _transformer(plan: Plan, moving: set[int], always: int) -> str:
    part, times = plan.component("transformer"), plan.times
    if not part.slots:
        return f"the transformer stays while it runs: all {part.blocks} blocks, {in_bytes(part.resident)}"
    staying = len(moving & set(part.resident_blocks))
    sides = plan.images * (2 if plan.guidance else 1)
    pace = (
        f"hidden behind {in_seconds(times.compute)} of compute"
        if times.hidden
        else f"more than the {in_seconds(times.compute)} of compute, so steps wait for the link"
    )
    kept = f"none of {len(moving)} blocks stays"
    if staying:
        kept = f"{staying} of {len(moving)} blocks stay, spread evenly"
    return (
        f"{kept}, beside {in_bytes(always)} that always do; the others pass through {part.slots} slots of "
        f"{in_bytes(part.slot_bytes)}: {in_bytes(sides * part.each_step)} a step take "
        f"{in_seconds(times.transfer)}, {pace}; the context refiner comes for each caption, "
        f"{in_bytes(part.once)}"
    )
