"""What a pipeline tells of its adapters: to the user, and to the settings of an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zimage_core.errors import printable


@dataclass(frozen=True)
class LoadedLora:
    """An adapter of a pipeline.

    Args:
        name: Its name.
        weight: Its weight; None while it is not active.
        fused: Whether it is merged into the weights.
        title: What its file was identified as.
        kinds: Kinds of its changes.
        ranks: Smallest and largest rank of its low-rank parts; (0, 0) if it has none.
        layers: Layers that it changes, by network.
        tensors: Number of tensors that are used.
        unmatched: Names of tensors that match nothing.
        nbytes: Bytes that it holds on the host.
        file: Name, size and hash of its file; empty if it was given as tensors.
    """

    name: str
    weight: float | None
    fused: bool
    title: str
    kinds: tuple[str, ...]
    ranks: tuple[int, int]
    layers: Mapping[str, int]
    tensors: int
    unmatched: tuple[str, ...]
    nbytes: int
    file: Mapping[str, Any]


def settings_of_adapters(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Names, weights and hashes of adapters that have an effect, merged ones too, for an image's settings.

    Args:
        parts: The networks of a pipeline by name.
    """
    found: dict[tuple[str, float], dict[str, Any]] = {}
    for network in parts.values():
        applied = getattr(network, "adapted", None)
        if applied is None:
            continue
        state, used = applied.state, list(applied.merged)
        if state.enabled:
            used += [(state.adapters[name].facts, weight) for name, weight in state.weights.items()]
        for facts, weight in used:
            if weight:
                hashes = {key: facts.file[key] for key in ("sha256", "fingerprint") if key in facts.file}
                shown = {"name": printable(facts.name), "weight": weight, **hashes}
                found[facts.name, weight] = shown
    return list(found.values())
