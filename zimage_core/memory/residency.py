"""Which blocks stay on the device and which pass through slots: pure arithmetic on lists of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GRAIN = 64 << 10
"""Slots are rounded up to this many bytes, as torch's allocator rounds large ones."""
SLOTS = (3, 2)
"""One slot is computed from and one filled; the third takes up jitter and is given up first."""


@dataclass(frozen=True)
class Residency:
    """Where the blocks of a network lie.

    Args:
        resident: Indices of the blocks that stay.
        resident_bytes: Bytes of those.
        streamed_bytes: Bytes of the others.
        slots: How many slots the others pass through; 0 where all stay.
        slot_bytes: Bytes of one slot: the largest streamed block, rounded up.
    """

    resident: tuple[int, ...]
    resident_bytes: int
    streamed_bytes: int
    slots: int
    slot_bytes: int

    @property
    def nbytes(self) -> int:
        """Device memory that it takes."""
        return self.resident_bytes + self.slots * self.slot_bytes


def spread(count: int, chosen: int) -> list[int]:
    """Choose places out of `count`, as evenly as whole numbers allow (Bresenham), the first among them.

    Each streamed block then hides behind its resident neighbours, before it and, round the end, after it.
    """
    return [i for i in range(count) if -(-(i + 1) * chosen // count) > -(-i * chosen // count)]


def slot_for(nbytes: int) -> int:
    """Bytes of a slot that holds a block of so many bytes."""
    return -(-nbytes // GRAIN) * GRAIN


def place(sizes: Sequence[int], room: int, some: bool = True) -> Residency | None:
    """The residency that streams fewest bytes within a budget; None if the budget is below `floor`.

    Each candidate keeps all blocks larger than some bound, so that slots can be small, and a number of the
    others, spread evenly. More room never streams more: it only adds candidates.

    Args:
        sizes: Bytes of each block, in the order in which they run.
        room: Bytes of the device for them.
        some: False where it must be all or none: blocks that run once gain nothing by staying.
    """
    total = sum(sizes)
    if total <= room:
        return Residency(tuple(range(len(sizes))), total, 0, 0, 0)
    empty = [i for i, size in enumerate(sizes) if not size]  # nothing of them is ever moved
    best: tuple[tuple[int, int, int], Residency] | None = None
    for bound in sorted({*sizes} - {0}, reverse=True) if some else [max(sizes)]:
        large = [i for i, size in enumerate(sizes) if size > bound]
        small = [i for i, size in enumerate(sizes) if 0 < size <= bound]
        held = sum(sizes[i] for i in large)
        if held > room:
            break
        for chosen in range(len(small) if some else 1):
            staying = {small[i] for i in spread(len(small), chosen)}
            resident = held + sum(sizes[i] for i in staying)
            if resident > room:
                continue
            slot = slot_for(max(sizes[i] for i in small if i not in staying))
            # two slots only where no block more could stay: a third is worth more than a resident block
            for slots in SLOTS if not chosen else SLOTS[:1]:
                found = Residency(
                    tuple(sorted({*large, *empty, *staying})), resident, total - resident, slots, slot
                )
                rank = (found.streamed_bytes, -slots, found.nbytes)
                if found.nbytes <= room and (best is None or rank < best[0]):
                    best = rank, found
    return None if best is None else best[1]


def floor(sizes: Sequence[int], some: bool = True) -> int:
    """Least room for `place`: two slots, perhaps beside a few large blocks, or all blocks if that is less."""
    if not sizes:
        return 0
    ways = [sum(sizes)]
    for bound in sorted({*sizes} - {0}, reverse=True) if some else [max(sizes)]:
        ways.append(sum(size for size in sizes if size > bound) + SLOTS[-1] * slot_for(bound))
    return min(ways)
