"""A pipeline under a budget: each phase brings its network to the device and takes it away again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import nn

from zimage_core.errors import BadArgument, OverBudget, Unsupported
from zimage_core.files.atomic import write_atomically
from zimage_core.files.units import in_bytes
from zimage_core.memory import cache, timeline
from zimage_core.memory.attach import bring, forbid_planes, stream_model, take_back, unstream
from zimage_core.memory.budget import read_bytes
from zimage_core.memory.job import RUNTIME
from zimage_core.memory.plan import Component, Plan, make_plan
from zimage_core.memory.rates import Rates, known, measure
from zimage_core.memory.sizes import COMPONENTS, sizes_of
from zimage_core.memory.stream import Stream
from zimage_core.memory.traffic import Traffic
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.nn.linear import tensors_of
from zimage_core.weights.load import opened_file
from zimage_core.weights.source import WeightFile

NETWORK_OF = {"encode": "text_encoder", "denoise": "transformer", "decode": "vae"}
SPARE = 512 << 20
"""Bytes of free GPU memory that "auto" leaves: the driver, libraries and gaps between allocations."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a pipeline may take.

    Args:
        vram: GPU memory for its tensors: bytes, "6GiB", "auto" for what is free when a run begins, or "least"
            for the smallest that the picture allows.
        ram: Host memory of the process: bytes or "8GiB"; None for as much as it likes. On a CPU it is the
            limit that counts; weights beyond it are read from their files in every step.
    """

    vram: int | str | None = None
    ram: int | str | None = None

    def __post_init__(self) -> None:
        """BadArgument for what is no amount of bytes."""
        if self.vram is not None and self.vram not in ("auto", "least"):
            read_bytes("vram", self.vram)
        if self.ram is not None:
            read_bytes("ram", self.ram)


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
        return [timeline.summary(name, each) for name, each in self.traffic.items() if each.bytes_moved]

    def save_timeline(self, path: str | PathLike[str], overwrite: bool = False) -> None:
        """Write a page of HTML that shows when blocks were read, copied, waited for and computed.

        Raises:
            BadFile: The path exists, or cannot be written.
        """
        text = timeline.page(self.traffic, self.plan.reasons)
        write_atomically(path, text.encode(), overwrite)


class Arena:
    """The device memory that three networks share, one after the other.

    Networks are loaded on the CPU and go back there; between runs those stay that the plan keeps.

    Args:
        networks: By name: text_encoder, transformer, vae; each from a file.
        device: Where to compute.
        budget: Of all runs.

    Raises:
        BadArgument: vram for a CPU, or no budget at all.
        Unsupported: A network was built in memory; there is no file to plan or to stream from.
    """

    def __init__(self, networks: Mapping[str, nn.Module], device: torch.device, budget: MemoryPlan) -> None:
        files = {name: opened_file(networks[name]) for name in COMPONENTS}
        if missing := [name for name, file in files.items() if file is None]:
            raise Unsupported(f"a memory budget needs files: {' and '.join(missing)} came from none")
        if device.type == "cpu" and (budget.vram is not None or budget.ram is None):
            raise BadArgument("vram is memory of a GPU: on a CPU give ram alone, such as ram='4GiB'")
        if device.type != "cpu" and budget.vram is None:
            budget = replace(budget, vram="auto")
        self.device = device
        self.budget = budget
        self._networks = networks
        dtype = str(networks["transformer"].dtype).removeprefix("torch.")
        self._sizes = sizes_of({name: file for name, file in files.items() if file is not None}, dtype)
        self._plan: Plan | None = None
        self._there: dict[str, tuple[Any, ...]] = {}
        self._traffic: dict[str, Traffic] = {}
        self._tile = self._vae.tile
        self._planes = False
        self._measured: Rates | None = None

    @property
    def _vae(self) -> Autoencoder:
        vae = self._networks["vae"]
        if not isinstance(vae, Autoencoder):
            raise BadArgument(f"arena: the vae is {type(vae).__name__}, wanted Autoencoder")
        return vae

    def begin(self, width: int, height: int, images: int, tokens: int, guidance: bool, steps: int) -> Plan:
        """Plan a run and follow that plan from now on.

        Raises:
            OverBudget: The budget does not hold the least that this picture needs.
        """
        picture = (self._sizes, width, height, images, tokens)
        rest: dict[str, Any] = {"rates": self._rates(), "guidance": guidance, "steps": steps}
        without = make_plan(*picture, **rest)  # a limit
        vram, ram = self._amounts()
        if self.budget.vram == "least":
            vram = without.floor
        if self.device.type == "cpu" and vram is not None and vram < without.floor:
            raise OverBudget(
                f"ram={self.budget.ram} is too little for {width} x {height} pixels: at least "
                f"{in_bytes(without.floor + self._around())} of host memory are needed; give more or make a "
                "smaller picture"
            )
        plan = make_plan(*picture, vram=vram, ram=ram, **rest)
        if plan.maps_on_host and self.device.type == "cpu":
            raise OverBudget(
                f"ram={self.budget.ram} does not hold the decoding of {width} x {height} pixels, not even in "
                "tiles; give more or make a smaller picture"
            )
        self._plan = plan
        # all that would be made or none: what makes them does not know the budget
        self._planes = plan.phase("encode").planes == without.phase("encode").planes
        for name in list(self._there):
            if self._there[name] != self._key(plan.component(name)):
                self._take_away(name)
        self._vae.tile = self._tile if plan.tile is None else plan.tile
        self._traffic.clear()
        for stream in self._streams().values():
            stream.traffic(clear=True)
        return plan

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, the network of "encode", "denoise" or "decode" is ready to run."""
        if self._plan is None:  # a call outside a run, such as encode_prompt
            self.begin(16, 16, 1, 512, False, 1)
        component = self._the_plan().component(NETWORK_OF[name])
        self._bring(component)
        ahead = cache.ReadAhead(self._next_file(name))
        try:
            yield
        finally:
            ahead.end()
            if not component.kept:
                self._take_away(component.name)

    def _next_file(self, name: str) -> WeightFile | None:
        """Of the network behind a phase, None where it is there already."""
        after = {"encode": "transformer", "denoise": "vae"}.get(name)
        opened = None if after is None or after in self._there else opened_file(self._networks[after])
        return None if opened is None else opened.file

    def report(self) -> MemoryReport | None:
        """Of the run that ended; None before the first."""
        if self._plan is None:
            return None
        staying = {name: stream.traffic() for name, stream in self._streams().items()}
        return MemoryReport(self._plan, {**self._traffic, **staying})

    def close(self) -> None:
        """Everything back to the host."""
        for name in list(self._there):
            self._take_away(name)
        self._vae.tile = self._tile

    @property
    def keep(self) -> torch.device | None:
        """Where the VAE keeps maps of the whole picture; None for the device."""
        return torch.device("cpu") if self._plan is not None and self._plan.maps_on_host else None

    def _streams(self) -> dict[str, Stream]:
        """Of the networks that are on the device now."""
        networks = {name: self._networks[name] for name in self._there}
        found = {name: getattr(network, "stream", None) for name, network in networks.items()}
        return {name: stream for name, stream in found.items() if isinstance(stream, Stream)}

    def _key(self, component: Component) -> tuple[Any, ...]:
        """What has to be the same for a network to stay as it is."""
        return component.kept, component.resident_blocks, component.slots, component.once, self._planes

    def _the_plan(self) -> Plan:
        if self._plan is None:
            raise BadArgument("arena: no run was begun")
        return self._plan

    def _bring(self, component: Component) -> None:
        key = self._key(component)
        if self._there.get(component.name) == key:
            return
        network = self._networks[component.name]
        if not isinstance(network, (ZImageTransformer, TextEncoder)):
            opened = opened_file(network)
            bring(self._vae.decoder, self.device, None if opened is None else opened.file)
        else:
            stream_model(
                network, component.resident_blocks, self.device,
                slots=max(1, component.slots), ring=max(1, self._the_plan().ring),
                refiner_stays=component.once == 0, page_cache=self._page_cache(),
            )  # fmt: skip
        if not self._planes:
            forbid_planes(network)
        self._there[component.name] = key

    def _page_cache(self) -> int | None:
        """Bytes of host memory that are left for files."""
        plan, room = self._the_plan(), cache.available()
        if plan.ram is None:
            return room
        left = plan.ram - plan.ram_need
        return left if room is None else min(left, room)

    def _take_away(self, name: str) -> None:
        network = self._networks[name]
        self._there.pop(name, None)
        if not isinstance(network, (ZImageTransformer, TextEncoder)):
            take_back(self._vae.decoder)
            return
        stream = network.stream
        if isinstance(stream, Stream):
            self._traffic[name] = stream.traffic()
        unstream(network)

    def _amounts(self) -> tuple[int | None, int | None]:
        """vram and ram in bytes; on a CPU the host memory plays the device's part."""
        ram = None if self.budget.ram is None else read_bytes("ram", self.budget.ram)
        if self.device.type == "cpu":
            return max(1, (ram or 0) - self._around()), None
        if self.budget.vram == "least":
            return None, ram
        if self.budget.vram == "auto":
            free = torch.cuda.mem_get_info(self.device)[0]
            cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            held = sum(_bytes_on(self._networks[name], self.device) for name in self._there)
            held += sum(stream.device_bytes for stream in self._streams().values())
            return max(1, free + cached + held - SPARE), ram
        return read_bytes("vram", self.budget.vram), ram

    def _around(self) -> int:
        """Bytes of host memory on a CPU beside what the plan counts: Python, torch, tables of tokens."""
        sizes = self._sizes
        return RUNTIME + sum(part.host for part in (sizes.text_encoder, sizes.transformer, sizes.vae))

    def _rates(self) -> Rates:
        if self.device.type == "cpu":
            self._measured = self._measured or measure("cpu")
            return self._measured
        from zimage_core.quant.gpu import architecture

        return known(architecture(self.device))


def _bytes_on(network: nn.Module, device: torch.device) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(network) if tensor.device.type == device.type)
