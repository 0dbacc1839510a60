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
from zimage_core.quant.tensor import QuantTensor
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
_LIMITS = {"F16": 65520.0, "BF16": (2 - 2.0**-8) * 2.0**127}
"""Type -> the first number that it rounds to infinity."""


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
        """The numbers in slabs of float32 [rows, K]; scales are applied, and rotations undone."""

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
        BadWeights: NaN or infinity that is not allowed, or finite numbers beyond the range of the new type.
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
        BadWeights: NaN or infinity that is not allowed, or finite numbers beyond the range of the new type.
    """
    exact = source.format_of(job.target) == job.format and not source.is_scaled(job.target)
    check = FiniteCheck(source.path, job, nonfinite)
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
            slab = check.replaced(slab)
            packed = encode(slab, job.format, job.importance)
            check.covered(slab, packed)
        yield packed.flatten().numpy().data
    check.report(log, "0 stands for NaN, the largest number for infinity")


class FiniteCheck:
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
        self._limit = _LIMITS.get(job.format.name, float("inf"))

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
                beyond = f"beyond the range of {self.job.format.name}"
                self.kind = beyond if flat[index].isfinite() else "NaN or infinite"
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

    def covered(self, slab: Tensor, packed: Tensor) -> None:
        """Refuse numbers that no block can hold: most scales are float16, and larger ones are cut off.

        Raises:
            BadWeights: The largest number of the slab comes back as less than half of itself.
        """
        if not slab.numel() or not bool(slab.abs().amax() > _F16_MAX):
            return
        row, column = divmod(int(slab.abs().argmax()), slab.shape[1])
        value = float(slab[row, column])
        back = QuantTensor(packed[row : row + 1], self.job.format, (1, slab.shape[1])).dequantize()
        if not abs(float(back[0, column])) > abs(value) / 2:
            name, kind = printable(self.job.target.name, 120), self.job.format.name
            fault = f"{name} holds {value:g}, beyond the range of {kind}; choose BF16 or F32 for it"
            raise BadWeights(f"{printable(self.path)}: {fault}")

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
                wide = "F32" if self.job.format.name == "BF16" else "BF16 or F32"
                hint = f"dequantise to {wide.lower()}" if keep else f"choose {wide} for it"
            raise BadWeights(f"{printable(self.path)}: {fault}; {hint}")
        if log is not None:
            log(f"{fault}; {outcome}")
