"""Encoders of formats with few levels: TQ1_0, TQ2_0, Q1_0, Q2_0, Q2_0_128, and the 4-bit floats.

Without importance TQ1_0, TQ2_0 and MXFP4 have the bytes of gguf-py and ggml, whose scale follows from the
largest weight alone. All other cases minimise the weighted error: exactly for ternary and one-bit weights,
over a range of scales for the 4-bit floats (MXFP4, NVFP4), and by search for Q2_0.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from zimage_core.cpu.tables import table
from zimage_core.formats import FORMATS
from zimage_core.quantize.blocks import Encoder, as_half, pack_consecutive, pack_planes, packed_rows, to_half
from zimage_core.quantize.legacy import half_away, inverse_of
from zimage_core.quantize.scale_search import (
    FLOOR,
    Runs,
    block_costs,
    blocks_of,
    columns,
    exponents,
    fit_symmetric,
    nearest_integer,
    padded,
    peaks,
    quadratic_gain,
    starting_scales,
    unit_runs,
)

_MXFP4_SHIFTS = (0, 1, -1)
_MXFP4_MAX = 252
"""The largest scale code for which 12, the largest level, gives a finite weight."""
_NVFP4_SHIFTS = tuple(range(-6, 5))
"""Scales that are tried, as offsets of their code from the one for which the largest weight is the largest
level."""
_NVFP4_MAX = 2688.0
"""The largest number that NVFP4 holds: 448 / 2 * 12."""


def _ternary_scale(x: Tensor, costs: Tensor) -> Tensor:
    """The best d [n] for levels -d, 0 and d; x and costs are [n, 256].

    The weights that become d or -d are those of largest magnitude, so there are 256 possible sets. The best d
    of a set is its weighted mean, and cumulative sums over the sorted magnitudes give the errors of all sets
    at once.
    """
    magnitude, order = x.abs().sort(1, descending=True)
    weight = costs.gather(1, order)
    total, mass = (magnitude * weight).cumsum(1), weight.cumsum(1)
    best = (total * total / mass).argmax(1, keepdim=True)
    return (total.gather(1, best) / mass.gather(1, best))[:, 0]


def _ternary(x: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes 0..2, uint8 [n, 256], and d [n, 1]."""
    blocks = x.view(-1, 256)
    if importance is None:
        d = blocks.abs().amax(1, keepdim=True)
    else:
        power, inverse = exponents(blocks)
        costs = block_costs(x, importance, 256)
        unit = blocks * inverse[:, None]
        scale = _ternary_scale(unit, torch.ones_like(unit) if costs is None else costs)
        d = (as_half(scale, power) * power)[:, None]
    inverse, usable = inverse_of(d)
    codes = half_away(blocks * inverse)
    if not usable.all():
        codes = codes.nan_to_num_(0.0, 0.0, 0.0)
    return codes.clamp_(-1, 1).add_(1).to(torch.uint8), d


def _tq1_0(x: Tensor, importance: Tensor | None) -> Tensor:
    """Pack five base-3 digits into a byte: the fraction digits / 243, rounded up to byte / 256."""
    codes, d = _ternary(x, importance)

    def fractions(digits: Tensor, count: int) -> Tensor:
        planes = digits.view(len(digits), count, -1).to(torch.int32)
        powers = torch.tensor([81, 27, 9, 3, 1][:count], dtype=torch.int32, device=digits.device)
        total = (planes * powers[:, None]).sum(1)
        return torch.div(total * 256 + 242, 243, rounding_mode="floor").to(torch.uint8)

    first, second, last = torch.split(codes, [160, 80, 16], 1)
    qs = torch.cat([fractions(first.contiguous(), 5), fractions(second.contiguous(), 5)], 1)
    return packed_rows(FORMATS["TQ1_0"], x, qs=qs, qh=fractions(last.contiguous(), 4), d=to_half(d))


def _tq2_0(x: Tensor, importance: Tensor | None) -> Tensor:
    codes, d = _ternary(x, importance)
    return packed_rows(FORMATS["TQ2_0"], x, qs=pack_planes(codes, 32, 2), d=to_half(d))


def _q1_0(x: Tensor, importance: Tensor | None) -> Tensor:
    """d is the weighted mean magnitude, the least squares solution for levels -d and d."""
    runs, power = unit_runs(x, importance, 128, 128)
    d = runs.moments(runs.x.sign()).qy / runs.weight
    bits = blocks_of((runs.x >= 0).to(torch.uint8), len(power))
    return packed_rows(FORMATS["Q1_0"], x, d=to_half(d * power), qs=pack_consecutive(bits, 1))


_Q2_STARTS = (2, 2.3, 1.8, 1.6, 1.4, 1.2, 1, 0.8, 0.6, -2, -1.6, -1.3, -1, -0.8, -0.6, -0.45)


def _q2_0(name: str, x: Tensor, importance: Tensor | None) -> Tensor:
    """The levels are -1, 0, 1 and 2; a negative d reverses them."""
    fmt = FORMATS[name]
    runs, power = unit_runs(x, importance, fmt.weights, fmt.weights)
    nearest = nearest_integer(-1, 2)
    d = as_half(fit_symmetric(runs, starting_scales(runs, _Q2_STARTS), nearest), power)
    codes = blocks_of((runs.levels(d, None, nearest) + 1).to(torch.uint8), len(power))
    return packed_rows(fmt, x, d=to_half(d * power), qs=pack_consecutive(codes, 2))


def nearest_e2m1(values: Tensor) -> Tensor:
    """Round magnitudes to 0, 1, 2, 3, 4, 6, 8 or 12, in place; ties go to the smaller one.

    The step between levels is half the power of two of the number, and 1 below 4.
    """
    magnitude = values.abs().clamp_(max=12)
    step = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32).mul_(0.5).clamp_(min=1)
    magnitude.div_(step).sub_(0.5).ceil_().mul_(step)
    return torch.copysign(magnitude, values, out=values)


def e2m1_codes(levels: Tensor) -> Tensor:
    """Levels of `nearest_e2m1` -> 4-bit codes: 0 to 7 by magnitude, and 8 more for negative levels."""
    magnitude = levels.abs().to(torch.uint8)
    codes = magnitude.clamp(max=4)
    for level in (6, 8, 12):
        codes += magnitude >= level
    return codes | ((levels < 0).to(torch.uint8) << 3)


def _plain_exponent(x: Tensor) -> Tensor:
    """MXFP4's code of the scale, int32 [n], before it is reduced to a byte.

    The logarithm is rounded to float32 as in ggml, so that a number just below a power of two has the code of
    that power.
    """
    peak = x.abs().amax(1)
    log = peak.double().log2().float().floor().nan_to_num_(0.0, 0.0, 0.0)
    return torch.where(peak > 0, log + 125, 0.0).to(torch.int32)


def _mxfp4(x: Tensor, importance: Tensor | None) -> Tensor:
    runs, power = unit_runs(x, importance, 32, 32)
    octave = ((power.view(torch.int32) >> 23) - 127).float()
    first = _plain_exponent(padded(x.view(-1, 32))).clamp_(max=_MXFP4_MAX)
    best, gain = first.float(), torch.full_like(power, -torch.inf)

    def scale(code: Tensor) -> Tensor:
        return torch.exp2((code - 128 - octave).clamp_(-126, 126))

    for shift in () if importance is None else _MXFP4_SHIFTS:
        tried = (first + shift).clamp_(0, _MXFP4_MAX).float()
        s = scale(tried)
        m = runs.moments(runs.levels(s, None, nearest_e2m1))
        found = quadratic_gain(m, s)
        better = (found > gain).to(found.dtype)
        best, gain = best.lerp(tried, better), torch.maximum(gain, found)
    levels = runs.levels(scale(best), None, nearest_e2m1)
    levels *= best >= 0  # a negative code wraps around in ggml to a huge scale, for which all weights are 0
    codes = blocks_of(e2m1_codes(levels), len(power))
    e = (best.to(torch.int32) & 255).to(torch.uint8)
    return packed_rows(FORMATS["MXFP4"], x, e=e, qs=pack_planes(codes, 16, 4))


def _nvfp4(x: Tensor, importance: Tensor | None) -> Tensor:
    """Encode with the best scale among the E4M3 numbers near the one that fits the largest weight."""
    blocks = padded(x.clamp(-_NVFP4_MAX, _NVFP4_MAX).view(-1, 64))
    costs = block_costs(x, importance, 64)
    runs = Runs(columns(blocks, 16), None if costs is None else columns(padded(costs).clamp_(min=FLOOR), 16))
    scales = table("ue4m3_half", x.device)[:127].contiguous()
    first = torch.bucketize(peaks(runs.x).abs() / 12, scales)
    best, gain = torch.zeros_like(runs.weight), torch.full_like(runs.weight, -torch.inf)
    for shift in _NVFP4_SHIFTS:
        tried = (first + shift).clamp_(0, 126)
        s = scales[tried]
        m = runs.moments(runs.levels(s, None, nearest_e2m1))
        found = quadratic_gain(m, s)
        better = (found > gain).to(found.dtype)
        best, gain = best.lerp(tried.float(), better), torch.maximum(gain, found)
    codes = blocks_of(e2m1_codes(runs.levels(scales[best.long()], None, nearest_e2m1)), len(blocks))
    d = blocks_of(best[None], len(blocks)).to(torch.uint8)
    return packed_rows(FORMATS["NVFP4"], x, d=d, qs=pack_planes(codes, 8, 4))


ENCODERS: dict[str, Encoder] = {
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "Q1_0": _q1_0,
    "Q2_0": partial(_q2_0, "Q2_0"),
    "Q2_0_128": partial(_q2_0, "Q2_0_128"),
}
