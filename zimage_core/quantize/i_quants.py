"""Encoders of IQ1_S to IQ3_S: pack the result of `grid_scales`; reference/i_quants.py has the layouts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from zimage_core.formats import FORMATS
from zimage_core.quantize.blocks import Encoder, assemble, pack_consecutive, rows_of, to_half
from zimage_core.quantize.grid_scales import Found, Plan, search

_PLANS = {
    "IQ1_S": Plan("iq1", 32, 8, 1, "rows", shared=4),
    "IQ1_M": Plan("iq1", 16, 8, 1, "rows"),
    "IQ2_XXS": Plan("iq2_xxs", 32, 16, 1 / 8, "even"),
    "IQ2_XS": Plan("iq2_xs", 16, 16, 1 / 8, "even"),
    "IQ2_S": Plan("iq2_s", 16, 16, 1 / 8, "free"),
    "IQ3_XXS": Plan("iq3_xxs", 32, 16, 1 / 4, "even", peak=0.85),
    "IQ3_S": Plan("iq3_s", 32, 16, 1, "free", peak=0.85),
}


def _bytes(words: Tensor, width: int) -> Tensor:
    """Integers [n, m] -> their `width` little-endian bytes [n, m * width]."""
    shifts = torch.arange(0, 8 * width, 8, device=words.device)
    return (words[..., None] >> shifts & 255).to(torch.uint8).flatten(1)


def _joined(fields: Tensor, count: int, bits: int) -> Tensor:
    """Integers [n, m] below 2^bits -> words [n, m / count] of neighbours, the first in the lowest bits."""
    shifts = torch.arange(0, bits * count, bits, device=fields.device)
    return (fields.view(len(fields), -1, count) << shifts).sum(-1)


def _low(found: Found) -> Tensor:
    """The lower byte of each index."""
    return (found.index & 255).to(torch.uint8)


def _high(found: Found) -> Tensor:
    """The bits of each index above its lower byte, uint8."""
    return (found.index >> 8).to(torch.uint8)


def _signs(found: Found) -> Tensor:
    """A byte for each 8 weights, in which a set bit is a minus."""
    return pack_consecutive(found.minus.to(torch.uint8), 1)


def _seven_signs(found: Found) -> Tensor:
    """The signs of each 8 weights as 7 bits, int64 [n, 32]; the last sign follows from the others."""
    return (_signs(found) & 127).long()


def _signs_and_levels(found: Found) -> Tensor:
    """A word for each 32 weights, int64 [n, 8]: four times 7 bits of signs, and a level above them."""
    return _joined(_seven_signs(found), 4, 7) | found.level << 28


def _nibbles(found: Found) -> Tensor:
    """Levels, two in a byte."""
    return pack_consecutive(found.level.to(torch.uint8), 4)


def _iq1_s(found: Found) -> dict[str, Tensor]:
    half = found.half[:, ::4]
    words = _joined(found.index >> 8, 4, 3) | found.level << 12 | half << 15
    return {"qs": _low(found), "qh": _bytes(words, 2)}


def _iq1_m(found: Found) -> dict[str, Tensor]:
    d = to_half(found.d).view(torch.int16).long()[:, None]
    quarters = d >> torch.arange(0, 16, 4, device=d.device) & 15
    words = _joined(found.level, 4, 3) | quarters << 12
    high = pack_consecutive(_high(found) | found.half.to(torch.uint8) << 3, 4)
    return {"qs": _low(found), "qh": high, "scales": _bytes(words, 2)}


def _iq2_xxs(found: Found) -> dict[str, Tensor]:
    indices = _joined(found.index, 4, 8)
    return {"qs": _bytes(torch.stack((indices, _signs_and_levels(found)), 2).flatten(1), 4)}


def _iq2_xs(found: Found) -> dict[str, Tensor]:
    return {"qs": _bytes(found.index | _seven_signs(found) << 9, 2), "scales": _nibbles(found)}


def _iq2_s(found: Found) -> dict[str, Tensor]:
    high = pack_consecutive(_high(found), 2)
    return {"qs": _low(found), "signs": _signs(found), "qh": high, "scales": _nibbles(found)}


def _iq3_xxs(found: Found) -> dict[str, Tensor]:
    return {"qs": _low(found), "gas": _bytes(_signs_and_levels(found), 4)}


def _iq3_s(found: Found) -> dict[str, Tensor]:
    high = pack_consecutive(_high(found), 1)
    return {"qs": _low(found), "qh": high, "signs": _signs(found), "scales": _nibbles(found)}


_PACKERS: dict[str, Callable[[Found], dict[str, Tensor]]] = {
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}


def _encode(name: str, x: Tensor, importance: Tensor | None) -> Tensor:
    """The encoder of a format, with the arguments of `blocks.Encoder`."""
    found = search(_PLANS[name], x, importance)
    packed = assemble(FORMATS[name], d=to_half(found.d), **_PACKERS[name](found))
    return rows_of(packed, x)


ENCODERS: dict[str, Encoder] = {name: partial(_encode, name) for name in _PLANS}
