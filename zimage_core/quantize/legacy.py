"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: 32 weights under one float16 scale.

Without importance the bytes are those of gguf-py and of ggml's reference code: the scale follows from
the extreme weights alone. With importance the scale (and minimum) is searched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.quantize.blocks import Encoder, assemble, pack_consecutive, pack_planes, rows_of, to_half

Plain = Callable[[Tensor, int], tuple[Tensor, ...]]


def inverse_of(d: Tensor) -> tuple[Tensor, Tensor]:
    """1 / d or 0 where d is 0, and which of them are finite (1 / subnormal may not be), both like d."""
    inverse = torch.where(d == 0, 0.0, d.reciprocal())
    return inverse, inverse.isfinite()


def half_away(x: Tensor) -> Tensor:
    """Round in place, halves away from zero, as C's roundf does."""
    return x.copy_(torch.copysign(x.abs().add_(0.5).floor_(), x))


def codes_of(values: Tensor, usable: Tensor, top: int) -> Tensor:
    """Truncate to 0..top as uint8; 0 in blocks without a usable scale, as ggml's conversions happen to give."""
    if not usable.all():
        values = values.nan_to_num_(0.0).mul_(usable)
    return values.clamp_(0, top).to(torch.uint8)


def _symmetric(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The weight of largest magnitude becomes -half * d: codes uint8 [n, 32], d [n, 1]."""
    half = 1 << (bits - 1)
    peak = x.gather(1, x.abs().argmax(1, keepdim=True))
    d = peak / -half
    inverse, usable = inverse_of(d)
    return codes_of((x * inverse).add_(half + 0.5), usable, 2 * half - 1), d


def _affine(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest weight becomes 0, the largest the last code: codes, d [n, 1], m [n, 1]."""
    top = (1 << bits) - 1
    low, high = x.aminmax(dim=1, keepdim=True)
    d = (high - low) / top
    inverse, usable = inverse_of(d)
    return codes_of((x - low).mul_(inverse).add_(0.5), usable, top), d, low


def _pack(fmt: BlockFormat, codes: Tensor, d: Tensor, m: Tensor | None = None) -> Tensor:
    """Codes of 4 or 5 bits and scales -> bytes."""
    fields = {"d": to_half(d), "qs": pack_planes(codes & 15, 16, 4)}
    if m is not None:
        fields["m"] = to_half(m)
    if any(field.name == "qh" for field in fmt.fields):
        fields["qh"] = pack_consecutive(codes >> 4, 1)
    return assemble(fmt, **fields)


def _encode(name: str, plain: Plain, bits: int, x: Tensor, importance: Tensor | None) -> Tensor:
    return rows_of(_pack(FORMATS[name], *plain(x.view(-1, 32), bits)), x)


def _q8_0(x: Tensor, importance: Tensor | None) -> Tensor:
    """d = max / 127, codes rounded."""
    blocks = x.view(-1, 32)
    d = blocks.abs().amax(1, keepdim=True) / 127
    inverse, usable = inverse_of(d)
    codes = half_away(blocks * inverse)
    if not usable.all():
        codes = codes.nan_to_num_(0.0).mul_(usable)
    codes = codes.clamp_(-127, 127).to(torch.int8)
    return rows_of(assemble(FORMATS["Q8_0"], d=to_half(d), qs=codes), x)


ENCODERS: dict[str, Encoder] = {
    "Q4_0": partial(_encode, "Q4_0", _symmetric, 4),
    "Q4_1": partial(_encode, "Q4_1", _affine, 4),
    "Q5_0": partial(_encode, "Q5_0", _symmetric, 5),
    "Q5_1": partial(_encode, "Q5_1", _affine, 5),
    "Q8_0": _q8_0,
}
