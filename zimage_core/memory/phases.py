"""A pipeline under a memory budget: each phase loads its network on the device and takes it away again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import nn

from zimage_core.config import COMPONENTS
from zimage_core.errors import BadArgument, Unsupported
from zimage_core.files.atomic import write_atomically
from zimage_core.files.units import parse_bytes
from zimage_core.memory import beside, page_cache, traffic
from zimage_core.memory.attach import (
    forbid_planes,
    load,
    maps_of,
    packed_products,
    stream_model,
    unstream,
)
from zimage_core.memory.device import Ring, device_for
from zimage_core.memory.edits import Moved
from zimage_core.memory.int8_rows import int8_scratch
from zimage_core.memory.job import Job
from zimage_core.memory.nets import Beside
from zimage_core.memory.plan import Component, Phase, Plan
from zimage_core.memory.planner import plan_job, plan_on_cpu
from zimage_core.memory.rates import Rates, known, measure
from zimage_core.memory.references import References
from zimage_core.memory.segments import Segments
from zimage_core.memory.sizes import sizes_of
from zimage_core.memory.stream import Stream
from zimage_core.memory.tower import Tower
from zimage_core.memory.traffic import Traffic
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.quant.dispatch import kernels_for
from zimage_core.quant.gpu import make_planes, release_scratch, reserve_scratch, scratch_bytes
from zimage_core.weights.opened import Opened

NETWORKS = {"encode": "text_encoder", "denoise": "transformer", "decode": "vae"}
"""Phase -> the network that runs in it."""
NEXT = {"encode": "transformer", "denoise": "vae"}
"""Phase -> the network that runs after it."""
SPARE = 512 << 20
"""Bytes of free GPU memory that "auto" leaves: the driver, libraries and gaps between allocations."""
OUTSIDE_A_RUN: dict[str, Any] = {
    "width": 16, "height": 16, "images": 1, "caption_tokens": 512, "guidance": False, "steps": 1,
}  # fmt: skip
"""What is planned for a call such as `encode_prompt`: a long caption, and next to no image."""


@dataclass(frozen=True)
class MemoryBudget:
    """What a pipeline may take.

    Args:
        vram: GPU memory beside the driver's own: bytes, "6GiB", "auto" for what is free when a run begins, or
            "least" for the smallest that the image allows.
        ram: Host memory of the process: bytes or "8GiB"; None for as much as it likes. On a CPU it is the
            limit that counts; weights beyond it are read from their files in every step.
    """

    vram: int | str | None = None
    ram: int | str | None = None

    def __post_init__(self) -> None:
        """BadArgument for what is no amount of bytes."""
        if self.vram is not None and self.vram not in ("auto", "least"):
            parse_bytes("vram", self.vram)
        if self.ram is not None:
            parse_bytes("ram", self.ram)


@dataclass(frozen=True)
class MemoryReport:
    """What a run under a budget was to do, and did.

    Args:
        plan: Made for its sizes.
        traffic: Network -> what was streamed of it.
    """

    plan: Plan
    traffic: Mapping[str, Traffic]

    def summary(self) -> list[str]:
        """A line for each network that was streamed."""
        return [traffic.summary(name, each) for name, each in self.traffic.items() if each.bytes_moved]

    def save_timeline(self, path: str | PathLike[str], overwrite: bool = False) -> None:
        """Write a page of HTML that shows when blocks were read, copied, waited for and computed.

        Raises:
            BadFile: The path exists, or cannot be written.
        """
        write_atomically(path, traffic.page(self.traffic, self.plan.reasons).encode(), overwrite)


class PhaseManager:
    """The device memory that three networks share, one after the other.

    Networks are loaded on the CPU and go back there; between runs those stay that the plan keeps.

    Args:
        networks: text_encoder, transformer and vae by name, on the CPU.
        opened: The files that they came from, by the same names.
        device: Where to compute.
        budget: What all runs may take.

    Raises:
        BadArgument: vram for a CPU, or no budget at all.
        Unsupported: A network was built in memory; there is no file to plan or to stream from.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        opened: Mapping[str, Opened],
        device: torch.device,
        budget: MemoryBudget,
    ) -> None:
        if missing := [name for name in COMPONENTS if name not in opened]:
            raise Unsupported(f"a memory budget needs files: {' and '.join(missing)} came from none")
        if device.type == "cpu" and (budget.vram is not None or budget.ram is None):
            raise BadArgument("vram: it is memory of a GPU; on a CPU give ram= alone, such as ram='4GiB'")
        if device.type != "cpu" and budget.vram is None:
            budget = replace(budget, vram="auto")
        vae = networks["vae"]
        if not isinstance(vae, Autoencoder):
            raise BadArgument(f"memory budget: the vae is {type(vae).__name__}, wanted Autoencoder")
        self.device, self.budget = torch.empty(0, device=device).device, budget  # with the number of a GPU
        self._networks, self._opened, self._vae = networks, opened, vae
        self._sizes = sizes_of(opened, str(networks["transformer"].dtype).removeprefix("torch."))
        self._plan: Plan | None = None
        self._job: Job | None = None
        self._planes: dict[str, int] = {}  # network -> bytes of its planes
        # network -> the part of the plan that it was loaded by; the rest of a plan does not move it
        self._loaded: dict[str, tuple[Component, int]] = {}
        self._held: dict[str, int] = {}  # network -> bytes that the driver gave for what of it is loaded
        self._modules: dict[str, list[int]] = {}  # network -> its modules when it was loaded
        self._decoder = Moved()
        self._traffic: dict[str, Traffic] = {}
        self._beside: Beside = Beside()
        self._controlnets: tuple[nn.Module, ...] = ()
        self._tower: Tower | None = None
        self._taken, self._stream_beside = 0, False
        self._tile = self._own_tile = vae.tile  # the caller's, and what was set last
        self._rates: Rates | None = None
        self._segments = Segments(self.device)

    def begin(
        self, *, width: int, height: int, images: int, caption_tokens: int, guidance: bool, steps: int,
        image: bool = False, controlnets: tuple[nn.Module, ...] = (), control_images: int = 0,
        references: References | None = None, beside_encoder: int = 0,
        revise: Callable[[Job, Plan], Plan] | None = None,
    ) -> Plan:  # fmt: skip
        """Plan a run and follow that plan from now on.

        Args:
            width: Pixels of an image.
            height: Pixels of an image.
            images: Images of the run.
            caption_tokens: Tokens of the longest caption.
            guidance: Whether there is a negative side.
            steps: Steps of the run.
            image: Whether it begins from an image, which the VAE encodes.
            controlnets: Networks that run beside the transformer, on the host.
            control_images: Images that they follow.
            references: Reference images, which the network "siglip" sees; None for a run without.
            beside_encoder: Bytes on the device beside the text encoder, as a language model takes them.
            revise: Changes the plan that was found, within the same budget.

        Raises:
            OverBudget: The budget does not hold the least that this image needs.
        """
        rates = self._rates = self._rates or self._machine()
        kernels = self.device.type == "cpu" or kernels_for(self.device)
        workspace = self._segments.take_workspace(self._dtype("transformer"))
        seen = (width, height, caption_tokens)
        if references is not None:
            seen = references.seen(self._sizes, width, height)
        sizes = beside.adapted(self._sizes, self._networks, *seen)
        encoder = sizes.text_encoder
        sizes = replace(sizes, text_encoder=replace(encoder, always=encoder.always + beside_encoder))
        job = Job(
            sizes,
            width, height, images, caption_tokens, rates, guidance, steps, kernels, workspace,
            self._compute("transformer"), torch.get_num_threads(), self._compute("text_encoder"), image,
            references,
        )  # fmt: skip
        tower = None
        if references is not None and references.sizes and "siglip" in self._networks:
            tower = beside.tower_of(self._networks["siglip"], references)
        ram = None if self.budget.ram is None else parse_bytes("ram", self.budget.ram)
        nets = Beside(tuple(map(beside.weighed, controlnets)), control_images)
        if self.device.type == "cpu":
            room = sys.maxsize if ram is None else ram  # a CPU's budget always has one
            found = nets.planned(job, lambda taken: plan_on_cpu(job, max(0, room - taken)))
        else:
            room = self._vram(job)
            if self.budget.vram == "least":
                room = max(room + nets.least(job), 0 if tower is None else tower.need(job, streamed=True))
            found = nets.planned(job, lambda taken: plan_job(job, max(0, room - taken), ram))
        plan, self._taken, self._stream_beside = found
        if tower is not None:
            plan = tower.shown(job, plan)
        plan = plan if revise is None else revise(job, plan)
        self._tower = tower
        self._plan, self._job, self._beside, self._controlnets = plan, job, nets, controlnets
        parts = {"text_encoder": job.encoder, "transformer": job.net}
        planned = plan.phase("encode").planes > 0  # all that products ask for, or none
        self._planes = {name: job.planes(part) if planned else 0 for name, part in parts.items()}
        for name, key in list(self._loaded.items()):
            same = key == (plan.component(name), self._planes.get(name, 0))
            if not same or self._holder(name).edited() or self._modules[name] != self._ids(name):
                self._evict(name)
        if self._vae.tile != self._own_tile:  # the caller set it since
            self._tile = self._vae.tile
        self._vae.tile = self._own_tile = self._tile if plan.tile is None else plan.tile
        self._traffic.clear()
        for stream in self._streams().values():
            stream.traffic(clear=True)
        return plan

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, the network of "encode", "denoise" or "decode" is ready to run.

        In "image" it is the VAE's encoder, in the memory that is planned for decoding, which takes more. In
        "vision" it is the vision tower; networks that stay leave the device if there is no room beside them.
        """
        if name in ("image", "vision"):
            with self._image_phase() if name == "image" else self._vision_phase():
                yield
            return
        plan = self._plan
        if plan is None:
            plan = self.begin(**OUTSIDE_A_RUN)
        component, needs = plan.component(NETWORKS[name]), plan.phase(name)
        after = NEXT.get(name, "")
        wanted = after in self._opened and after not in self._loaded
        others: AbstractContextManager[None] = nullcontext()
        room, live = plan.vram, 0
        if name == "denoise" and self._controlnets and self._job is not None:
            live = self._beside.live(self._job)
            room = None if room is None else room + self._taken
            nets = {f"controlnet {net.name}": net for net in self._controlnets}
            others = beside.on(nets, self.device, plan.ring, self._stream_beside, self._traffic)
        with self._segments.limit(room, sum(self._held.values())):
            try:
                self._load(component, plan)
                with others:
                    self._reserve(needs, live)
                    with page_cache.reading_ahead(self._opened[after].file if wanted else None):
                        yield
            finally:
                release_scratch(self.device)
                if not component.kept:
                    self._evict(component.name)
                elif component.name in self._loaded:
                    self._holder(component.name).seal()

    @contextmanager
    def _image_phase(self) -> Iterator[None]:
        plan = self._plan or self.begin(**OUTSIDE_A_RUN, image=True)
        encoder = None
        with self._segments.limit(plan.vram, sum(self._held.values())):
            try:
                ring = Ring(device_for(self.device), plan.ring)
                encoder = load(self._vae.encoder.modules(), ring, maps_of(self._opened["vae"].file))
                self._reserve(plan.phase("decode"))
                yield
            finally:
                release_scratch(self.device)
                if encoder is not None:
                    encoder.restore()

    @contextmanager
    def _vision_phase(self) -> Iterator[None]:
        plan, tower, network = self._plan, self._tower, self._networks["siglip"]
        if plan is None or self._job is None or tower is None:
            raise BadArgument("memory budget: the vision tower has no part in this run's plan")
        room = sys.maxsize if plan.vram is None else plan.vram
        parts = [component for component, _ in self._loaded.values()]
        held = sum(part.resident + part.int8_rows + part.slots * part.slot_bytes for part in parts)
        held += sum(planes for _, planes in self._loaded.values())
        if held + tower.need(self._job, streamed=True) > room:
            held = 0
            for name in list(self._loaded):
                self._evict(name)
        streamed = held + tower.need(self._job, streamed=False) > room
        with self._segments.limit(plan.vram, sum(self._held.values())):
            try:
                with beside.on({"siglip": network}, self.device, plan.ring, streamed, self._traffic):
                    yield
            finally:
                release_scratch(self.device)

    def report(self) -> MemoryReport | None:
        """What the run that ended did; None before the first."""
        if self._plan is None:
            return None
        staying = {name: stream.traffic() for name, stream in self._streams().items()}
        return MemoryReport(self._plan, {**self._traffic, **staying})

    def close(self) -> None:
        """Put everything back on the host."""
        for name in list(self._loaded):
            self._evict(name)
        if self._vae.tile == self._own_tile:
            self._vae.tile = self._tile

    def check_networks(self, networks: Mapping[str, nn.Module]) -> None:
        """Refuse a pipeline whose networks are not those of this budget any more.

        Raises:
            Unsupported: A network was replaced by another, or added.
        """
        for name in {**self._networks, **networks}:
            if networks.get(name) is not self._networks.get(name):
                raise Unsupported(
                    f"{name}: it was replaced or added after the memory budget was set; call limit_memory "
                    "again, with the same vram= and ram="
                )

    @property
    def keep(self) -> torch.device | None:
        """Where the VAE keeps maps of the whole image; None for the device."""
        return torch.device("cpu") if self._plan is not None and self._plan.maps_on_host else None

    def _holder(self, name: str) -> Stream | Moved:
        """What holds the weights of a network that is on the device, and sees whether they are edited."""
        stream = getattr(self._networks[name], "stream", None)
        return stream if isinstance(stream, Stream) else self._decoder

    def _reserve(self, needs: Phase, beside: int = 0) -> None:
        """Take the segment of a phase's temporary tensors, and in it the scratch of its products.

        Args:
            needs: The phase.
            beside: Bytes of further temporary tensors.
        """
        try:
            self._segments.reserve(needs.scratch + needs.activations + needs.gaps + beside)
        except torch.OutOfMemoryError:
            if needs.name != "decode":  # which goes on in smaller tiles by itself
                raise
        if self.device.type == "cuda" and kernels_for(self.device):
            network, dtype = self._networks[NETWORKS[needs.name]], self._dtype(NETWORKS[needs.name])
            # at once, because as it grew each smaller one would leave a gap
            sizes = [scratch_bytes(weight, dtype) for _, weight in packed_products(network)]
            reserve_scratch(self.device, max(*sizes, int8_scratch(network), 0))

    def _dtype(self, name: str) -> torch.dtype:
        network: Any = self._networks[name]
        return network.dtype  # type: ignore[no-any-return]

    def _compute(self, name: str) -> str:
        network: Any = self._networks[name]
        return network.compute  # type: ignore[no-any-return]

    def _ids(self, name: str) -> list[int]:
        """What tells whether its modules are those that were loaded, and its adapters the same."""
        adapted = getattr(self._networks[name], "adapted", None)
        adapters = 0 if adapted is None else adapted.version
        return [adapters, *(id(module) for module in self._networks[name].modules())]

    def _streams(self) -> dict[str, Stream]:
        """What feeds the networks that are on the device now."""
        found = {name: getattr(self._networks[name], "stream", None) for name in self._loaded}
        return {name: stream for name, stream in found.items() if isinstance(stream, Stream)}

    def _load(self, component: Component, plan: Plan) -> None:
        name = component.name
        key = (component, self._planes.get(name, 0))
        if self._loaded.get(name) == key:
            return
        network, file, before = self._networks[name], self._opened[name].file, self._segments.reserved
        if isinstance(network, (ZImageTransformer, TextEncoder)):
            rooms = (page_cache.available(), None if plan.ram is None else plan.ram - plan.ram_need)
            stream_model(
                network, file, component.resident_blocks, self.device, slots=max(1, component.slots),
                ring=plan.ring, refiner_stays=component.once == 0, int8_rows=component.int8_blocks,
                page_cache=min((room for room in rooms if room is not None), default=None),
            )  # fmt: skip
        else:
            ring = Ring(device_for(self.device), plan.ring)
            self._decoder = load(self._vae.decoder.modules(), ring, maps_of(file))
        self._loaded[name], self._modules[name] = key, self._ids(name)
        try:
            if (adapted := getattr(network, "adapted", None)) is not None:
                adapted.prepare(self.device)
            self._make_planes(name, network)
        except BaseException:
            self._evict(name)
            raise
        forbid_planes(network)
        if component.int8_blocks:
            self._segments.give_back()  # the weights that rows were made of
        self._held[name] = self._segments.reserved - before

    def _make_planes(self, name: str, network: nn.Module) -> None:
        """Make the planes that the plan counts, before the segment of temporary tensors is taken."""
        job, planes = self._job, self._planes.get(name, 0)
        if job is None or not planes:
            return
        part = job.encoder if name == "text_encoder" else job.net
        self._segments.reserve(planes)
        for place, weight in packed_products(network):
            make_planes(weight, job.tokens_of(part, place), self._dtype(name), free=planes)

    def _evict(self, name: str) -> None:
        """Take a network off the device."""
        network = self._networks[name]
        self._loaded.pop(name, None)
        self._held.pop(name, None)
        if (adapted := getattr(network, "adapted", None)) is not None:
            adapted.release()
        if not isinstance(network, (ZImageTransformer, TextEncoder)):
            self._decoder.restore()
            return
        try:
            if isinstance(network.stream, Stream):
                self._traffic[name] = network.stream.traffic()
        finally:  # even if the GPU cannot be asked any more
            unstream(network)

    def _vram(self, job: Job) -> int:
        """The limit of GPU memory in bytes."""
        if self.budget.vram == "least":
            return job.floor()
        if self.budget.vram == "auto":
            return max(1, self._segments.free() + sum(self._held.values()) - SPARE)
        return parse_bytes("vram", self.budget.vram)

    def _machine(self) -> Rates:
        if self.device.type == "cpu":
            return measure("cpu")
        from zimage_core.quant.gpu import architecture

        return known(architecture(self.device))
