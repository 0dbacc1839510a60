"""The system's page cache as a part of a plan: what it need not keep, and what it should read ahead.

A cycle through more bytes than a least-recently-used cache holds finds none of them there. So, of blocks that
do not all fit, some are let go as soon as they were read and the others are still there in the next step.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


def to_drop(sizes: Sequence[int], room: int | None) -> set[int]:
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


@contextmanager
def reading_ahead(file: WeightFile | None) -> Iterator[None]:
    """Inside, a file is brought into the page cache; nothing where free host memory does not hold it.

    Args:
        file: The weights of the next network.
    """
    over, room = threading.Event(), available()
    parts = [] if file is None else [(file.source_of(name), info) for name, info in file.tensors.items()]

    def ask() -> None:
        for source, info in parts:
            for first in range(0, info.nbytes, AT_ONCE):
                if over.is_set():
                    return
                source.advise_willneed(info.offset + first, min(AT_ONCE, info.nbytes - first))

    if parts and room is not None and sum(info.nbytes for _, info in parts) <= room:
        threading.Thread(target=ask, name="zimage-read-ahead", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _of_machine() -> int | None:
    return _fields(_MEMINFO, scale=1024).get("MemAvailable:")


def _of_group() -> int | None:
    limit, used = (_text(_GROUP / name).strip() for name in ("memory.max", "memory.current"))
    if not limit.isdecimal() or not used.isdecimal():  # "max" is no limit
        return None
    stat = _fields(_GROUP / "memory.stat")
    return max(0, int(limit) - int(used) + stat.get("inactive_file", 0) + stat.get("active_file", 0))


def _fields(path: Path, scale: int = 1) -> dict[str, int]:
    """Lines of a name and a number."""
    lines = [line.split() for line in _text(path).splitlines()]
    return {line[0]: int(line[1]) * scale for line in lines if len(line) > 1 and line[1].isdecimal()}


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace")
    except OSError:
        return ""
