"""Constant tables of the formats that store indices instead of numbers: data, no arithmetic.

The values come from the `gguf` package, which ships with ggml. Each table is compared with a checksum, so
another release of the package cannot change a weight unnoticed. Nothing is loaded before the first call;
loading the largest table takes milliseconds.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import import_module

from zimage_core.errors import Unsupported


@dataclass(frozen=True, slots=True)
class Codebook:
    """`entries` rows of `width` int8 values, row after row in `values`.

    One index selects one row: one weight for the tables of 16 levels, 4 or 8 neighbouring weights
    for the grids. NumPy: `np.frombuffer(book.values, np.int8).reshape(book.shape)`.
    """

    name: str
    entries: int
    width: int
    values: bytes

    @property
    def shape(self) -> tuple[int, int]:
        """(entries, width)."""
        return self.entries, self.width


@dataclass(frozen=True, slots=True)
class _Source:
    """Location of a table (class and attribute in gguf.quants) and its expected contents."""

    cls: str
    attribute: str
    entries: int
    width: int
    sha256: str  # of the values as int8, row after row


_SOURCES = {
    "iq2_xxs": _Source(
        "IQ2_XXS", "grid", 256, 8, "05826b5d3e472a3a78f196be62ac78acf81df0f909626e12ab9fa2a5d490dd54"
    ),
    "iq2_xs": _Source(
        "IQ2_XS", "grid", 512, 8, "06e47aaca60b4dc1d9b5a3f34540437058a6b142b4d7a59d5ded769b4d1bf1de"
    ),
    "iq2_s": _Source(
        "IQ2_S", "grid", 1024, 8, "e1aa1473412b0552c2174c30ef22ab4073f6a181b85a17056e8249bd2932fd88"
    ),
    "iq3_xxs": _Source(
        "IQ3_XXS", "grid", 256, 4, "46e35f5a997efdee6c99ce57854c8a0d4f0ff8ca57e5e8a60c0793ea580acf5d"
    ),
    "iq3_s": _Source(
        "IQ3_S", "grid", 512, 4, "bd1af4945a1717c65610b0284e4628b9a1ba3b306fae3a06f6e5f597356e349f"
    ),
    "iq1": _Source(
        "IQ1_S", "grid", 2048, 8, "07540ffc1aeaf6ad4d97e96b0fcc765aae39671d4ae4a27bbd0e796fde167c6a"
    ),
    # the 16 levels of IQ4_NL and IQ4_XS
    "iq4_nl": _Source(
        "IQ4_NL", "kvalues", 16, 1, "61aa47540aa024b5d6ddaa839b84ffe59f3d5a349af5c6c7ffcb5e0474b46163"
    ),
    # the 16 values of a 4-bit float with 2 exponent bits and 1 mantissa bit, doubled to be integers
    "e2m1": _Source(
        "MXFP4", "kvalues", 16, 1, "adf76b672d47eb7fc0afd4db132d548d59d3190aa0ad118fdbf569d5fd478f97"
    ),
}

CODEBOOK_NAMES = tuple(_SOURCES)


@cache
def codebook(name: str) -> Codebook:
    """The table of that name, loaded once and kept.

    Args:
        name: One of CODEBOOK_NAMES, as `BlockFormat.codebook` has it.

    Raises:
        KeyError: No such table; a mistake in the caller.
        Unsupported: The installed gguf package lacks the table or holds another one.
    """
    source = _SOURCES[name]
    try:
        cls = getattr(import_module("gguf.quants"), source.cls)
        if source.attribute == "grid":
            cls.init_grid()
            values = cls.grid.astype("int8").tobytes()
        else:
            values = bytes(value & 0xFF for value in cls.kvalues)
    except (ImportError, AttributeError) as fault:
        raise Unsupported(
            f"the table {name} could not be read from the gguf package ({fault}); install gguf>=0.18"
        ) from fault
    if hashlib.sha256(values).hexdigest() != source.sha256:
        raise Unsupported(
            f"the table {name} in the installed gguf package is not the one that files are made with; "
            "install gguf==0.19.0"
        )
    return Codebook(name, source.entries, source.width, values)
