"""Encoders of IQ4_NL and IQ4_XS: 16 levels at unequal distances, with the searches of integer formats."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from zimage_core.codebooks import codebook
from zimage_core.formats import FORMATS
from zimage_core.quantize.blocks import (
    Encoder,
    as_half,
    pack_consecutive,
    pack_planes,
    packed_rows,
    to_half,
)
from zimage_core.quantize.scale_search import (
    Nearest,
    blocks_of,
    fit_symmetric,
    peaks,
    unit_runs,
)
from zimage_core.quantize.signed_scales import SignedSearch

_STARTS = (-127, 113, *range(-160, -94, 6), *range(90, 151, 10))
"""Levels tried for the weight of largest magnitude: the first and the last, and numbers around them."""


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Tables of the nearest level (float32) and its code (uint8); entry i begins at the number i / 2 - 128.

    Levels are integers, so the points halfway between them are multiples of 1/2, the width of an entry.
    """
    book = codebook("iq4_nl")
    with torch.inference_mode(False):  # the tables are used after the caller's mode ends
        levels = torch.frombuffer(bytearray(book.values), dtype=torch.int8).float()
        centres = torch.arange(512)[:, None] / 2 - 127.75
        code = (centres - levels).abs().argmin(1)
        return levels[code].to(device), code.to(torch.uint8).to(device)


def _places(values: Tensor) -> Tensor:
    """Indices of numbers in the tables, int32 [...]; the values are overwritten."""
    return values.add_(128).mul_(2).clamp_(0, 511).to(torch.int32)


def _nearest(device: torch.device) -> Nearest:
    """A function that moves numbers to the nearest level, in place."""
    levels, _ = _tables(device)

    def move(values: Tensor) -> Tensor:
        return torch.index_select(levels, 0, _places(values).view(-1), out=values.view(-1)).view(values.shape)

    return move


def _codes(levels: Tensor) -> Tensor:
    """Codes 0..15 of levels."""
    return _tables(levels.device)[1][_places(levels)]


def _iq4_nl(x: Tensor, importance: Tensor | None) -> Tensor:
    runs, power = unit_runs(x, importance, 32, 32)
    nearest, peak = _nearest(x.device), peaks(runs.x)
    d = as_half(fit_symmetric(runs, [peak / start for start in _STARTS], nearest), power)
    codes = blocks_of(_codes(runs.levels(d, None, nearest)), len(power))
    return packed_rows(FORMATS["IQ4_NL"], x, d=to_half(d * power), qs=pack_planes(codes, 16, 4))


def _iq4_xs(x: Tensor, importance: Tensor | None) -> Tensor:
    runs, power = unit_runs(x, importance, 256, 32)
    peak = peaks(runs.x)
    search = SignedSearch(runs, power, _nearest(x.device), 32)
    found = search.run([peak / start for start in _STARTS], (-32, -30, -28, 31, 29), 2)
    codes = blocks_of(_codes(found.levels), len(power))
    scale = (found.scale.t() + 32).to(torch.uint8)
    return packed_rows(
        FORMATS["IQ4_XS"],
        x,
        d=to_half(found.d),
        scales_h=pack_consecutive((scale >> 4).contiguous(), 2),
        scales_l=pack_consecutive((scale & 15).contiguous(), 4),
        qs=pack_planes(codes, 16, 4),
    )


ENCODERS: dict[str, Encoder] = {"IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs}
