"""Put a network on a device, whole or all but its streamed blocks, and take it off again.

No mapped page is read from then on, so that a file that is cut meanwhile is an error and no crash: what stays
is read into memory, on the CPU as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn

from zimage_core.config import ONCE
from zimage_core.errors import BadArgument
from zimage_core.memory.device import Device, Ring, device_for
from zimage_core.memory.edits import Moved, written
from zimage_core.memory.int8_rows import load_rows
from zimage_core.memory.page_cache import to_drop
from zimage_core.memory.planner import RING
from zimage_core.memory.stream import SLOTS, Block, Segment, Stored, Stream, aligned
from zimage_core.models.block_source import RESIDENT, Resident
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.models.vision_tower import VisionTower
from zimage_core.nn.linear import Embedding, Linear
from zimage_core.quant.tensor import QuantTensor
from zimage_core.weights.source import Source, WeightFile

OUTSIDE = "adaLN_modulation"
"""Child of a block that runs outside of the loop: adaptive norms are computed for all steps at once."""

READERS = 4
"""Threads that read weights which stay."""

Streamable = ZImageTransformer | TextEncoder | VisionTower
Mapped = tuple[Source, int]
"""A file, and the address of its map."""


def load(
    modules: Iterable[nn.Module],
    ring: Ring,
    maps: Sequence[Mapped],
    streamed: Collection[nn.Module] = (),
    spare: int = 0,
) -> Moved:
    """Put the tensors of modules on the device of a ring, and tables of token embeddings in host memory.

    What goes to the device lies in one piece of memory, since torch's allocator leaves a gap of up to 1 MiB
    behind each tensor.

    Args:
        modules: The modules; those inside them are not looked at unless they are listed too.
        ring: What bytes go to the device through.
        maps: Files that the tensors may be views of.
        streamed: Layers whose weights stay where they are.
        spare: Bytes of the piece behind the tensors, which the caller uses.

    Returns:
        What was moved; its `restore` takes it off the device again.

    Raises:
        BadFile: A file was changed or cannot be read.
    """
    moved, host = Moved(), Ring(Device(), RING)
    wanted: dict[Ring, list[tuple[nn.Module, str, Tensor | QuantTensor, Stored]]] = {ring: [], host: []}
    for module in modules:
        where = host if isinstance(module, Embedding) else ring
        for name, tensor in _tensors(module):
            if not (name == "weight" and module in streamed):
                place = _to_move(tensor, where, maps)
                if place is not None:
                    wanted[where].append((module, name, tensor, place))
    ring.device.order("copy", ring.device.record("compute"))  # memory that was freed may still be read there
    try:
        for where, places in wanted.items():
            ends = [0, *accumulate(aligned(len(place.data)) for *_, place in places)]
            piece = where.device.memory(ends[-1] + (spare if where is ring else 0))
            targets = [
                piece[start : start + len(each[3].data)] for start, each in zip(ends, places, strict=False)
            ]
            _fill(where, [(target, place.read) for target, (*_, place) in zip(targets, places, strict=True)])
            for target, (module, name, tensor, _) in zip(targets, places, strict=True):
                copy = _like(tensor, target)
                moved.places.append((module, name, tensor, copy))
                setattr(module, name, copy)
            if where is ring:
                moved.spare, moved.device_bytes = piece[ends[-1] :], piece.nbytes
        ring.device.order("compute", ring.device.record("copy"))
    except BaseException:
        ring.device.settle()
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
    int8_rows: Collection[int] = (),
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
        refiner_stays: False brings a transformer's context refiner (and Omni's siglip_refiner) for each
            caption and takes it away again.
        int8_rows: Indices of the resident blocks whose int8 rows stay there, and not the weights themselves.
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
    if slots < 1:
        raise BadArgument(f"stream: slots={slots}, wanted 1 slot or more")
    passage, maps, count = Ring(through or device_for(device), ring), maps_of(file), len(model.blocks)
    if unknown := sorted(set(resident) - set(range(count))):
        raise BadArgument(f"stream: resident names block {unknown[0]}, blocks are 0 to {count - 1}")
    blocks = blocks_of(model.blocks, maps, passage.device.device)
    moving = [block for block in blocks if block.segments and block.index not in set(resident)]
    for place in to_drop([block.payload for block in moving], page_cache):
        moving[place].cached = False
    visiting: set[nn.Module] = set()
    if isinstance(model, ZImageTransformer) and not refiner_stays:
        visiting = {
            m for stack in ONCE if hasattr(model, stack) for m in model.get_submodule(stack).modules()
        }
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
    rows = [segment for i in sorted({*int8_rows} & {*resident}) for segment in blocks[i].segments]
    size = max((block.nbytes for block in moving), default=0)
    apart = streamed | {segment.linear for segment in rows}
    moved = load(staying, passage, maps, apart, min(slots, len(moving)) * size)
    try:
        load_rows(rows, passage, moved)
        wrap = isinstance(model, ZImageTransformer)  # the others run once or twice
        places = torch.split(moved.spare, size) if moving else ()
        stream = Stream(moving, passage, places, wrap, visit if visiting else None, moved)
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
        try:
            stream.close()
        finally:
            model.stream = RESIDENT
            stream.restore()


def forbid_planes(network: nn.Module) -> None:
    """Let no product make a copy of these weights in another layout: a budget has no room for it."""
    for _, weight in packed_products(network):
        weight.planes.closed = True


def packed_products(network: nn.Module) -> Iterator[tuple[str, QuantTensor]]:
    """Packed weights of Linear layers that do not multiply int8, by the name of the layer."""
    for name, module in network.named_modules():
        if not isinstance(module, Linear) or module.arithmetic.mode == "int8":
            continue
        if isinstance(module.weight, QuantTensor):
            yield name, module.weight


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


def _fill(ring: Ring, jobs: Sequence[tuple[Tensor, Callable[[int, Tensor], None]]]) -> None:
    """Fill several pieces of device memory; one thread would copy slower than the link of a GPU."""
    readers = ThreadPoolExecutor(READERS, thread_name_prefix="zimage-read")
    try:
        for done in [readers.submit(ring.fill, *job) for job in jobs]:
            done.result()
    finally:
        readers.shutdown(cancel_futures=True)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor | QuantTensor]]:
    """Name and tensor of what a module itself holds."""
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)
    if isinstance(weight := getattr(module, "weight", None), QuantTensor):
        yield "weight", weight


def _to_move(tensor: Tensor | QuantTensor, ring: Ring, maps: Sequence[Mapped]) -> Stored | None:
    """Where the bytes are that the device of a ring needs; None where it has them in memory of its own."""
    raw = tensor.packed if isinstance(tensor, QuantTensor) else tensor.detach()
    if raw.device == ring.device.device and raw.device.type != "cpu":
        return None
    place = on_host(raw.cpu().contiguous(), maps)
    return None if place.source is None and ring.device.device.type == "cpu" else place


def _like(tensor: Tensor | QuantTensor, data: Tensor) -> Tensor | QuantTensor:
    """The same tensor with its bytes, uint8 [n], elsewhere."""
    if isinstance(tensor, QuantTensor):
        scale = None if tensor.scale is None else tensor.scale.to(data.device)
        return tensor.like(data.view(tensor.packed.shape), scale=scale)
    copy = data.view(tensor.dtype).view(tensor.shape)
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
