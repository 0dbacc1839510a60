"""Importance matrices: how large the inputs of each weight matrix are, channel by channel.

An encoder that knows the mean square of input channel k weighs the error of column k by it. For uncorrelated
inputs that is the error of the product. The files are llama.cpp's, old and new (`imatrix_files.py`), so that
its tools and ours can share them.

Tensors are named as in a GGUF file: by the single-file names of an S3-DiT, where q, k and v are one tensor
with one input, and by llama.cpp's names of a text encoder.
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
"""Share of the tensors to encode that an imatrix must know to count as one of this model."""


@dataclass(frozen=True)
class Imatrix:
    """Statistics of the inputs of weight matrices.

    Args:
        entries: Tensor name -> sums of squares and number of rows.
        datasets: What the inputs were made from, such as names of prompt files.
        chunks: Number of parts that the data came in; one of ours is an image.
        path: The file that it was read from, for messages.
    """

    entries: Mapping[str, Sums] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    path: str = ""

    def importance(self, name: str) -> Tensor | None:
        """Mean square of each input channel, float32 [K], of a tensor under its name in a GGUF file.

        None for a tensor that nothing is known of.
        """
        sums = self.entries.get(name)
        return (sums.squares / sums.count).float() if sums is not None and sums.count else None

    def merge(self, other: Imatrix) -> Imatrix:
        """Both as if collected in one go.

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
        """The wanted tensors that nothing is known of; they are encoded as if there were no imatrix."""
        return tuple(name for name in wanted if self.importance(name) is None)

    def check_fits(self, widths: Mapping[str, int], fewest: float = _FEWEST_FOUND) -> None:
        """Refuse an imatrix of another model.

        Args:
            widths: Tensor to encode -> number of its input channels.
            fewest: Share of these tensors that must be known.

        Raises:
            WrongModel: A tensor has another number of channels, or too few are known by name.
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

    The prefix of stable-diffusion.cpp's names, `model.diffusion_model.`, is taken off.

    Raises:
        BadFile: Not a regular file, cut, or damaged: counts and lengths are compared with the file's size
            before anything is allocated for them, and sums that are negative or not finite are refused.
        WrongModel: A GGUF file that holds a model.
    """
    return Imatrix(*imatrix_files.read(path), os.fspath(path))


def write_imatrix(
    path: str | os.PathLike[str], imatrix: Imatrix, format: str | None = None, overwrite: bool = False
) -> None:
    """Write an importance matrix, whole or not at all.

    Args:
        path: Destination.
        imatrix: What to write.
        format: "gguf", or "dat" for llama.cpp before July 2025, which keeps one dataset and no row counts;
            None goes by the name, GGUF unless it ends in .dat.
        overwrite: Replace an existing file.

    Raises:
        BadArgument: An unknown format, or nothing to write.
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
    """An imatrix in which every channel counts the same, so that the error of the weights is minimised."""
    ones = {name: Sums(torch.ones(width, dtype=torch.float64), 1) for name, width in widths.items()}
    return Imatrix(ones, ("flat",), 1)
