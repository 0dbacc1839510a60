"""Importance matrices: the mean square of each input channel of each weight matrix.

An encoder weights the error of column k by the mean square of input channel k. For uncorrelated inputs the
sum is the error of the product. The files have llama.cpp's formats, old and new (`imatrix_files.py`), so that
they can be exchanged with its tools.

Tensors have the names of a GGUF file: single-file names for an S3-DiT, where q, k and v are one tensor with
one input, and llama.cpp's names for a text encoder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from zimage_core.errors import BadArgument, WrongModel, printable
from zimage_core.files.atomic import write_atomically
from zimage_core.quantize import imatrix_files
from zimage_core.quantize.imatrix_files import Sums

FORMATS = ("gguf", "dat")
_FEWEST_FOUND = 0.5
"""Least share of the tensors to encode that must be in an imatrix for it to count as one of this model."""


@dataclass(frozen=True)
class Imatrix:
    """Statistics of the inputs of weight matrices.

    Args:
        entries: Tensor name -> sums of squares and number of rows.
        datasets: Sources of the inputs, such as names of prompt files.
        chunks: Number of chunks of data; in files of this library a chunk is an image.
        path: The file that the imatrix was read from, for messages.
    """

    entries: Mapping[str, Sums] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    path: str = ""

    def importance(self, name: str) -> Tensor | None:
        """Mean square of each input channel of a tensor, float32 [K]; None if there is no entry for it.

        `name` is the tensor's name in a GGUF file.
        """
        sums = self.entries.get(name)
        return (sums.squares / sums.count).float() if sums is not None and sums.count else None

    def merge(self, other: Imatrix) -> Imatrix:
        """Combine two imatrices as if they had been collected together.

        Raises:
            WrongModel: A tensor has another number of input channels in `other`.
        """
        self.check_fits({name: sums.width for name, sums in other.entries.items()}, fewest=0)
        entries = dict(self.entries)
        for name, sums in other.entries.items():
            entries[name] = entries[name] + sums if name in entries else sums
        return replace(
            self,
            entries=entries,
            datasets=tuple(dict.fromkeys((*self.datasets, *other.datasets))),
            chunks=self.chunks + other.chunks,
        )

    def missing(self, wanted: Iterable[str]) -> tuple[str, ...]:
        """The wanted tensors without an entry; they are encoded as if there were no imatrix."""
        return tuple(name for name in wanted if self.importance(name) is None)

    def check_fits(self, widths: Mapping[str, int], fewest: float = _FEWEST_FOUND) -> None:
        """Refuse an imatrix of another model.

        Args:
            widths: Tensor to encode -> number of its input channels.
            fewest: Least share of these tensors that must have an entry.

        Raises:
            WrongModel: A tensor has another number of channels, or too few tensors have an entry.
        """
        for name, width in widths.items():
            sums = self.entries.get(name)
            if sums is not None and sums.width != width:
                raise WrongModel(
                    self.path or "imatrix",
                    f"this is the imatrix of another model: {printable(name, 80)} has {sums.width} input "
                    f"channels there and {width} here",
                    "collect one from this model with `zimage imatrix`",
                )
        lost = self.missing(widths)
        if len(lost) > len(widths) * (1 - fewest):
            found = next(iter(self.entries), None)
            having = f"it has {printable(found, 80)} for instance" if found else "it is empty"
            raise WrongModel(
                self.path or "imatrix",
                f"this is the imatrix of another model: it knows {len(widths) - len(lost)} of {len(widths)} "
                f"tensors, {printable(lost[0], 80)} is not among them; {having}",
                "collect one from this model with `zimage imatrix`",
            )


def read_imatrix(path: str | os.PathLike[str]) -> Imatrix:
    """Read an importance matrix, GGUF or legacy; the first bytes decide which.

    The prefix of stable-diffusion.cpp's names, `model.diffusion_model.`, is removed.

    Raises:
        BadFile: The file is not a regular file, is cut or damaged. Counts and lengths are compared with its
            size before anything is allocated for them, and sums that are negative or not finite are refused.
        WrongModel: The file is a GGUF that holds a model.
    """
    return Imatrix(*imatrix_files.read(path), os.fspath(path))


def write_imatrix(
    path: str | os.PathLike[str], imatrix: Imatrix, format: str | None = None, overwrite: bool = False
) -> None:
    """Write a complete importance matrix, or nothing.

    Args:
        path: Destination.
        imatrix: The importance matrix.
        format: "gguf", or "dat" for llama.cpp before July 2025, which has one dataset and no row counts. None
            decides by the name: GGUF unless it ends in .dat.
        overwrite: Replace an existing file.

    Raises:
        BadArgument: The format is unknown, or the imatrix is empty.
        BadFile: The file exists or cannot be written.
    """
    format = format or ("dat" if os.fspath(path).endswith(".dat") else "gguf")
    if format not in FORMATS:
        raise BadArgument(f"format: got {printable(format, 40)}, wanted {' or '.join(FORMATS)}")
    entries = {name: sums for name, sums in sorted(imatrix.entries.items()) if sums.count > 0}
    if not entries:
        raise BadArgument("imatrix: nothing was collected, so there is nothing to write; run a prompt first")
    encode = imatrix_files.to_gguf if format == "gguf" else imatrix_files.to_dat
    write_atomically(path, encode(entries, imatrix.datasets, imatrix.chunks), overwrite)


def flat(widths: Mapping[str, int]) -> Imatrix:
    """An imatrix with equal importance of all channels, for which the error of the weights is minimised."""
    ones = {name: Sums(torch.ones(width, dtype=torch.float64), 1) for name, width in widths.items()}
    return Imatrix(ones, ("flat",), 1)
