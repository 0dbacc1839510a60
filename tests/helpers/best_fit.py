"""torch's caching allocator within one segment, for tensors of the meta device: addresses they would reach.

A request takes the smallest free block that holds it; what is left of the block stays free if it is larger
than 1 MiB; neighbours that are free become one block. Requests up to 1 MiB have segments of their own and are
left out.
Source: c10/cuda/CUDACachingAllocator.cpp.
"""

from __future__ import annotations

import bisect
from typing import Any

from tests.helpers.live_bytes import LiveBytes

ROUND, SMALL = 512, 1 << 20


class BestFit(LiveBytes):
    """Counts live bytes, and places each storage in one endless segment.

    Attributes:
        high: End of the highest address that was used.
    """

    def __init__(self, without: str = "") -> None:
        super().__init__(without)
        self.high = 0
        self._free: list[tuple[int, int]] = [(1 << 60, 0)]  # (size, start), sorted
        self._used: dict[Any, tuple[int, int]] = {}

    def place(self, key: Any, nbytes: int) -> None:
        if nbytes <= SMALL:
            return
        wanted = -(-nbytes // ROUND) * ROUND
        size, start = self._free.pop(bisect.bisect_left(self._free, (wanted, 0)))
        if size - wanted > SMALL:
            bisect.insort(self._free, (size - wanted, start + wanted))
            size = wanted
        self._used[key] = (size, start)
        self.high = max(self.high, start + wanted)

    def release(self, key: Any) -> None:
        if key not in self._used:
            return
        size, start = self._used.pop(key)
        for other in [each for each in self._free if each[1] + each[0] == start or each[1] == start + size]:
            self._free.remove(other)
            size, start = size + other[0], min(start, other[1])
        bisect.insort(self._free, (size, start))

    def _see(self, tensor: Any, nbytes: int) -> None:
        key = tensor.untyped_storage()._cdata
        if key not in self._known:
            self.place(key, nbytes)
        super()._see(tensor, nbytes)

    def _drop(self, key: int) -> None:
        self.release(key)
        super()._drop(key)
