"""Q2_K to Q6_K: super-blocks of 256 weights whose sub-blocks have small integer scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from zimage_core.formats import FORMATS
from zimage_core.quantize.affine_scales import Affine, AffineSearch
from zimage_core.quantize.blocks import Encoder, assemble, pack_planes, rows_of, to_half
from zimage_core.quantize.rounding import (
    Runs,
    blocks_of,
    columns,
    cost_columns,
    exponents,
    fit_affine,
    nearest_integer,
)
from zimage_core.quantize.signed_scales import SignedSearch, peaks

_CUTS = tuple(product((-0.1, 0.2, 0.5, 0.9), repeat=2))


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a format is searched: run length, largest codes, and how far to look."""

    length: int
    top: int
    limit: int
    divisors: Sequence[float]
    shifts: Sequence[int] = (0, -1, 1)
    rounds: int = 2


_PLANS = {
    "Q2_K": _Plan(16, 3, 15, (15, 13.5, 12, 10.5)),
    "Q4_K": _Plan(32, 15, 63, (63, 61, 58)),
    "Q5_K": _Plan(32, 31, 63, (63, 61, 58)),
}


def _affine(name: str, x: Tensor, importance: Tensor | None) -> Affine:
    """The searched super-blocks of a format with minima."""
    plan = _PLANS[name]
    blocks = x.view(-1, 256)
    power, inverse = exponents(blocks)
    costs = cost_columns(x, importance, 256, plan.length)
    runs = Runs(columns(blocks * inverse[:, None], plan.length), costs, centred=True)
    s, beta = fit_affine(runs, plan.top, _CUTS, floor_at_zero=True)
    search = AffineSearch(runs, power, plan.top, plan.limit)
    return search.run(s, beta, plan.divisors, plan.shifts, plan.rounds)


def _bytes(values: Tensor) -> Tensor:
    """[subs, n] -> uint8 [n, subs]."""
    return values.t().to(torch.uint8)


def _six_bits(found: Affine) -> Tensor:
    """Eight scales and eight minima of 6 bits -> 12 bytes [n, 12]; see reference/k_quants.py."""
    scale, least = _bytes(found.scale), _bytes(found.least)
    low, mid = scale[:, :4] | (scale[:, 4:] >> 4 << 6), least[:, :4] | (least[:, 4:] >> 4 << 6)
    return torch.cat([low, mid, (scale[:, 4:] & 15) | (least[:, 4:] << 4)], 1)


def _q2_k(x: Tensor, importance: Tensor | None) -> Tensor:
    found = _affine("Q2_K", x, importance)
    codes = blocks_of(found.codes.to(torch.uint8), len(found.d))
    packed = assemble(
        FORMATS["Q2_K"],
        d=to_half(found.d),
        dmin=to_half(found.dmin),
        scales=_bytes(found.scale) | (_bytes(found.least) << 4),
        qs=pack_planes(codes, 32, 2),
    )
    return rows_of(packed, x)


def _q4_k(x: Tensor, importance: Tensor | None) -> Tensor:
    found = _affine("Q4_K", x, importance)
    codes = blocks_of(found.codes.to(torch.uint8), len(found.d))
    packed = assemble(
        FORMATS["Q4_K"],
        d=to_half(found.d),
        dmin=to_half(found.dmin),
        scales=_six_bits(found),
        qs=pack_planes(codes, 32, 4),
    )
    return rows_of(packed, x)


def _q5_k(x: Tensor, importance: Tensor | None) -> Tensor:
    found = _affine("Q5_K", x, importance)
    codes = blocks_of(found.codes.to(torch.uint8), len(found.d))
    packed = assemble(
        FORMATS["Q5_K"],
        d=to_half(found.d),
        dmin=to_half(found.dmin),
        scales=_six_bits(found),
        qs=pack_planes(codes & 15, 32, 4),
        qh=pack_planes(codes >> 4, 32, 1),
    )
    return rows_of(packed, x)


_Q3_STARTS = (-4.6, -4.2, -3.8, -3.4, -3.0, 3.6, 3.2, 2.8, 2.4)
_Q6_STARTS = (-33, -32.4, -31.8, -31.2, -30.6, -30, 32, 31.4, 30.8, 30.2, 29.6)


def _signed(x: Tensor, importance: Tensor | None, half: int, limit: int, starts, divisors, rounds=2):
    blocks = x.view(-1, 256)
    power, inverse = exponents(blocks)
    costs = cost_columns(x, importance, 256, 16)
    runs = Runs(columns(blocks * inverse[:, None], 16), costs)
    peak = peaks(runs.x)
    search = SignedSearch(runs, power, nearest_integer(-half, half - 1), limit)
    return search.run([peak / t for t in starts], divisors, rounds)


def _q3_k(x: Tensor, importance: Tensor | None) -> Tensor:
    found = _signed(x, importance, 4, 32, _Q3_STARTS, (-32, -30, -28, 31, 29))
    codes = blocks_of((found.levels + 4).to(torch.uint8), len(found.d))
    scale = (found.scale.t() + 32).to(torch.uint8)
    packed = assemble(
        FORMATS["Q3_K"],
        d=to_half(found.d),
        hmask=pack_planes(codes >> 2, 32, 1),
        qs=pack_planes(codes & 3, 32, 2),
        scales=torch.cat([pack_planes(scale & 15, 8, 4), pack_planes(scale >> 4, 4, 2)], 1),
    )
    return rows_of(packed, x)


def _q6_k(x: Tensor, importance: Tensor | None) -> Tensor:
    found = _signed(x, importance, 32, 128, _Q6_STARTS, (-128, -125, -121, -117, 127))
    codes = blocks_of((found.levels + 32).to(torch.uint8), len(found.d))
    packed = assemble(
        FORMATS["Q6_K"],
        d=to_half(found.d),
        ql=pack_planes(codes & 15, 64, 4),
        qh=pack_planes(codes >> 4, 32, 2),
        scales=found.scale.t().to(torch.int8),
    )
    return rows_of(packed, x)


ENCODERS: dict[str, Encoder] = {"Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}
