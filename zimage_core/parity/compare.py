"""`compare_with`: a checkpoint compared with the program that most people use, part by part."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

import zimage_core
from zimage_core.config import COMPONENTS
from zimage_core.cpu.capability import features
from zimage_core.errors import BadArgument, OverBudget, Unsupported, printable
from zimage_core.files.units import in_bytes
from zimage_core.memory.page_cache import available
from zimage_core.parity.blocks import compare_network
from zimage_core.parity.latents import compare_latents
from zimage_core.parity.lending import Lender
from zimage_core.parity.peers import Pair, library, pair_of, quiet
from zimage_core.parity.report import Component, ParityReport
from zimage_core.run.loading import class_of, stated_scheduler
from zimage_core.run.locate import locate
from zimage_core.sampling.schedule import FlowMatchEulerScheduler
from zimage_core.weights.card import require
from zimage_core.weights.components import Absent, open_component, open_parts
from zimage_core.weights.facts import facts
from zimage_core.weights.folder import component_folder
from zimage_core.weights.load import load_network
from zimage_core.weights.opened import Opened

PEERS = ("diffusers",)
PARTS = (*COMPONENTS, "latents")
MAX_STEPS = 50
LIBRARIES = 1 << 30
"""Bytes of torch and of the peers beside all weights."""


def compare_with(
    checkpoint: str | PathLike[str],
    against: str = "diffusers",
    *,
    parts: Sequence[str] | None = None,
    float64: bool = False,
    steps: int = 2,
    on_part: Callable[[str], object] | None = None,
) -> ParityReport:
    """Run a checkpoint in this library and in a peer on the same inputs, and compare every block.

    The peer is diffusers for the transformer, the VAE and the latents of a run, and transformers for the text
    encoder. Both compute in float32 on the CPU. Each block gets the peer's input, so its error is its own;
    the error allowed is 16 times what float32 moves the peer itself, its distance from its own float64
    result.
    Packed weights are decoded by the reference for the peer, a matrix at a time, so that a network of 6
    billion weights needs little more memory than its file. No other thread may compute meanwhile, since
    torch's float32 stands for float64 for a while.

    Args:
        checkpoint: Whatever the loaders take: "default" for the embedded model, a diffusers folder, a folder
            of loose files, or one GGUF or safetensors file of a transformer, text encoder or VAE; a
            repository "org/repo[:Q4_K_M]".
        against: The peer: "diffusers".
        parts: Some of "transformer", "text_encoder", "vae" and "latents". Default: all that there are.
        float64: Compare in float64 as well, where a difference is one of formulas: at most 1e-10.
        steps: Steps of the run whose latents are compared; 0 leaves it out.
        on_part: Called with the name of each part and the memory that it needs, before it starts.

    Raises:
        BadArgument: An argument is unknown or out of range.
        BadFile, WrongModel, BadWeights: The checkpoint cannot be used.
        Unsupported: The peer is not installed, is too old or cannot run such a network; or the checkpoint is
            of a kind that has no peer, such as a ControlNet.
        OverBudget: Free memory is too small; nothing was computed.
    """
    wanted = _checked(against, parts, steps)
    report = on_part or (lambda _: None)
    opened, left_out = _open(checkpoint, wanted, named=bool(parts))
    components: list[Component] = []
    try:
        pairs = {part: pair_of(part, each) for part, each in opened.items()}
        with quiet():
            for part, each in opened.items():
                components += _compared(part, each, pairs[part], wanted, float64, steps, report)
    finally:
        for each in opened.values():
            each.file.close()
    versions = {"zimage_core": zimage_core.__version__, "torch": torch.__version__}
    for name in dict.fromkeys(component.peer.split()[0] for component in components):
        versions[name] = library(name, "__version__").__version__
    return ParityReport(
        checkpoint=printable(str(checkpoint)),
        against=against,
        versions=versions | {"CPU": features()},
        components=tuple(components),
        left_out=left_out,
    )


def _checked(against: str, parts: Sequence[str] | None, steps: int) -> tuple[str, ...]:
    if against not in PEERS:
        raise BadArgument(f"against: got {printable(against, 40)}, wanted one of {', '.join(PEERS)}")
    for part in parts or ():
        if part not in PARTS:
            raise BadArgument(f"parts: got {printable(part, 40)}, wanted some of {', '.join(PARTS)}")
    if type(steps) is not int or not 0 <= steps <= MAX_STEPS:
        raise BadArgument(f"steps: got {printable(repr(steps), 40)}, wanted 0 to {MAX_STEPS}")
    if parts and "latents" in parts and not steps:
        raise BadArgument("steps: got 0, which leaves out the part latents; wanted at least 1")
    return tuple(parts) if parts else PARTS


def _open(
    checkpoint: str | PathLike[str], wanted: Sequence[str], named: bool
) -> tuple[dict[str, Opened], dict[str, str]]:
    """The components that a checkpoint has, and why others are not compared.

    What the caller named must be there. What is there must be sound and one: a broken file, or two files of
    one component, is an error and never a part that is left out.
    """
    path, tag = locate(checkpoint)
    networks = [p for p in COMPONENTS if p in wanted or (p == "transformer" and "latents" in wanted)]
    if not path.is_dir():
        return _in_file(path, networks, named), {}
    opened: dict[str, Opened] = {}
    left_out: dict[str, Absent] = {}
    for part in networks:
        try:
            opened |= open_parts(path, (part,), tag=tag)
        except Absent as error:
            if named or component_folder(path, part):
                raise
            left_out[part] = error
    if not opened:
        raise next(iter(left_out.values()))
    for part, each in opened.items():
        require(each.card, part, each.file.path)
    return opened, {part: error.fault for part, error in left_out.items()}


def _in_file(path: Path, networks: Sequence[str], named: bool) -> dict[str, Opened]:
    """The components in one file."""
    whole = open_component(path)
    kinds = (whole.card.kind, *whole.card.also)
    found = [part for part in networks if part in kinds]
    if not found or (named and len(found) < len(networks)):
        whole.file.close()
        wish = ", ".join(networks).replace("_", " ")
        raise Unsupported(f"{printable(str(path))} is {whole.card.title}; wanted a file that has {wish}")
    opened = {part: open_component(whole, part) for part in found}
    for part, each in opened.items():
        require(each.card, part, each.file.path)
    return opened


def _compared(
    part: str,
    opened: Opened,
    pair: Pair,
    wanted: Sequence[str],
    float64: bool,
    steps: int,
    report: Callable[[str], object],
) -> Iterator[Component]:
    """The comparison of one network, and of the latents if it is the transformer."""
    title = part.replace("_", " ")
    network: Any = load_network(class_of(part), opened, torch.float32)
    need = _need(network, pair, float64)
    free = available()
    if free is not None and need > free:
        raise OverBudget(
            f"comparing the {title} needs about {in_bytes(need)} of memory, {in_bytes(free)} are free; "
            "close other programs"
        )
    if part in wanted:
        report(f"{title}: needs about {in_bytes(need)} of memory beside the file")
        yield compare_network(part, pair, opened, network, float64)
    if part == "transformer" and "latents" in wanted and steps:
        report(f"latents: {steps} steps")
        yield compare_latents(pair, network, _scheduler(opened), steps, float64)


def _need(network: torch.nn.Module, pair: Pair, float64: bool) -> int:
    """Bytes that a comparison takes beside the mapped file.

    A matrix exists in float32 as the reference decodes it, once more as its parts are joined, and in float64;
    the values at all places are kept in float32 twice and in float64.
    """
    matrix = Lender(network).largest() * (4 + 4 + 8)
    values = len(pair.places) * pair.width * (4 * 3 + 8 * (2 if float64 else 1))
    dense = sum(p.numel() * 8 for p in network.parameters() if p.dtype == torch.float32)
    return LIBRARIES + matrix + values + dense


def _scheduler(opened: Opened) -> FlowMatchEulerScheduler:
    """The schedule that the checkpoint states, else that of Turbo."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what cannot be told, which the run of a pipeline says
        return stated_scheduler(facts(opened)) or FlowMatchEulerScheduler()
