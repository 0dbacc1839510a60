"""Whether a weight was written to: in the private map of its file, or as a copy on a device.

Weights are views of private maps that may be written to; the file then has other bytes than the memory.
Under a memory budget bytes come from files and copies are dropped, so an edit must be seen before it is lost.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from zimage_core.quant.tensor import QuantTensor

PRESENT, SWAPPED, OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))
"""Bits of an entry of /proc/self/pagemap."""


def written(tensor: Tensor) -> bool:
    """Whether any page of a tensor in a private map is a copy of the file's page, made by a write.

    Where the system does not say (it is Linux's /proc/self/pagemap), the answer is no.
    """
    if not tensor.nbytes:
        return False
    first = tensor.data_ptr() // mmap.PAGESIZE
    count = (tensor.data_ptr() + tensor.nbytes - 1) // mmap.PAGESIZE + 1 - first
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pages:
            pages.seek(first * 8)
            entries = np.frombuffer(pages.read(count * 8), np.uint64)
    except OSError:
        return False
    held = (entries & (PRESENT | SWAPPED)) != 0
    return bool((held & ((entries & OF_FILE) == 0)).any())


def checksum(tensor: Tensor) -> Tensor:
    """A number [] that changes, but for an unlikely chance, when the tensor's bytes do; on its device."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = len(flat) // 8 * 8
    return flat[:whole].view(torch.int64).sum() + flat[whole:].sum()


@dataclass
class Moved:
    """What was put on a device; what a user edits there afterwards is kept.

    Args:
        places: Module, name of its tensor, the tensor that was there before, and the copy of it.
        sums: Checksum of each copy that is a Parameter, by its place; made by `seal`.
        spare: Bytes behind the copies, uint8, that the caller of `load` asked for.
        device_bytes: Bytes of both on the device.
    """

    places: list[tuple[nn.Module, str, Tensor | QuantTensor, Tensor | QuantTensor]] = field(
        default_factory=list
    )
    sums: dict[int, Tensor] = field(default_factory=dict)
    spare: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    device_bytes: int = 0

    def seal(self) -> None:
        """Note what the copies hold, before a user can edit them."""
        copies = enumerate(copy for _, _, _, copy in self.places)
        self.sums = {i: checksum(copy) for i, copy in copies if isinstance(copy, nn.Parameter)}

    def edited(self) -> set[int]:
        """Places whose tensor was replaced since it was put there, or written to since `seal`."""
        found = set()
        # compared on the device, since each number that the host reads makes it wait; tables stay on the host
        for device in {known.device for known in self.sums.values()}:
            known = {i: each for i, each in self.sums.items() if each.device == device}
            copies = [self.places[i][3] for i in known]
            now = [checksum(copy).to(device) for copy in copies if isinstance(copy, nn.Parameter)]
            changed = torch.stack(now) != torch.stack([*known.values()])
            found |= {i for i, differs in zip(known, changed.tolist(), strict=True) if differs}
        places = enumerate(self.places)
        return found | {i for i, (module, name, _, copy) in places if getattr(module, name, None) is not copy}

    def restore(self) -> None:
        """Put everything back where it was, but for edits."""
        try:
            edited = self.edited()
        except RuntimeError:  # a GPU that fails has nothing left to keep
            edited = set()
        for i, (module, name, tensor, _) in enumerate(self.places):
            if i not in edited:
                setattr(module, name, tensor)
            elif isinstance(mine := getattr(module, name, None), nn.Parameter):
                mine.data = mine.data.to(tensor.device)
        self.places.clear()
        self.sums.clear()
        self.spare, self.device_bytes = torch.empty(0, dtype=torch.uint8), 0
