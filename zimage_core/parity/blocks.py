"""A network of ours and the peer's of the same weights, compared block by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.errors import ZImageError, printable
from zimage_core.parity.lending import Lender, lend
from zimage_core.parity.peers import Call, Pair, names
from zimage_core.parity.precision import FLOAT32, NARROW, in_float64
from zimage_core.parity.report import Block, Component
from zimage_core.parity.watching import Forced, Place, Recorder, watched
from zimage_core.weights.load import unfilled
from zimage_core.weights.opened import Opened

LEAST = 4 * 2.0**-24
"""Least tolerance, relative to the largest number of a value: four roundings of it to float32."""
Values = Mapping[str, Tensor]


class PeerFailed(Exception):
    """The peer raised an error; the message has the block and the error."""


def compare_network(name: str, pair: Pair, opened: Opened, ours: nn.Module, float64: bool) -> Component:
    """Compare a loaded network with the peer's.

    Args:
        name: Name of the component.
        pair: How it is compared.
        opened: Its open file.
        ours: The network, in float32.
        float64: Whether ours is compared in float64 as well.
    """
    lender = Lender(ours)
    blocks: tuple[Block, ...] = ()
    problem = ""
    try:
        blocks = tuple(_compare(pair, lender, ours, float64))
    except PeerFailed as error:
        problem = str(error)
    types = Counter(tensor.format.name for tensor in opened.file.tensors.values())
    notes = ("compared without reference images",) if opened.card.variant == "omni" else ()
    return Component(
        name=name,
        peer=pair.peer,
        weights=", ".join(kind for kind, _ in types.most_common()),
        quantised=not all(tensor.format.is_float for tensor in opened.file.tensors.values()),
        inputs=pair.inputs,
        blocks=blocks,
        problem=problem,
        notes=notes,
    )


def _compare(pair: Pair, lender: Lender, ours: nn.Module, float64: bool) -> Iterator[Block]:
    """The blocks in the order of the peer's run; results come last."""
    seen, free = Recorder(), names(pair.places, "rotation")
    peer = peer_network(pair, lender, FLOAT32)
    theirs = _run_peer(peer, pair, seen)
    own, chain = Forced(theirs, free), Recorder()
    narrow = run(ours, pair.places, own, pair.call_ours, [])
    accumulated = run(ours, pair.places, chain, pair.call_ours, [])
    with in_float64():
        peer = peer_network(pair, lender, torch.float64)
        wide = _run_peer(peer, pair, Forced(theirs, free))
        ours_wide: Values | None = None
        if float64:
            copy = copy_in_float64(ours, lender)
            ours_wide = run(copy, pair.places, Forced(theirs, free), pair.call_ours, [])
    places = {place.name: place for place in pair.places}
    for name in theirs:
        cut = name in places and places[name].cut
        yield judged(name, theirs, wide, narrow, accumulated, ours_wide, cut)


def judged(
    name: str,
    theirs: Values,
    wide: Values,
    narrow: Values,
    accumulated: Values | None = None,
    ours_wide: Values | None = None,
    cut: bool = False,
) -> Block:
    """One value of both programs with its errors, each relative to the largest number of the peer's.

    Args:
        name: Its name.
        theirs: The peer's values in float32.
        wide: The peer's in float64 on the same inputs.
        narrow: Ours in float32 on the same inputs.
        accumulated: Ours in float32 on our own inputs.
        ours_wide: Ours in float64 on the same inputs.
        cut: Whether the peer's has more rows, of pad tokens.
    """
    scale = float(theirs[name].abs().max())
    by = scale or 1.0
    moved = _apart(wide[name], theirs[name], False) / by
    return Block(
        name=name,
        scale=scale,
        error=_apart(narrow[name], theirs[name], cut) / by,
        tolerance=max(NARROW * moved, LEAST),
        accumulated=None if accumulated is None else _apart(accumulated[name], theirs[name], cut) / by,
        wide=None if ours_wide is None else _apart(ours_wide[name], wide[name], cut) / by,
    )


def peer_network(pair: Pair, lender: Lender, dtype: torch.dtype) -> Any:
    """The peer's network with the weights lent to it.

    Raises:
        PeerFailed: It cannot be built.
    """
    with blamed(lambda: "as it was built"):
        network = unfilled(pair.build, dtype)
        pair.mend(network)
    lend(network, lender, dtype, pair.peer)
    return network


def _run_peer(network: Any, pair: Pair, see: Recorder) -> Values:
    entered: list[str] = ["at the start"]
    with blamed(lambda: f"at {entered[-1]}"):
        return run(network, pair.places, see, pair.call_peer, entered)


class blamed:
    """Turns an error inside into `PeerFailed`, with the place that is asked for then."""

    def __init__(self, place: Callable[[], str]) -> None:
        self._place = place

    def __enter__(self) -> None: ...

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, (ZImageError, MemoryError)):
            said = printable(f"{type(error).__name__}: {error}", 300)
            raise PeerFailed(f"{self._place()}: {said}") from error


@torch.no_grad()
def run(network: Any, places: tuple[Place, ...], see: Recorder, call: Call, entered: list[str]) -> Values:
    """The values at all places, and the results, of one run."""
    with watched(network, places, see, entered):
        results = call(network)
    found = {place.name: see.values[place.name] for place in places if place.name in see.values}
    return {**found, **{name: out.reshape(-1, out.shape[-1]) for name, out in results.items()}}


def copy_in_float64(network: Any, lender: Lender) -> Any:
    """A network of ours of the same weights in float64, which are dense; to be called in `in_float64`."""
    copy = unfilled(lambda: type(network)(network.config), torch.float64)
    lend(copy, lender, torch.float64, "zimage_core")
    return copy


def _apart(a: Tensor, b: Tensor, cut: bool) -> float:
    """Largest absolute difference; infinite where the shapes differ."""
    b = b[: len(a)] if cut else b
    if a.shape != b.shape:
        return float("inf")
    return float((a.double() - b.double()).abs().max())
