"""Writes the tensors of a checkpoint or a network into a file, slab by slab, with bounded memory.

A tensor whose stored type is the wanted one is copied byte for byte; any other is converted to float32 slab
by slab and encoded. The floats are checked, so that NaN and infinity are reported and never encoded silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from zimage_core.errors import BadWeights, printable
from zimage_core.export.checkpoint import Target
from zimage_core.formats import BlockFormat
from zimage_core.quantize import float_types
from zimage_core.quantize.encode import encode
from zimage_core.weights.gguf_writer import Layout

Progress = Callable[[int, int, str], None]
"""(weights done, weights in all, tensor) -> None."""
Log = Callable[[str], None]
"""Function that is called with a message for the user."""
NonFinite = Literal["raise", "replace", "keep"]
"""What to do about NaN and infinity: refuse them, encode 0 and the largest float16, or keep them.
"keep" is for copies and plain floats, and refuses only finite numbers that would become infinite."""

_F16_MAX = 65504.0


class TensorSource(Protocol):
    """Where tensors come from: a checkpoint, or a network in memory."""

    @property
    def path(self) -> str:
        """Name of the source, for messages."""

    def format_of(self, target: Target) -> BlockFormat | None:
        """The format of all parts of a tensor, or None if they have different ones."""

    def is_scaled(self, target: Target) -> bool:
        """Whether a separate scale multiplies the numbers of a part."""

    def raw(self, target: Target) -> Iterator[bytearray | memoryview]:
        """The stored bytes, little-endian, in pieces of whole rows."""

    def dense(self, target: Target) -> Iterator[Tensor]:
        """The numbers in slabs of float32 [rows, K]; scales are applied."""

    def check_unchanged(self) -> None:
        """Raise BadFile if the source was changed since it was opened."""


@dataclass(frozen=True)
class Job:
    """One tensor of the file to be written.

    Args:
        target: The tensor, with the stored parts that it is made of.
        format: Its new type.
        importance: Cost of an error in each input channel, float32 [K]; None if all costs are equal.
    """

    target: Target
    format: BlockFormat
    importance: Tensor | None = None


def write_tensors(
    source: TensorSource,
    jobs: Sequence[Job],
    layout: Layout,
    out: IO[bytes],
    nonfinite: NonFinite = "raise",
    progress: Progress | None = None,
    log: Log | None = None,
) -> None:
    """Write the header and the tensors of a file.

    Args:
        source: The checkpoint or network that is read.
        jobs: The tensors to write.
        layout: Header and position of each tensor.
        out: The file, `layout.nbytes` long.
        nonfinite: What to do about NaN and infinity.
        progress: Called after each slab.
        log: Called with messages about NaN and infinity that were allowed.

    Raises:
        BadWeights: NaN or infinity that is not allowed, or finite numbers beyond float16 in a tensor for F16.
        BadFile: The source cannot be read, or was changed meanwhile.
        OSError: The file cannot be written.
    """
    out.write(layout.header)
    total = sum(job.target.weights for job in jobs)
    done = 0
    for job in jobs:
        out.seek(layout.places[job.target.name][0])
        width, written = job.format.row_bytes(job.target.columns), 0
        for data in packed_rows(source, job, nonfinite, log):
            out.write(data)
            written += len(data)
            if progress is not None:
                progress(done + written // width * job.target.columns, total, job.target.name)
        done += job.target.weights
    source.check_unchanged()


def packed_rows(
    source: TensorSource, job: Job, nonfinite: NonFinite = "raise", log: Log | None = None
) -> Iterator[bytearray | memoryview]:
    """The bytes of a tensor in its new type, in pieces of whole rows.

    Raises:
        BadWeights: NaN or infinity that is not allowed, or finite numbers beyond float16 in a tensor for F16.
    """
    exact = source.format_of(job.target) == job.format and not source.is_scaled(job.target)
    check = _FiniteCheck(source.path, job, nonfinite)
    if exact:
        if job.format.is_float and nonfinite != "keep":
            check.rest(source.dense(job.target))
            check.report(log, "they are carried as they are")
        yield from source.raw(job.target)
        return
    slabs = source.dense(job.target)
    for slab in slabs:
        if not check.passes(slab):
            check.rest(slabs)
            check.report(None)
        if nonfinite == "keep":
            packed = float_types.ENCODERS[job.format.name](slab, None)  # `encode` refuses what is not finite
        else:
            packed = encode(check.replaced(slab), job.format, job.importance)
        yield packed.flatten().numpy().data
    check.report(log, "0 stands for NaN, the largest number for infinity")


class _FiniteCheck:
    """Counts the numbers of a tensor that are not finite, or too large for its new type.

    Args:
        path: The source, for messages.
        job: The tensor.
        nonfinite: What to do about NaN and infinity.
    """

    def __init__(self, path: str, job: Job, nonfinite: NonFinite) -> None:
        self.path, self.job, self.nonfinite = path, job, nonfinite
        self.count, self.first, self.kind = 0, -1, ""
        self._seen = 0
        # 65520 is the first number that rounds to infinity
        self._limit = 65520.0 if job.format.name == "F16" else float("inf")

    def passes(self, slab: Tensor) -> bool:
        """Check the next rows: count the numbers that cannot be encoded; return whether to go on."""
        if slab.numel() and not bool(slab.abs().amax() < self._limit):
            flat = slab.flatten()
            bad = ~(flat.abs() < self._limit)
            if self.nonfinite == "keep":
                bad &= flat.isfinite()
            found = int(bad.sum())
            if found and not self.count:
                index = int(bad.nonzero()[0, 0])
                self.first = self._seen + index
                self.kind = "beyond the range of F16" if flat[index].isfinite() else "NaN or infinite"
            self.count += found
        self._seen += slab.numel()
        return not self.count or self.nonfinite == "replace"

    def rest(self, slabs: Iterator[Tensor]) -> None:
        """Count in all remaining slabs."""
        for slab in slabs:
            self.passes(slab)

    def replaced(self, slab: Tensor) -> Tensor:
        """The slab with NaN and infinity replaced by numbers that every type can hold."""
        if not self.count:
            return slab
        finite = torch.nan_to_num(slab, nan=0.0, posinf=_F16_MAX, neginf=-_F16_MAX)
        return finite.clamp(-_F16_MAX, _F16_MAX) if self.job.format.name == "F16" else finite

    def report(self, log: Log | None, outcome: str = "") -> None:
        """Raise BadWeights if numbers were counted; if they are allowed, log their count and `outcome`."""
        if not self.count:
            return
        shape = self.job.target.shape
        where = [int(i) for i in np.unravel_index(self.first, shape)] if shape else []
        name = printable(self.job.target.name, 120)
        fault = f"{name} has {self.count} numbers that are {self.kind}, the first at {where}"
        if self.nonfinite != "replace":
            hint = "download the checkpoint again, or allow them (--allow-nonfinite)"
            if self.kind.startswith("beyond"):
                keep = self.nonfinite == "keep"
                hint = "dequantise to bf16 or f32" if keep else "choose BF16 or F32 for it"
            raise BadWeights(f"{printable(self.path)}: {fault}; {hint}")
        if log is not None:
            log(f"{fault}; {outcome}")
