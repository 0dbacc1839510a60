"""Tensors from a checkpoint into a file, one at a time, in slabs: memory does not grow with either.

A tensor whose stored type is the wanted one is copied byte for byte; any other is made float32 slab by slab
and encoded. Floats are looked at on the way: NaN and infinity are named, never quietly encoded. A conversion,
which does not judge weights, carries them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zimage_core.errors import BadWeights, printable
from zimage_core.export.checkpoint import Checkpoint, Target
from zimage_core.export.unfinished import Unfinished
from zimage_core.formats import BlockFormat
from zimage_core.quantize import numbers
from zimage_core.quantize.encode import quantize
from zimage_core.weights.gguf_writer import Layout

Progress = Callable[[int, int, str], None]
"""(weights done, weights in all, tensor) -> None."""
Log = Callable[[str], None]
"""A sentence that is worth reading."""

_MOST = 65504.0  # of float16


@dataclass(frozen=True)
class Job:
    """One tensor of the file to be written.

    Args:
        target: What it is made from.
        format: The type it gets.
        importance: float32 [K], what an error in each input channel costs; None for all alike.
    """

    target: Target
    format: BlockFormat
    importance: Tensor | None = None


def write_tensors(
    source: Checkpoint,
    jobs: Sequence[Job],
    layout: Layout,
    file: Unfinished,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
    log: Log | None = None,
    trust: bool = False,
) -> None:
    """Write header and tensors into an open `Unfinished`, going on after what it holds already.

    Args:
        source: Where the tensors come from.
        jobs: What to write.
        layout: Where it goes.
        file: The open file.
        allow_nonfinite: See `Watch`.
        progress: Called after each slab.
        log: Told what is odd.
        trust: Carry NaN and infinity as they are; `jobs` has copies and plain floats only.

    Raises:
        BadWeights: NaN or infinity that was not allowed, or numbers beyond float16 in a tensor for F16.
        BadFile: The source cannot be read or changed meanwhile; the file cannot be written.
    """
    file.write(0, layout.header)
    total = sum(job.target.weights for job in jobs)
    before, resumed = 0, 0
    for job in jobs:
        name = job.target.name
        offset, nbytes = layout.places[name]
        if file.holds(name, offset, nbytes):
            resumed += 1
        else:
            if resumed and log is not None:
                log(f"going on after {resumed} finished tensors")
            resumed = 0
            rows = packed_rows(source, job, allow_nonfinite, log, trust)
            _write_one(rows, job, offset, file, before, total, progress)
        before += job.target.weights
        if progress is not None:
            progress(before, total, name)
    source.file.check_unchanged()


def _write_one(
    rows: Iterator[bytearray | memoryview],
    job: Job,
    offset: int,
    file: Unfinished,
    before: int,
    total: int,
    progress: Progress | None,
) -> None:
    crc, written = 0, 0
    width = job.format.row_bytes(job.target.columns)
    for data in rows:
        file.write(offset + written, data)
        crc = zlib.crc32(data, crc)
        written += len(data)
        if progress is not None:
            progress(before + written // width * job.target.columns, total, job.target.name)
    file.finished(job.target.name, crc)


def packed_rows(
    source: Checkpoint,
    job: Job,
    allow_nonfinite: bool = False,
    log: Log | None = None,
    trust: bool = False,
) -> Iterator[bytearray | memoryview]:
    """The bytes of a tensor in its new type, in pieces of whole rows.

    Raises:
        BadWeights: See `write_tensors`.
    """
    exact = source.format_of(job.target) == job.format and not source.is_scaled(job.target)
    watch = Watch(source.file.path, job, allow_nonfinite, trust)
    if exact and (trust or not job.format.is_float):
        yield from source.raw(job.target)
        return
    if exact:
        # the same floats: looked at, but carried as they are
        watch.run(source.dense(job.target))
        watch.report(log, "they are carried as they are")
        yield from source.raw(job.target)
        return
    slabs = source.dense(job.target)
    for slab in slabs:
        if not watch.look(slab):
            watch.run(slabs)
            watch.report(None)
        if trust and job.format.name in numbers.ENCODERS:
            packed = numbers.ENCODERS[job.format.name](slab, None)  # `quantize` refuses what is not finite
        else:
            packed = quantize(watch.mended(slab), job.format, job.importance)
        yield packed.flatten().numpy().data
    watch.report(log)


class Watch:
    """Counts what is not finite in a tensor, or too large for its new type.

    Args:
        path: The source, for messages.
        job: The tensor.
        allow: Do not refuse; what is encoded then gets 0 for NaN and the largest float16 for infinity.
        carry: NaN and infinity are no matter, only what would become infinite.
    """

    def __init__(self, path: str, job: Job, allow: bool, carry: bool = False) -> None:
        self.path, self.job, self.allow, self.carry = path, job, allow, carry
        self.count, self.first, self.kind = 0, -1, ""
        self._seen = 0
        # 65520 is the first number that rounds to infinity
        self._limit = 65520.0 if job.format.name == "F16" else float("inf")

    def look(self, slab: Tensor) -> bool:
        """Whether the next rows can be encoded."""
        fine = not slab.numel() or bool(slab.abs().amax() < self._limit)
        if not fine:
            flat = slab.flatten()
            bad = ~(flat.abs() < self._limit)
            if self.carry:
                bad &= flat.isfinite()
            fine = not bool(bad.any())
            if not fine and not self.count:
                index = int(bad.nonzero()[0, 0])
                value = float(flat[index])
                self.first = self._seen + index
                self.kind = "beyond the range of F16" if abs(value) < float("inf") else "NaN or infinite"
            self.count += int(bad.sum())
        self._seen += slab.numel()
        return fine or self.allow

    def run(self, slabs: Iterator[Tensor]) -> None:
        """Look at all that is left."""
        for slab in slabs:
            self.look(slab)

    def mended(self, slab: Tensor) -> Tensor:
        """What every type can hold in place of NaN and infinity."""
        if not self.count:
            return slab
        finite = torch.nan_to_num(slab, nan=0.0, posinf=_MOST, neginf=-_MOST)
        return finite.clamp(-_MOST, _MOST) if self.job.format.name == "F16" else finite

    def report(
        self, log: Log | None, then: str = "0 stands for NaN, the largest number for infinity"
    ) -> None:
        """Refuse what was found, or say it where it was allowed."""
        if not self.count:
            return
        shape = self.job.target.shape
        where: list[int] = []
        rest = self.first
        for size in reversed(shape):
            rest, index = divmod(rest, size)
            where.insert(0, index)
        name = printable(self.job.target.name, 120)
        fault = f"{name} has {self.count} numbers that are {self.kind}, the first at {where}"
        if not self.allow:
            hint = "download the checkpoint again, or allow them (--allow-nonfinite)"
            if self.kind.startswith("beyond"):
                hint = "dequantise to bf16 or f32" if self.carry else "choose BF16 or F32 for it"
            raise BadWeights(f"{printable(self.path)}: {fault}; {hint}")
        if log is not None:
            log(f"{fault}; {then}")
