"""Put a network on a device, whole or all but its streamed blocks, and take it off again.

No mapped page is read from then on, so that a file that is cut meanwhile is an error and no crash: what stays
is read into memory, on the CPU as well.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zimage_core.errors import BadArgument
from zimage_core.memory.device import Device, Ring, device_for
from zimage_core.memory.edits import Moved, written
from zimage_core.memory.page_cache import to_drop
from zimage_core.memory.planner import RING
from zimage_core.memory.stream import SLOTS, Block, Segment, Stored, Stream, aligned
from zimage_core.models.block_source import RESIDENT, Resident
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.nn.linear import Embedding, Linear
from zimage_core.quant.tensor import QuantTensor
from zimage_core.weights.source import Source, WeightFile

OUTSIDE = "adaLN_modulation"
"""Child of a block that runs outside of the loop: adaptive norms are computed for all steps at once."""

Streamable = ZImageTransformer | TextEncoder
Mapped = tuple[Source, int]
"""A file, and the address of its map."""


def load(
    modules: Iterable[nn.Module], ring: Ring, maps: Sequence[Mapped], streamed: Collection[nn.Module] = ()
) -> Moved:
    """Put the tensors of modules on the device of a ring, and tables of token embeddings in host memory.

    Args:
        modules: The modules; those inside them are not looked at unless they are listed too.
        ring: What bytes go to the device through.
        maps: Files that the tensors may be views of.
        streamed: Layers whose weights stay where they are.

    Returns:
        What was moved; its `restore` takes it off the device again.

    Raises:
        BadFile: A file was changed or cannot be read.
    """
    moved, device, host = Moved(), ring.device, Ring(Device(), RING)
    device.order("copy", device.record("compute"))  # memory that was freed may still be read there
    try:
        for module in modules:
            where = host if isinstance(module, Embedding) else ring
            tensors: list[tuple[str, Tensor | QuantTensor]] = [
                *module.named_parameters(recurse=False), *module.named_buffers(recurse=False)
            ]  # fmt: skip
            if isinstance(weight := getattr(module, "weight", None), QuantTensor):
                tensors.append(("weight", weight))
            for name, tensor in tensors:
                if name == "weight" and module in streamed:
                    continue
                copy = _copy(tensor, where, maps)
                if copy is not None:
                    moved.places.append((module, name, tensor, copy))
                    setattr(module, name, copy)
        device.order("compute", device.record("copy"))
    except BaseException:
        moved.restore()
        raise
    return moved


def stream_model(
    model: Streamable,
    file: WeightFile | None,
    resident: Collection[int] = (),
    device: torch.device | str = "cpu",
    *,
    slots: int = SLOTS,
    ring: int = RING,
    refiner_stays: bool = True,
    page_cache: int | None = None,
    through: Device | None = None,
) -> Stream:
    """Put a model that was loaded on the CPU on a device, all but the blocks that are streamed to it.

    The table of token embeddings goes to host memory, since a few of its rows are wanted. The stream keeps
    the tensors that the model had for `unstream`; until then it must not be moved, cast or dequantised.

    Args:
        model: The model, with its weights on the host.
        file: The file that its weights came from; without one, or with mmap=False, they are copied from
            memory.
        resident: Indices in `model.blocks` of those that stay on the device.
        device: Where to compute.
        slots: Blocks on the device at a time, as for `Stream`.
        ring: Bytes of host memory between file and device, rounded down to a power of two; the CPU as a
            device needs none.
        refiner_stays: False brings a transformer's context refiner for each caption and takes it away again.
        page_cache: Bytes that the system's page cache may hold of the streamed blocks; None for all.
        through: What copies to the device, where another than the usual one is wanted.

    Returns:
        The stream, which is `model.stream` too.

    Raises:
        BadFile: The file was changed or cannot be read.
        BadArgument: The model is streamed already, is not on the CPU, or an argument is out of range.
        Unsupported: Nothing is streamed to such a device.
    """
    if not isinstance(model.stream, Resident):
        raise BadArgument("stream: this model is streamed already; unstream it first")
    passage, maps, count = Ring(through or device_for(device), ring), maps_of(file), len(model.blocks)
    if unknown := sorted(set(resident) - set(range(count))):
        raise BadArgument(f"stream: resident names block {unknown[0]}, blocks are 0 to {count - 1}")
    blocks = blocks_of(model.blocks, maps, passage.device.device)
    moving = [block for block in blocks if block.segments and block.index not in set(resident)]
    for place in to_drop([block.payload for block in moving], page_cache):
        moving[place].cached = False
    visiting: set[nn.Module] = set()
    if isinstance(model, ZImageTransformer) and not refiner_stays:
        visiting = set(model.context_refiner.modules())
    turn = threading.RLock()

    @contextmanager
    def visit(block: nn.Module) -> Iterator[None]:
        with turn:  # a second thread's caption waits, as it does for a streamed block
            moved = load(block.modules(), passage, maps)
            try:
                forbid_planes(block)
                yield
            finally:
                moved.restore()

    staying = (module for module in model.modules() if module not in visiting)
    streamed = {segment.linear for block in moving for segment in block.segments}
    moved = load(staying, passage, maps, streamed)
    try:
        wrap = isinstance(model, ZImageTransformer)  # a text encoder runs once or twice
        stream = Stream(moving, passage, slots, wrap, visit if visiting else None, moved)
    except BaseException:
        moved.restore()
        raise
    if not moving:
        passage.free()
    model.stream = stream
    return stream


def unstream(model: Streamable) -> None:
    """Close a model's stream and put everything back on the host, where it was; without one, do nothing."""
    stream = model.stream
    if isinstance(stream, Stream):
        stream.close()
        model.stream = RESIDENT
        stream.restore()


def forbid_planes(network: nn.Module) -> None:
    """Let no product make a copy of these weights in another layout: a budget has no room for it."""
    for module in network.modules():
        if isinstance(module, Linear) and isinstance(module.weight, QuantTensor):
            module.weight.planes.closed = True


def blocks_of(modules: Sequence[nn.Module], maps: Sequence[Mapped], device: torch.device) -> list[Block]:
    """The streamable part of each block of a network whose weights are on the host.

    These are the matrices that a block reads while it runs, packed or dense. Norms and biases stay on the
    device, and so do the adaptive norms.

    Args:
        modules: The network's `blocks`.
        maps: Files that the weights may be views of.
        device: Where the slots are.

    Raises:
        BadArgument: Weights are not on the host.
    """
    blocks = []
    for index, module in enumerate(modules):
        segments: list[Segment] = []
        start = 0
        for name, linear in module.named_modules():
            if not isinstance(linear, Linear) or name.startswith(OUTSIDE):
                continue
            if linear.device.type != "cpu":
                raise BadArgument(f"block {index}: its weights are on {linear.device}, load it on the CPU")
            home = linear.weight
            packed, scale = (
                (home.packed, home.scale) if isinstance(home, QuantTensor) else (home.detach(), None)
            )
            scale = None if scale is None else scale.to(device)
            segments.append(Segment(linear, home, on_host(packed, maps), scale, start))
            start += aligned(home.nbytes)
        blocks.append(Block(index, segments))
    return blocks


def maps_of(file: WeightFile | None) -> list[Mapped]:
    """The files on disk that weights may be views of, and where each is mapped."""
    found = []
    for source in set() if file is None else {file.source_of(name) for name in file.tensors}:
        try:
            if source.mapped:
                found.append((source, source.tensor(0, 1, 1).data_ptr()))
        except BadArgument:  # closed: its map lives on in the weights, and cannot be asked where
            continue
    return found


def on_host(tensor: Tensor, maps: Sequence[Mapped]) -> Stored:
    """Where the bytes of a contiguous tensor on the host are."""
    data, address = tensor.view(-1).view(torch.uint8), tensor.data_ptr()
    for source, base in maps:
        if base <= address and address + tensor.nbytes <= base + source.size:
            if written(data):  # the file has other bytes
                break
            return Stored(data, source, address - base)
    return Stored(data, None, 0)


def _copy(tensor: Tensor | QuantTensor, ring: Ring, maps: Sequence[Mapped]) -> Tensor | QuantTensor | None:
    """On the device of a ring, and no view of a file; None where the tensor is that already."""
    if isinstance(tensor, QuantTensor):
        packed = _copy(tensor.packed, ring, maps)
        if not isinstance(packed, Tensor):
            return None
        scale = None if tensor.scale is None else tensor.scale.to(packed.device)
        return QuantTensor(packed, tensor.format, tensor.shape, scale)
    if isinstance(tensor, nn.Parameter):
        copy = _copy(tensor.detach(), ring, maps)
        return nn.Parameter(copy, requires_grad=False) if isinstance(copy, Tensor) else None
    device = ring.device.device
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None if tensor.device == device else tensor.to(device)
    place = on_host(tensor, maps)
    if place.source is None and device.type == "cpu":
        return None
    target = ring.device.memory(tensor.nbytes)
    ring.fill(target, place.read)
    return target.view(tensor.dtype).view(tensor.shape)
