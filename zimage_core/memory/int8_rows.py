"""int8 rows of a network's weights that are kept from step to step, so that no product makes them again.

Kept rows have the bits of those that a product makes for itself, so that keeping them changes no result.
Without a memory budget they are kept beside the weights, as many as free memory allows. Under a budget they
take the place of the packed weights of whole blocks, by a plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from zimage_core.config import ONCE
from zimage_core.memory import int8_plan, page_cache
from zimage_core.memory.device import Ring
from zimage_core.memory.edits import Moved, checksum
from zimage_core.memory.stream import Segment, aligned
from zimage_core.nn.linear import Linear, Weight
from zimage_core.quant import int8
from zimage_core.quant.dispatch import SCRATCH_BYTES
from zimage_core.quant.gpu import free_bytes
from zimage_core.quant.tensor import QuantTensor
from zimage_core.weights.load import opened_file

FLOAT32 = 4
MARGIN = 2 << 30
"""Bytes of memory that rows leave to other programs, to libraries and to what no formula counts."""


def int8_scratch(network: nn.Module) -> int:
    """Bytes of int8 rows that a product of a network makes for itself on a GPU, at most."""
    layers = (module for module in network.modules() if isinstance(module, Linear))
    made = (each for each in layers if each.arithmetic.mode == "int8" and not int8.is_int8(each.weight))
    return min(SCRATCH_BYTES, max((_numbers(layer) for layer in made), default=0))


def free_for_rows(networks: Iterable[nn.Module], device: torch.device, live: int) -> tuple[int, bool]:
    """Bytes that rows may take beside the weights, and whether the weights are pages of files.

    Args:
        networks: All networks of a pipeline, whose files should stay in the system's page cache.
        device: Where they are.
        live: Bytes of the activations of a run.
    """
    if device.type == "cuda":
        return free_bytes(device) - live - MARGIN, False
    files = [found.file for found in map(opened_file, networks) if found is not None]
    pages = sum(
        info.nbytes for file in files for name, info in file.tensors.items() if file.source_of(name).mapped
    )
    free = page_cache.available() if device.type == "cpu" else None
    # where nobody knows what is free, nothing is kept
    return (-(1 << 62) if free is None else free - pages - live - MARGIN), pages > 0


def rows_of(layer: Linear, weight: Weight) -> QuantTensor:
    """A weight of a layer as the int8 rows that the layer multiplies; those of a file stay as they are."""
    if int8.is_int8(weight):
        return weight
    with torch.no_grad(), torch.inference_mode(False):  # they outlive the caller's mode
        return int8.quantize_weight(weight, int8.rotation_of(weight, layer.arithmetic.rotated))


def choose_layers(
    layers: Sequence[tuple[str, Linear]], room: int, mapped: bool, some: bool = True
) -> list[str]:
    """Names of the layers whose rows are kept.

    First come the layers that are rotated, whose rows cost most to make, and large ones before small ones; of
    those of one kind that do not all fit, as many as do, spread evenly.

    Args:
        layers: Name and layer, in the order in which they run.
        room: Bytes of memory for rows beside all weights.
        mapped: Whether the weights are pages of a file, which the rows then make superfluous.
        some: False where it must be all or none.
    """
    names = [name for name, _ in layers]
    costs = [_nbytes(layer) - (layer.weight.nbytes if mapped else 0) for _, layer in layers]
    if not some:
        return [names[place] for place in int8_plan.choose(costs, room, some=False)]
    found: list[str] = []
    kinds: dict[tuple[bool, int, str], list[int]] = {}
    for i, (name, layer) in enumerate(layers):
        kind = (not layer.arithmetic.rotated, -_nbytes(layer), name.split(".", 2)[-1])
        kinds.setdefault(kind, []).append(i)
    for _, places in sorted(kinds.items()):
        chosen = int8_plan.choose([costs[i] for i in places], room)
        room -= sum(costs[places[place]] for place in chosen)
        found += [names[places[place]] for place in chosen]
    return found


class KeptRows:
    """Rows that are kept beside the weights of one network; layers read them only inside `bound`."""

    def __init__(self) -> None:
        self._chosen: set[Linear] = set()
        # layer -> its weight, the rows of it, and what shows whether the weight was written to
        self._rows: dict[Linear, tuple[Weight, QuantTensor, object]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return sum(rows.nbytes + FLOAT32 * len(rows.packed) for _, rows, _ in self._rows.values())

    def drop(self) -> None:
        """Let the rows go; the next run makes them anew."""
        self._chosen = set()
        self._rows.clear()

    @contextmanager
    def bound(self, network: nn.Module, room: int, mapped: bool) -> Iterator[None]:
        """Inside, layers of a network that multiply int8 read their rows, which are made if need be.

        Args:
            network: With its weights on one device.
            room: Bytes of memory for rows; it counts where none are kept yet.
            mapped: Whether the weights are pages of a file.
        """
        layers = [
            (name, module)
            for name, module in network.named_modules()
            if isinstance(module, Linear)
            and module.arithmetic.mode == "int8"
            and name.partition(".")[0] not in ONCE
            and not int8.is_int8(module.weight)
        ]
        if not self._chosen or not self._chosen <= {layer for _, layer in layers}:
            self.drop()
            some = all(layer.device.type == "cpu" for _, layer in layers)
            names = set(choose_layers(layers, room, mapped, some))
            self._chosen = {layer for name, layer in layers if name in names}
        try:
            bound = [(layer, layer.weight, self._of(layer)) for _, layer in layers if layer in self._chosen]
        except torch.OutOfMemoryError:  # another program took it: products make their own rows
            self.drop()
            bound = []
        try:
            for layer, _, rows in bound:
                layer.set_weight(rows)
            yield
        finally:
            for layer, home, rows in bound:
                if layer.weight is rows:  # else it was replaced meanwhile
                    layer.set_weight(home)

    def _of(self, layer: Linear) -> QuantTensor:
        """The rows of a layer, made where its weight is new or was written to."""
        weight = layer.weight
        found = self._rows.get(layer)
        now = _content(weight)
        if found is not None and found[0] is weight and found[2] == now:
            return found[1]
        rows = rows_of(layer, weight)
        self._rows[layer] = weight, rows, now
        return rows


def _content(weight: Weight) -> object:
    """A value that changes when a weight is written to: packed bytes by torch, a Parameter by anything."""
    if isinstance(weight, nn.Parameter):
        return int(checksum(weight))
    tensors = (weight.packed, *(() if weight.scale is None else (weight.scale,)))
    return tuple(None if each.is_inference() else each._version for each in tensors)


def load_rows(segments: Sequence[Segment], ring: Ring, moved: Moved) -> None:
    """Put int8 rows of weights on the device of a ring, in place of the weights.

    On a GPU all rows lie in one piece of memory; the weights come there one at a time.

    Args:
        segments: The weights.
        ring: What their bytes go to the device through.
        moved: Where it is noted, so that its `restore` puts the weights back.

    Raises:
        BadFile: A file was changed or cannot be read.
    """
    if not segments:
        return
    device, start = ring.device, 0
    sizes = [
        (aligned(_numbers(each.linear)), aligned(FLOAT32 * each.linear.out_features)) for each in segments
    ]
    whole = device.memory(sum(map(sum, sizes))) if device.staged else None
    for segment, (numbers, scales) in zip(segments, sizes, strict=True):
        piece = device.memory(segment.home.nbytes)
        device.order("copy", device.record("compute"))  # memory that was freed may still be read there
        try:
            ring.fill(piece, segment.stored.read)
            device.order("compute", device.record("copy"))
            rows = rows_of(segment.linear, replace(segment, start=0).view(piece))
        finally:
            device.settle()
        if whole is not None:
            rows = _moved_to(rows, whole[start : start + numbers], whole[start + numbers :][:scales])
            start += numbers + scales
        moved.places.append((segment.linear, "weight", segment.home, rows))
        segment.linear.set_weight(rows)
    moved.device_bytes += 0 if whole is None else whole.nbytes


def _moved_to(rows: QuantTensor, numbers: Tensor, scales: Tensor) -> QuantTensor:
    """The same rows in other memory, uint8 [n] each."""
    packed = numbers[: rows.nbytes].view(rows.packed.shape).copy_(rows.packed)
    scale = rows.scale
    if scale is not None:
        scale = scales[: scale.nbytes].view(torch.float32).view(scale.shape).copy_(scale)
    return rows.like(packed, scale=scale)


def _numbers(layer: Linear) -> int:
    return layer.in_features * layer.out_features


def _nbytes(layer: Linear) -> int:
    """Bytes of the rows of a layer."""
    return _numbers(layer) + FLOAT32 * layer.out_features
