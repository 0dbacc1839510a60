"""A block of a network as bytes for a slot: what is moved, from where, and to whom it belongs.

Streamed are the matrices that a block reads while it runs, packed or dense. What stays on the device: norms
and biases, and the adaptive norms, which are computed for all steps at once outside of the block loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from zimage_core.errors import BadArgument
from zimage_core.nn.linear import Linear
from zimage_core.quant.tensor import PlaneCache, QuantTensor
from zimage_core.weights.source import Source, WeightFile

ALIGN = 256
"""Bytes; each matrix begins on a multiple of it in a slot, as the allocator of a GPU would have it."""
Weight = QuantTensor | nn.Parameter
"""Packed, or dense in the dtype of the computation."""
Mapped = tuple[Source, int]
"""A file, and the address of its map."""
OUTSIDE = ("adaLN_modulation",)
"""Children of a block that run outside of the loop."""


def aligned(nbytes: int) -> int:
    """The next multiple of ALIGN."""
    return -(-nbytes // ALIGN) * ALIGN


@dataclass(frozen=True)
class Segment:
    """One matrix: where it goes in a slot and where its bytes are.

    Args:
        linear: Its layer.
        home: The weight as it lies on the host.
        start: First byte in a slot, a multiple of ALIGN.
        source: The file that `home` is a view of, None where it has memory of its own.
        offset: Of its first byte in that file.
    """

    linear: Linear
    home: Weight
    start: int
    source: Source | None
    offset: int

    @property
    def stop(self) -> int:
        """Byte behind its last one in a slot."""
        return self.start + self.home.nbytes

    def read(self, first: int, last: int, into: Tensor) -> None:
        """Its bytes first .. last into a host tensor of that length, without touching a mapped page.

        Raises:
            BadFile: The file was changed or cut since it was opened, or cannot be read.
        """
        if self.source is None:
            # NumPy copies in this thread alone and without the interpreter lock
            into.numpy()[:] = as_bytes(self.home)[first:last].numpy()
            return
        self.source.check_unchanged()
        self.source.read_into(self.offset + first, into.numpy().data)

    def let_go(self) -> None:
        """The page cache need not keep its bytes."""
        if self.source is not None:
            self.source.let_go(self.offset, self.home.nbytes)


class Block:
    """The streamed matrices of one block.

    Args:
        index: In the model's `blocks`.
        linears: Layers with their weights on the host.
        files: Open files that the weights may be views of.
        device: Where the slots are.
    """

    def __init__(
        self, index: int, linears: Sequence[Linear], files: Sequence[Mapped], device: torch.device
    ) -> None:
        self.index = index
        self.segments: list[Segment] = []
        end = 0
        for linear in linears:
            if linear.device.type != "cpu":
                raise BadArgument(f"block {index}: its weights are on {linear.device}, load it on the CPU")
            home = _contiguous(linear)
            source, offset = in_file(as_bytes(home), files)
            self.segments.append(Segment(linear, home, aligned(end), source, offset))
            end = self.segments[-1].stop
        self.nbytes = aligned(end)
        """Of a slot that holds it, gaps included."""
        self.payload = sum(segment.home.nbytes for segment in self.segments)
        """Of its weights."""
        self.cached = True
        """Whether the page cache should keep it from one step to the next."""
        scales = [getattr(segment.home, "scale", None) for segment in self.segments]
        self._scales = [None if scale is None else scale.to(device) for scale in scales]
        self._views: dict[int, list[Weight]] = {}

    def read(self, first: int, last: int, into: Tensor) -> int:
        """Bytes first .. last of a slot into a host tensor of that length -> how many were weights.

        Raises:
            BadFile: See `Segment.read`.
        """
        moved = 0
        for segment in self.segments:
            start, stop = max(first, segment.start), min(last, segment.stop)
            if start < stop:
                part = into[start - first : stop - first]
                segment.read(start - segment.start, stop - segment.start, part)
                moved += stop - start
        return moved

    def loaded(self) -> None:
        """All of it was read: drop what the page cache is not to keep."""
        if not self.cached:
            for segment in self.segments:
                segment.let_go()

    def bind(self, slot: Tensor) -> None:
        """Let each layer read its weight from a slot that holds this block, uint8 [at least nbytes]."""
        views = self._views.get(slot.data_ptr())
        if views is None:
            with torch.inference_mode(False):  # they outlive the caller's mode
                views = [self._view(slot, k) for k in range(len(self.segments))]
            self._views[slot.data_ptr()] = views
        for segment, view in zip(self.segments, views, strict=True):
            segment.linear.set_weight(view)

    def unbind(self) -> None:
        """Let each layer read its weight from the host again."""
        for segment in self.segments:
            segment.linear.set_weight(segment.home)

    def forget(self) -> None:
        """Let go of the slots that it was bound to."""
        self._views.clear()

    def _view(self, slot: Tensor, k: int) -> Weight:
        segment = self.segments[k]
        home, held = segment.home, slot[segment.start : segment.stop]
        if not isinstance(home, QuantTensor):
            return nn.Parameter(held.view(home.dtype).view(home.shape), requires_grad=False)
        packed = held.view(home.packed.shape)
        # planes would outlive the bytes that they were made of
        return QuantTensor(packed, home.format, home.shape, self._scales[k], PlaneCache(closed=True))


def as_bytes(weight: Weight) -> Tensor:
    """Of a contiguous weight on the host: uint8 [nbytes], the same memory."""
    data = weight.packed if isinstance(weight, QuantTensor) else weight.detach()
    return data.view(-1).view(torch.uint8)


def _contiguous(linear: Linear) -> Weight:
    """The weight of a layer, copied where it is a view with gaps."""
    weight = linear.weight
    if isinstance(weight, QuantTensor):
        gapless = weight.packed.is_contiguous()
        return weight if gapless else replace(weight, packed=weight.packed.contiguous(), planes=PlaneCache())
    return weight if weight.is_contiguous() else nn.Parameter(weight.contiguous(), requires_grad=False)


def describe(modules: Sequence[nn.Module], file: WeightFile | None, device: torch.device) -> list[Block]:
    """The streamable part of each block of a network whose weights are on the host.

    Args:
        modules: The network's `blocks`.
        file: That its weights came from; without one, or with mmap=False, they are copied from memory.
        device: Where the slots are.

    Raises:
        BadArgument: Weights are not on the host.
    """
    files = sources_of(file)
    blocks = []
    for index, module in enumerate(modules):
        inside = module.named_modules()
        linears = [m for name, m in inside if isinstance(m, Linear) and not name.startswith(OUTSIDE)]
        blocks.append(Block(index, linears, files, device))
    return blocks


def sources_of(file: WeightFile | None) -> list[Mapped]:
    """The files on disk that weights may be views of, and where each is mapped."""
    sources = {} if file is None else {id(s): s for s in (file.source_of(name) for name in file.tensors)}
    found = []
    for source in sources.values():
        try:
            if source.mapped:
                found.append((source, source.tensor(0, 1, 1).data_ptr()))
        except BadArgument:  # closed: its map lives on in the weights, and cannot be asked where
            continue
    return found


def in_file(tensor: Tensor, files: Sequence[Mapped]) -> tuple[Source | None, int]:
    """The file that a tensor is a view of, and where it begins in it."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None, 0
    address = tensor.data_ptr()
    for source, base in files:
        if base <= address and address + tensor.nbytes <= base + source.size:
            return source, address - base
    return None, 0
