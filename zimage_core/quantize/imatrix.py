"""Importance matrices: how large the inputs of each weight matrix are, channel by channel.

An encoder that knows the mean square of input channel k weighs the error of column k by it, which for
uncorrelated inputs is the error of the product. The files are llama.cpp's, old and new, so that its tools and
ours can share them: `imatrix_files.py`.

Tensors are named as in a GGUF file: the single-file names of an S3-DiT (where q, k and v are one tensor, with
one input), llama.cpp's of a text encoder.
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
from zimage_core.quantize.imatrix_files import Content, Sums

FORMATS = ("gguf", "dat")
LEVEL_EDGES = (9 / 22, 15 / 26, 0.7, 27 / 34, 33 / 38, 39 / 42, 45 / 46)
"""Noise levels that part the default bins: 3u / (1 + 2u) for u = 3/16, 5/16 ... 15/16.

u is the noise level before a shift of 3, so that each of the eight steps of Turbo has a bin of its own and a
longer schedule fills them evenly.
"""
_FEWEST_FOUND = 0.5
"""Of the tensors to encode, how many an imatrix must know before it counts as one of this model."""


@dataclass(frozen=True)
class Imatrix:
    """Statistics of the inputs of weight matrices.

    Args:
        entries: Tensor name -> sums of squares and number of rows.
        datasets: What the inputs were made from: names of prompt files, for instance.
        chunks: Parts that the data came in; one of ours is a picture.
        edges: Rising noise levels between the bins of `Sums.by_level`; bin 0 is the cleanest.
        path: File that it was read from, for messages.
    """

    entries: Mapping[str, Sums] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    edges: tuple[float, ...] = ()
    path: str = ""

    def importance(self, name: str, level: int | None = None) -> Tensor | None:
        """Mean square of each input channel of a tensor, float32 [K]; None where nothing is known of it.

        Args:
            name: As in a GGUF file.
            level: A bin of noise levels in place of all.
        """
        sums = self.entries.get(name)
        if sums is None:
            return None
        if level is None:
            return (sums.squares / sums.count).float() if sums.count else None
        if sums.by_level is None or sums.level_counts is None:
            return None
        if not 0 <= level < len(sums.level_counts):
            raise BadArgument(f"level: {level} is none of the {len(sums.level_counts)} bins of this imatrix")
        count = int(sums.level_counts[level])
        return (sums.by_level[level] / count).float() if count else None

    def merge(self, other: Imatrix) -> Imatrix:
        """Both as if collected in one go; the bins survive where both have the same.

        Raises:
            WrongModel: A tensor of one name has another number of input channels here and there.
        """
        self.check_fits({name: sums.width for name, sums in other.entries.items()}, fewest=0)
        same = self.edges == other.edges
        mine = self.entries if same else {k: v.without_levels() for k, v in self.entries.items()}
        entries = dict(mine)
        for name, sums in other.entries.items():
            addend = sums if same else sums.without_levels()
            entries[name] = entries[name] + addend if name in entries else addend
        return replace(
            self,
            entries=entries,
            datasets=tuple(dict.fromkeys((*self.datasets, *other.datasets))),
            chunks=self.chunks + other.chunks,
            edges=self.edges if same else (),
        )

    def missing(self, wanted: Iterable[str]) -> tuple[str, ...]:
        """Those of the wanted tensors that nothing is known of; they are encoded as if without imatrix."""
        return tuple(name for name in wanted if self.importance(name) is None)

    def check_fits(self, widths: Mapping[str, int], fewest: float = _FEWEST_FOUND) -> None:
        """Refuse an imatrix of another model.

        Args:
            widths: Tensor to encode -> its input channels.
            fewest: Share of them that must be known.

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


def level_bin(level: float, edges: tuple[float, ...] = LEVEL_EDGES) -> int:
    """Which bin a noise level falls into, 0 the cleanest."""
    return sum(level > edge for edge in edges)


def read_imatrix(path: str | os.PathLike[str]) -> Imatrix:
    """Read an importance matrix, GGUF or legacy; the first bytes decide which.

    Names of stable-diffusion.cpp (behind `model.diffusion_model.`) are taken as those of the single file.

    Raises:
        BadFile: Not a regular file, cut, or damaged: counts and lengths are compared with the file's size
            before anything is allocated for them, and sums that are negative or not finite are refused.
        WrongModel: A GGUF file that holds a model.
    """
    content = imatrix_files.read(path)
    return Imatrix(content.entries, content.datasets, content.chunks, content.edges, os.fspath(path))


def write_imatrix(
    path: str | os.PathLike[str], imatrix: Imatrix, format: str | None = None, overwrite: bool = False
) -> None:
    """Write an importance matrix, whole or not at all.

    Args:
        path: Destination.
        imatrix: What to write.
        format: "gguf", or "dat" for llama.cpp before July 2025, which keeps one dataset and neither row
            counts nor noise levels; None goes by the name, GGUF unless it ends in .dat.
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
    content = Content(entries, imatrix.datasets, imatrix.chunks, imatrix.edges)
    encode = imatrix_files.to_gguf if format == "gguf" else imatrix_files.to_dat
    write_atomically(path, encode(content), overwrite)


def flat(widths: Mapping[str, int]) -> Imatrix:
    """An imatrix in which every channel counts the same: error of the weights, without ggml's heuristics."""
    ones = {name: Sums(torch.ones(width, dtype=torch.float64), 1) for name, width in widths.items()}
    return Imatrix(ones, ("flat",), 1)
