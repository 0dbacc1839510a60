"""Attach a stream to a model and take it off again."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from zimage_core.errors import BadArgument
from zimage_core.memory.blocks import Mapped, describe, in_file, sources_of
from zimage_core.memory.cache import let_go
from zimage_core.memory.device import Backend, backend_for
from zimage_core.memory.job import RING
from zimage_core.memory.stream import READERS, SLOTS, Stream
from zimage_core.models.block_source import RESIDENT, Resident
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.nn.linear import Embedding, Linear
from zimage_core.quant.tensor import QuantTensor
from zimage_core.weights.load import opened_file
from zimage_core.weights.source import WeightFile

_HOST = torch.device("cpu")

Streamable = ZImageTransformer | TextEncoder


@dataclass
class _Homes:
    """Where everything was that was moved."""

    tensors: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)
    packed: list[tuple[Linear | Embedding, QuantTensor]] = field(default_factory=list)

    def restore(self) -> None:
        for module, name, tensor in self.tensors:
            setattr(module, name, tensor)
        for module, quant in self.packed:
            module.set_weight(quant)


_HOMES: WeakKeyDictionary[nn.Module, _Homes] = WeakKeyDictionary()


def stream_model(
    model: Streamable,
    resident: Collection[int] = (),
    device: torch.device | str = "cpu",
    *,
    slots: int = SLOTS,
    ring: int = RING,
    readers: int = READERS,
    wrap: bool | None = None,
    refiner_stays: bool = True,
    page_cache: int | None = None,
    backend: Backend | None = None,
) -> Stream:
    """Put a model that was loaded on the CPU on a device, all but the blocks that are streamed to it.

    No mapped page is read from then on, so that a file that is cut meanwhile is an error and no crash:
    what stays is read into memory, on the CPU as well. The table of token embeddings goes to host
    memory, since a few of its rows are wanted. The model keeps the tensors that it had for `unstream`; until
    then it must not be moved, cast or made resident.

    Args:
        model: With its weights on the host.
        resident: Indices in `model.blocks` of those that stay on the device.
        device: Where to compute.
        slots: See `Stream`, like the next two.
        ring: See there.
        readers: See there.
        wrap: See there; default: a transformer runs many times, a text encoder once or twice.
        refiner_stays: False brings a transformer's context refiner for each caption and takes it away again.
        page_cache: Bytes that the system's page cache may hold of the streamed blocks; None for all.
        backend: Of the device, where another than its usual one is wanted.

    Returns:
        The stream, which is `model.stream` too.

    Raises:
        BadFile: The file was changed or cannot be read.
        BadArgument: The model is streamed already, is not on the CPU, or an argument is out of range.
        Unsupported: Nothing is streamed to such a device.
    """
    if not isinstance(model.stream, Resident):
        raise BadArgument("stream: this model is streamed already; unstream it first")
    backend = backend or backend_for(device)
    opened, device = opened_file(model), backend.device
    file = None if opened is None else opened.file
    blocks = describe(model.blocks, file, device)
    wrap = isinstance(model, ZImageTransformer) if wrap is None else wrap

    turn = threading.Lock()

    @contextmanager
    def visit(block: nn.Module) -> Iterator[None]:
        with turn:  # a second thread's caption waits, as it does for a streamed block
            bring(block, device, file)
            try:
                forbid_planes(block)
                yield
            finally:
                take_back(block)

    apart = (
        set()
        if refiner_stays or not isinstance(model, ZImageTransformer)
        else {*model.context_refiner.modules()}
    )
    stream = Stream(blocks, resident, backend, slots, ring, readers, wrap, visit if apart else None)
    streamed = set(stream.streamed)
    moved = [block for block in blocks if block.index in streamed]
    for place in let_go([block.payload for block in moved], page_cache):
        moved[place].cached = False
    keep = {segment.linear for block in moved for segment in block.segments}
    homes = _Homes()
    files = sources_of(file)
    try:
        for module in model.modules():
            if module in apart:
                continue
            where = _HOST if isinstance(module, Embedding) else device
            if module not in keep:
                _move_packed(module, where, files, homes)
            _move_dense(module, where, files, homes, {"weight"} if module in keep else set())
    except BaseException:
        homes.restore()
        stream.close()
        raise
    _HOMES[model] = homes
    model.stream = stream
    return stream


def unstream(model: Streamable) -> None:
    """Close a model's stream and put everything back on the host, where it was; without one, do nothing."""
    stream = model.stream
    if isinstance(stream, Stream):
        stream.close()
        model.stream = RESIDENT
        _HOMES.pop(model, _Homes()).restore()


def bring(model: nn.Module, device: torch.device, file: WeightFile | None) -> None:
    """Put a whole module on a device for a while; `take_back` undoes it. No mapped page is read from then on.

    Args:
        model: The module.
        device: Where to.
        file: That its weights came from.

    Raises:
        BadFile: Its file was changed or cannot be read.
    """
    homes = _Homes()
    files = sources_of(file)
    try:
        for module in model.modules():
            _move_packed(module, device, files, homes)
            _move_dense(module, device, files, homes)
    except BaseException:
        homes.restore()
        raise
    _HOMES[model] = homes


def take_back(model: nn.Module) -> None:
    """Put what `bring` moved back where it was; without that, do nothing."""
    _HOMES.pop(model, _Homes()).restore()


def forbid_planes(network: nn.Module) -> None:
    """Let no product make a copy of these weights in another layout: a budget has no room for it."""
    for module in network.modules():
        if isinstance(module, Linear) and isinstance(module.weight, QuantTensor):
            module.weight.planes.closed = True


def _move_packed(module: nn.Module, device: torch.device, files: Sequence[Mapped], homes: _Homes) -> None:
    if not isinstance(module, (Linear, Embedding)) or not isinstance(module.weight, QuantTensor):
        return
    quant = module.weight
    packed = _moved(quant.packed, device, files)
    if packed is not quant.packed:
        homes.packed.append((module, quant))
        scale = None if quant.scale is None else quant.scale.to(device)
        module.set_weight(QuantTensor(packed, quant.format, quant.shape, scale))


def _move_dense(
    module: nn.Module,
    device: torch.device,
    files: Sequence[Mapped],
    homes: _Homes,
    but: Collection[str] = (),
) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        if name in but:
            continue
        moved = _moved(parameter.detach(), device, files)
        if moved.device != parameter.device or moved.data_ptr() != parameter.data_ptr():
            homes.tensors.append((module, name, parameter))
            setattr(module, name, nn.Parameter(moved, requires_grad=False))
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.device != device:
            homes.tensors.append((module, name, buffer))
            setattr(module, name, buffer.to(device))


def _moved(tensor: Tensor, device: torch.device, files: Sequence[Mapped]) -> Tensor:
    """On the device, and no view of a file: a page of one that was cut would end the process."""
    source, offset = in_file(tensor, files)
    if source is not None:
        copy = torch.empty(tensor.nbytes, dtype=torch.uint8)
        source.check_unchanged()
        source.read_into(offset, copy.numpy().data)
        tensor = copy.view(tensor.dtype).view(tensor.shape)
    return tensor.to(device)
