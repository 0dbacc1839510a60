"""The system's page cache as a part of a plan: what it need not keep, and what it should read ahead.

A cycle through more bytes than a least-recently-used cache holds finds none of them there. So, of blocks that
do not all fit, some are let go as soon as they were read and the others are still there in the next step.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from zimage_core.memory.residency import spread
from zimage_core.weights.source import WeightFile

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")
AT_ONCE = 16 << 20
"""Bytes that the system is asked for at a time, so that the thread that asks can end between two."""


def available() -> int | None:
    """Bytes of host memory that the page cache may fill without anything being swapped out.

    The smaller of what the machine and the control group (version 2) have left, cached files counted
    as free; None where neither can be told.
    """
    found = [amount for amount in (_of_machine(), _of_group()) if amount is not None]
    return min(found, default=None)


def let_go(sizes: Sequence[int], room: int | None) -> set[int]:
    """Places in `sizes` whose blocks the page cache should not keep, so that the others fit `room` bytes.

    They are spread evenly, so that reads from disk alternate with reads from memory.
    """
    if room is None or sum(sizes) <= room:
        return set()
    for kept in range(len(sizes) - 1, -1, -1):
        staying = spread(len(sizes), kept)
        if sum(sizes[place] for place in staying) <= room:
            return set(range(len(sizes))) - set(staying)
    return set(range(len(sizes)))


class ReadAhead:
    """Brings a file into the page cache while something else is computed; nothing where it does not fit.

    Args:
        file: The weights of the next network.
    """

    def __init__(self, file: WeightFile | None) -> None:
        self._over = threading.Event()
        room = available()
        ranges = [] if file is None else [(file.source_of(name), info) for name, info in file.tensors.items()]
        if room is None or sum(info.nbytes for _, info in ranges) > room:
            return
        self._ranges = ranges
        threading.Thread(target=self._run, name="zimage-read-ahead", daemon=True).start()

    def end(self) -> None:
        """Ask for no more."""
        self._over.set()

    def _run(self) -> None:
        for source, info in self._ranges:
            for first in range(0, info.nbytes, AT_ONCE):
                if self._over.is_set():
                    return
                source.read_ahead(info.offset + first, min(AT_ONCE, info.nbytes - first))


def _of_machine() -> int | None:
    return _fields(_MEMINFO, scale=1024).get("MemAvailable:")


def _of_group() -> int | None:
    limit, used = _number(_GROUP / "memory.max"), _number(_GROUP / "memory.current")
    if limit is None or used is None:
        return None
    stat = _fields(_GROUP / "memory.stat")
    return max(0, limit - used + stat.get("inactive_file", 0) + stat.get("active_file", 0))


def _fields(path: Path, scale: int = 1) -> dict[str, int]:
    """Lines of a name and a number."""
    lines = [line.split() for line in _text(path).splitlines()]
    return {line[0]: int(line[1]) * scale for line in lines if len(line) > 1 and line[1].isdecimal()}


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None  # "max" is no limit


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace")
    except OSError:
        return ""
