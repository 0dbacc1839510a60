"""Encoders of Q2_K to Q6_K: super-blocks of 256 weights whose sub-blocks have small integer scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zimage_core.formats import FORMATS
from zimage_core.quantize.affine_scales import AffineSearch
from zimage_core.quantize.blocks import Encoder, pack_planes, packed_rows, to_half
from zimage_core.quantize.scale_search import (
    blocks_of,
    fit_affine,
    nearest_integer,
    starting_scales,
    unit_runs,
)
from zimage_core.quantize.signed_scales import SignedSearch
from zimage_core.quantize.starts import CUTS, PEAKS, Cuts


@dataclass(frozen=True, slots=True)
class _Affine:
    """Layout and search of a format with minima.

    Args:
        length: Number of weights in a sub-block.
        top: Largest code of a weight.
        limit: Largest code of a scale or minimum.
        cuts: Starting points of `fit_affine`.
        divisors: Divisors of `AffineSearch.start`.
        shifts: Neighbours that `AffineSearch.neighbours` tries.
    """

    length: int
    top: int
    limit: int
    cuts: Cuts
    divisors: tuple[float, ...]
    shifts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Signed:
    """Search of a format with levels -half..half - 1 and signed scales; sub-blocks have 16 weights.

    Args:
        half: Half the number of levels.
        limit: Scales are -limit..limit - 1.
        starts: Levels tried for the weight of largest magnitude.
        divisors: Divisors of `SignedSearch.start`.
    """

    half: int
    limit: int
    starts: tuple[float, ...]
    divisors: tuple[float, ...]


_AFFINE = {
    "Q2_K": _Affine(16, 3, 15, CUTS[2], (15, 13.8), (0, -1, 1, -2, 2)),
    "Q4_K": _Affine(32, 15, 63, CUTS[4], (63, 61, 58), (0, -1, 1, -2, 2)),
    "Q5_K": _Affine(32, 31, 63, CUTS[5], (63, 61, 58), (0, -1, 1, -2, 2)),
}
_SIGNED = {
    "Q3_K": _Signed(4, 32, PEAKS[3], (-32, -30, -28, 31, 29)),
    "Q6_K": _Signed(32, 128, PEAKS[6], (-128, -125, -121, -117, 127)),
}
_ROUNDS = 2
"""Number of times that the scales of a super-block are fitted and everything is rounded again."""


def _affine(
    name: str, x: Tensor, importance: Tensor | None
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Scales d and dmin, integer scales and minima uint8 [n, subs], and codes uint8 [n, 256]."""
    plan = _AFFINE[name]
    runs, power = unit_runs(x, importance, 256, plan.length, centred=True)
    s, beta = fit_affine(runs, plan.top, plan.cuts, floor_at_zero=True)
    search = AffineSearch(runs, power, plan.top, plan.limit)
    found = search.run(s, beta, plan.divisors, plan.shifts, _ROUNDS)
    halves = {"d": to_half(found.d), "dmin": to_half(found.dmin)}
    small = (found.scale.t().to(torch.uint8), found.least.t().to(torch.uint8))
    return halves, *small, blocks_of(found.codes.to(torch.uint8), len(power))


def _six_bits(scale: Tensor, least: Tensor) -> Tensor:
    """Eight scales and eight minima of 6 bits -> bytes [n, 12]; reference/k_quants.py has the layout."""
    low, mid = scale[:, :4] | (scale[:, 4:] >> 4 << 6), least[:, :4] | (least[:, 4:] >> 4 << 6)
    return torch.cat([low, mid, (scale[:, 4:] & 15) | (least[:, 4:] << 4)], 1)


def _q2_k(x: Tensor, importance: Tensor | None) -> Tensor:
    halves, scale, least, codes = _affine("Q2_K", x, importance)
    fields = {"scales": scale | (least << 4), "qs": pack_planes(codes, 32, 2)}
    return packed_rows(FORMATS["Q2_K"], x, **halves, **fields)


def _q4_k(x: Tensor, importance: Tensor | None) -> Tensor:
    halves, scale, least, codes = _affine("Q4_K", x, importance)
    fields = {"scales": _six_bits(scale, least), "qs": pack_planes(codes, 32, 4)}
    return packed_rows(FORMATS["Q4_K"], x, **halves, **fields)


def _q5_k(x: Tensor, importance: Tensor | None) -> Tensor:
    halves, scale, least, codes = _affine("Q5_K", x, importance)
    fields = {"scales": _six_bits(scale, least), "qs": pack_planes(codes & 15, 32, 4)}
    fields["qh"] = pack_planes(codes >> 4, 32, 1)
    return packed_rows(FORMATS["Q5_K"], x, **halves, **fields)


def _signed(name: str, x: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """d [n], signed scales float32 [n, 16], and codes uint8 [n, 256]."""
    plan = _SIGNED[name]
    runs, power = unit_runs(x, importance, 256, 16)
    search = SignedSearch(runs, power, nearest_integer(-plan.half, plan.half - 1), plan.limit)
    found = search.run(starting_scales(runs, plan.starts), plan.divisors, _ROUNDS)
    codes = blocks_of((found.levels + plan.half).to(torch.uint8), len(power))
    return to_half(found.d), found.scale.t(), codes


def _q3_k(x: Tensor, importance: Tensor | None) -> Tensor:
    d, scale, codes = _signed("Q3_K", x, importance)
    six = (scale + 32).to(torch.uint8)
    fields = {
        "hmask": pack_planes(codes >> 2, 32, 1),
        "qs": pack_planes(codes & 3, 32, 2),
        "scales": torch.cat([pack_planes(six & 15, 8, 4), pack_planes(six >> 4, 4, 2)], 1),
    }
    return packed_rows(FORMATS["Q3_K"], x, d=d, **fields)


def _q6_k(x: Tensor, importance: Tensor | None) -> Tensor:
    d, scale, codes = _signed("Q6_K", x, importance)
    fields = {"ql": pack_planes(codes & 15, 64, 4), "qh": pack_planes(codes >> 4, 32, 2)}
    return packed_rows(FORMATS["Q6_K"], x, d=d, scales=scale.to(torch.int8), **fields)


ENCODERS: dict[str, Encoder] = {"Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}
