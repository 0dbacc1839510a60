"""Packed test weights: random blocks of any format, and the simplest quantisers.

Only tests and benchmarks need these. For real files use a quantiser that minimises the error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from zimage_core.errors import BadShape, Unsupported
from zimage_core.formats import BlockFormat, by_name
from zimage_core.reference.blocks import Blocks, Bytes, Floats, as_blocks, block_dtype
from zimage_core.reference.dequantize import DEQUANTIZERS

# (format, field) -> mask, for fields that hold an exponent and are not typed as floats. The masked bits make
# every byte pattern a finite number below 2; finite_scales clears the same bit in fields of type float.
_KEEP: dict[tuple[str, str], int | tuple[int, ...]] = {
    ("BF16", "w"): 0xBFFF,
    ("F8_E4M3", "w"): 0xBF,
    ("F8_E5M2", "w"): 0xBF,
    ("IQ1_M", "scales"): (0xFFFF, 0xFFFF, 0xFFFF, 0xBFFF),
    ("MXFP4", "e"): 0x7F,
}
_FLOAT_KEEP = {"f2": 0xBFFF, "f4": 0xBFFFFFFF, "f8": 0xBFFFFFFFFFFFFFFF}


def finite_scales(packed: Bytes, fmt: BlockFormat) -> Bytes:
    """A copy of the blocks in which the top exponent bit of every float is cleared.

    Zeros, subnormals and both signs remain. All scales are finite and below 2, so that no comparison of
    weights passes because of NaN, and products do not overflow.
    """
    blocks = as_blocks(packed.copy(), fmt)
    for field in fmt.fields:
        keep = _KEEP.get((fmt.name, field.name), _FLOAT_KEEP.get(field.code))
        if keep is not None:
            bits = blocks[field.name].view(f"<u{field.code[1:]}")
            bits &= np.array(keep, bits.dtype)
    return blocks.view(np.uint8).reshape(packed.shape)


def random_blocks(
    fmt: BlockFormat | str, shape: tuple[int, ...], rng: np.random.Generator, std: float = 0.02
) -> Bytes:
    """Random valid weights: uniform bytes with scales that give mean 0 and the wanted standard deviation.

    The scale varies from block to block by about a quarter, as in a trained network, and has either sign if
    there is no minimum. Every weight is finite. The deviation is met within 10 per cent on some hundred
    blocks (NVFP4, whose scales end at 2^-9, is coarser below 0.02); integers get a deviation of at least 16.

    Args:
        fmt: A format or its name.
        shape: Logical shape; the last axis is a whole number of blocks.
        rng: Source of all randomness.
        std: Standard deviation of the weights.

    Returns:
        uint8 [*shape[:-1], row bytes].

    Raises:
        BadShape: The last axis is not a whole number of blocks.
    """
    fmt = fmt if isinstance(fmt, BlockFormat) else by_name(fmt)
    if not shape:
        raise BadShape("random_blocks needs a shape with at least one axis, found ()")
    row_bytes = fmt.row_bytes(shape[-1])
    if fmt.weights == 1:
        std = max(std, 16.0) if fmt.is_integer else std
        return encode((rng.standard_normal(shape) * std).astype(np.float32), fmt)
    # bytes() is ten times as fast as integers(), and the full-size models need gigabytes
    count = int(np.prod(shape[:-1], dtype=np.int64)) * row_bytes
    packed = np.frombuffer(bytearray(rng.bytes(count)), np.uint8).reshape(*shape[:-1], row_bytes)
    blocks = as_blocks(packed, fmt)
    unit, shift = _unit_statistics(fmt)
    jitter = np.exp(0.25 * rng.standard_normal(blocks.shape, dtype=np.float32) - 0.0625)  # E[j^2] = 1
    if shift == 0 and fmt.name not in ("MXFP4", "NVFP4"):
        jitter *= rng.choice(np.array([-1, 1], np.float32), blocks.shape)
    _set_scale(blocks, fmt, np.float32(std / unit) * jitter, shift)
    return packed


def _set_scale(blocks: Blocks, fmt: BlockFormat, d: Floats, shift: float) -> None:
    """Write the scale d [...] of each block in place, and the minimum `shift * d` if there is one."""
    if fmt.name == "IQ1_M":  # the top nibble of each word holds a quarter of the float16
        bits = d.astype(np.float16).view(np.uint16)[..., None] >> np.array([0, 4, 8, 12], np.uint16)
        blocks["scales"] = (blocks["scales"] & 0x0FFF) | (bits << 12)
    elif fmt.name == "MXFP4":
        blocks["e"] = np.clip(np.rint(np.log2(d)) + 128, 0, 254).astype(np.uint8)[..., None]
    elif fmt.name == "NVFP4":
        blocks["d"] = _to_f8_e4m3(np.minimum(2 * d, 448))[..., None]
    else:
        blocks["d"] = d.astype(np.float16)[..., None]
        for name in ("m", "dmin"):
            if any(field.name == name for field in fmt.fields):
                blocks[name] = (shift * d).astype(np.float16)[..., None]


@cache
def _unit_statistics(fmt: BlockFormat) -> tuple[float, float]:
    """(root mean square of random weights at d = 1, the minimum that centres them at d = 1)."""
    rng = np.random.default_rng(0)
    packed = np.frombuffer(bytearray(rng.bytes(4096 * fmt.nbytes)), np.uint8)
    blocks = as_blocks(packed, fmt)
    one = np.ones(4096, np.float32)

    def weights(shift: float) -> NDArray[np.float64]:
        _set_scale(blocks, fmt, one, shift)
        return DEQUANTIZERS[fmt.name](blocks).astype(np.float64)

    # weights are linear in the minimum, so two points give the minimum for which the mean is 0
    base, slope = weights(0).mean(), weights(1).mean() - weights(0).mean()
    shift = 0.0 if slope == 0 else float(-base / slope)
    return float(np.sqrt(np.mean(weights(shift) ** 2))), shift


def encode(weights: Floats, fmt: BlockFormat | str) -> Bytes:
    """Quantise by the simplest rule of the format: float32 [..., K] -> uint8 [..., row bytes].

    It supports plain numbers, Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0, with the rounding of ggml's reference code.

    Raises:
        BadShape: K is not a whole number of blocks.
        Unsupported: The format has no quantiser here; random_blocks makes weights of any format.
    """
    fmt = fmt if isinstance(fmt, BlockFormat) else by_name(fmt)
    encoder = ENCODERS.get(fmt.name)
    if encoder is None:
        raise Unsupported(
            f"no simple quantiser for {fmt.name}; use one of {', '.join(ENCODERS)}, or random_blocks"
        )
    if weights.ndim == 0:
        raise BadShape(f"{fmt.name}: weights need at least one axis, found a scalar")
    row_bytes = fmt.row_bytes(weights.shape[-1])
    x = np.ascontiguousarray(weights, np.float32).reshape(-1, fmt.weights)
    blocks = np.zeros(len(x), block_dtype(fmt))
    with np.errstate(all="ignore"):
        encoder(blocks, x)
    return blocks.view(np.uint8).reshape(*weights.shape[:-1], row_bytes)


def _number(blocks: Blocks, x: Floats) -> None:
    blocks["w"] = x


def _integer(blocks: Blocks, x: Floats) -> None:
    limits = np.iinfo(blocks["w"].dtype)
    top = min(limits.max, 2**63 - 1024)  # the largest int64 that is also a float64
    blocks["w"] = np.clip(np.rint(x.astype(np.float64)), limits.min, top)


def _bf16(blocks: Blocks, x: Floats) -> None:
    """Round to nearest even on the upper 16 bits; NaN stays NaN."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    blocks["w"] = np.where(np.isnan(x), (bits >> 16) | 64, rounded)


def _to_f8_e4m3(x: Floats) -> Bytes:
    """Nearest F8_E4M3 code, ties to even, saturating at 448."""
    magnitude = np.minimum(np.abs(x.astype(np.float64)), 448)
    exponent = np.maximum(np.floor(np.log2(np.maximum(magnitude, 2.0**-30))), -6)
    steps = np.rint(magnitude / np.exp2(exponent - 3))  # 8..16 for normal numbers, 0..8 below them
    code = (exponent + 6) * 8 + steps  # a carry of the mantissa moves into the exponent by itself
    signed: Bytes = code.astype(np.uint8) | (np.signbit(x).astype(np.uint8) << 7)
    return signed


def _f8_e4m3(blocks: Blocks, x: Floats) -> None:
    blocks["w"] = np.where(np.isnan(x), np.uint8(0x7F), _to_f8_e4m3(np.nan_to_num(x)))


def _f8_e5m2(blocks: Blocks, x: Floats) -> None:
    """Round the float16 to its upper byte, to nearest even."""
    bits = x.astype(np.float16).view(np.uint16).astype(np.uint32)
    blocks["w"] = np.where(np.isnan(x), np.uint32(0x7F), (bits + 0x7F + (bits >> 8 & 1)) >> 8)


def _pack_four_bits(blocks: Blocks, q: Bytes) -> None:
    blocks["qs"] = (q[:, :16] & 15) | (q[:, 16:] << 4)


def _pack_fifth_bit(blocks: Blocks, q: Bytes) -> None:
    blocks["qh"] = np.packbits(q >> 4, axis=-1, bitorder="little")


def _symmetric(blocks: Blocks, x: Floats, half: int) -> Bytes:
    """The weight of largest magnitude becomes -half * d; q in 0..2 * half - 1."""
    peak = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    d = peak / np.float32(-half)
    blocks["d"] = d
    inverse = np.where(d == 0, np.float32(0), 1 / d)
    q: Bytes = np.clip((x * inverse + np.float32(half + 0.5)).astype(np.int32), 0, 2 * half - 1).astype(
        np.uint8
    )
    return q


def _affine(blocks: Blocks, x: Floats, top: int) -> Bytes:
    """The smallest weight becomes 0, the largest `top`."""
    low = x.min(axis=1, keepdims=True)
    d = (x.max(axis=1, keepdims=True) - low) / np.float32(top)
    blocks["d"], blocks["m"] = d, low
    inverse = np.where(d == 0, np.float32(0), 1 / d)
    q: Bytes = np.clip(((x - low) * inverse + np.float32(0.5)).astype(np.int32), 0, top).astype(np.uint8)
    return q


def _q4_0(blocks: Blocks, x: Floats) -> None:
    _pack_four_bits(blocks, _symmetric(blocks, x, 8))


def _q4_1(blocks: Blocks, x: Floats) -> None:
    _pack_four_bits(blocks, _affine(blocks, x, 15))


def _q5_0(blocks: Blocks, x: Floats) -> None:
    q = _symmetric(blocks, x, 16)
    _pack_four_bits(blocks, q)
    _pack_fifth_bit(blocks, q)


def _q5_1(blocks: Blocks, x: Floats) -> None:
    q = _affine(blocks, x, 31)
    _pack_four_bits(blocks, q)
    _pack_fifth_bit(blocks, q)


def _q8_0(blocks: Blocks, x: Floats) -> None:
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    blocks["d"] = d
    scaled = x * np.where(d == 0, np.float32(0), 1 / d)
    blocks["qs"] = np.copysign(np.floor(np.abs(scaled) + np.float32(0.5)), scaled)  # halves away from zero


ENCODERS: dict[str, Callable[[Blocks, Floats], None]] = {
    "F32": _number,
    "F16": _number,
    "F64": _number,
    "BF16": _bf16,
    "I8": _integer,
    "I16": _integer,
    "I32": _integer,
    "I64": _integer,
    "F8_E4M3": _f8_e4m3,
    "F8_E5M2": _f8_e5m2,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
}
