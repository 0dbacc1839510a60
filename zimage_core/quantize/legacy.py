"""Encoders of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: blocks of 32 weights with one float16 scale.

Without importance the bytes are those of gguf-py and of ggml's reference code, whose scale follows from the
extreme weights alone. With importance the scale (and minimum) is searched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.quantize.blocks import (
    Encoder,
    as_half,
    pack_consecutive,
    pack_planes,
    packed_rows,
    to_half,
)
from zimage_core.quantize.scale_search import (
    blocks_of,
    centre_of,
    fit_affine,
    fit_symmetric,
    nearest_integer,
    starting_scales,
    unit_runs,
)
from zimage_core.quantize.starts import CUTS, PEAKS

Plain = Callable[[Tensor, int], tuple[Tensor, ...]]
"""(blocks [n, 32], bits) -> codes uint8 [n, 32], d, and m for formats with a minimum."""
Searched = Callable[[Tensor, int, Tensor], tuple[Tensor, ...]]
"""(weights [rows, K], bits, importance) -> codes uint8 [n, 32], d, and m for formats with a minimum."""


def inverse_of(d: Tensor) -> tuple[Tensor, Tensor]:
    """1 / d, or 0 where d is 0, and whether it is finite (1 / d of a subnormal d may not be); both like d."""
    inverse = torch.where(d == 0, 0.0, d.reciprocal())
    return inverse, inverse.isfinite()


def half_away(x: Tensor) -> Tensor:
    """Round in place, halves away from zero, as C's roundf does."""
    return x.copy_(torch.copysign(x.abs().add_(0.5).floor_(), x))


def codes_of(values: Tensor, usable: Tensor, top: int) -> Tensor:
    """Truncate to 0..top as uint8; blocks without a usable scale get 0, as ggml's conversion of NaN does."""
    if not usable.all():
        values = values.nan_to_num_(0.0).mul_(usable)
    return values.clamp_(0, top).to(torch.uint8)


def _symmetric(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n, 32] and d [n, 1]; the weight of largest magnitude becomes -half * d."""
    half = 1 << (bits - 1)
    peak = x.gather(1, x.abs().argmax(1, keepdim=True))
    d = peak / -half
    inverse, usable = inverse_of(d)
    return codes_of((x * inverse).add_(half + 0.5), usable, 2 * half - 1), d


def _affine(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, d [n, 1] and m [n, 1]; the smallest weight gets code 0, the largest one the last code."""
    top = (1 << bits) - 1
    low, high = x.aminmax(dim=1, keepdim=True)
    d = (high - low) / top
    inverse, usable = inverse_of(d)
    return codes_of((x - low).mul_(inverse).add_(0.5), usable, top), d, low


def _pack(fmt: BlockFormat, x: Tensor, codes: Tensor, d: Tensor, m: Tensor | None = None) -> Tensor:
    """Codes of 4 or 5 bits and scales -> bytes."""
    fields = {"d": to_half(d), "qs": pack_planes(codes & 15, 16, 4)}
    if m is not None:
        fields["m"] = to_half(m)
    if any(field.name == "qh" for field in fmt.fields):
        fields["qh"] = pack_consecutive(codes >> 4, 1)
    return packed_rows(fmt, x, **fields)


def _searched_symmetric(x: Tensor, bits: int, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and d with the least weighted error found."""
    half = 1 << (bits - 1)
    runs, power = unit_runs(x, importance, 32, 32)
    nearest = nearest_integer(-half, half - 1)
    d = as_half(fit_symmetric(runs, starting_scales(runs, PEAKS[bits]), nearest), power)
    levels = runs.levels(d, None, nearest) + half
    return blocks_of(levels.to(torch.uint8), len(power)), d * power


def _searched_affine(x: Tensor, bits: int, importance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, d and m with the least weighted error found."""
    top = (1 << bits) - 1
    runs, power = unit_runs(x, importance, 32, 32, centred=True)
    s, beta = fit_affine(runs, top, CUTS[bits], floor_at_zero=False)
    d = as_half(s, power)
    nearest, centre = nearest_integer(0, top), centre_of(runs)
    moments = runs.moments(runs.levels(d, beta, nearest))
    m = as_half((runs.total - d * moments.q) / runs.weight + centre, power)
    codes = runs.levels(d, m - centre, nearest)
    return blocks_of(codes.to(torch.uint8), len(power)), d * power, m * power


def _encode(
    name: str, plain: Plain, searched: Searched, bits: int, x: Tensor, importance: Tensor | None
) -> Tensor:
    found = plain(x.view(-1, 32), bits) if importance is None else searched(x, bits, importance)
    return _pack(FORMATS[name], x, *found)


def _plain_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and d; the weight of largest magnitude becomes 127 * d, the others are rounded."""
    blocks = x.view(-1, 32)
    d = blocks.abs().amax(1, keepdim=True) / 127
    inverse, usable = inverse_of(d)
    codes = half_away(blocks * inverse)
    if not usable.all():
        codes = codes.nan_to_num_(0.0).mul_(usable)
    return codes.clamp_(-127, 127).to(torch.int8), d


def _searched_bytes(x: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Codes -127..127 and d with the least weighted error found."""
    runs, power = unit_runs(x, importance, 32, 32)
    nearest = nearest_integer(-127, 127)
    d = as_half(fit_symmetric(runs, starting_scales(runs, PEAKS[8]), nearest), power)
    return blocks_of(runs.levels(d, None, nearest).to(torch.int8), len(power)), d * power


def _q8_0(x: Tensor, importance: Tensor | None) -> Tensor:
    codes, d = _plain_bytes(x) if importance is None else _searched_bytes(x, importance)
    return packed_rows(FORMATS["Q8_0"], x, d=to_half(d), qs=codes)


ENCODERS: dict[str, Encoder] = {
    "Q4_0": partial(_encode, "Q4_0", _symmetric, _searched_symmetric, 4),
    "Q4_1": partial(_encode, "Q4_1", _affine, _searched_affine, 4),
    "Q5_0": partial(_encode, "Q5_0", _symmetric, _searched_symmetric, 5),
    "Q5_1": partial(_encode, "Q5_1", _affine, _searched_affine, 5),
    "Q8_0": _q8_0,
}
