"""Lookup tables whose entries hold several weights, built from the codebooks on first use.

A gather of eight bytes costs the same as a gather of one, so an entry holds all the weights that one index
decides, as a single number: an int64 entry is eight int8 weights, a float64 entry is two float32 weights (its
bits are moved, never computed with).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from zimage_core.codebooks import codebook


def _grid(name: str) -> Tensor:
    """Codebook as int8 [entries, width]."""
    book = codebook(name)
    return torch.frombuffer(bytearray(book.values), dtype=torch.int8).view(book.shape)


def _signs(count: int, width: int) -> Tensor:
    """int8 [count, width]: -1 where bit j of the row number is set, else 1."""
    bits = torch.arange(count)[:, None] >> torch.arange(width) & 1
    return (1 - 2 * bits).to(torch.int8)


def _parity_signs() -> Tensor:
    """int8 [128, 8]: seven sign bits and, as the eighth, their parity (the number of minuses is even)."""
    index = torch.arange(128)
    parity = (index[:, None] >> torch.arange(7) & 1).sum(1) & 1
    return _signs(256, 8)[index | parity << 7]


def _fields(count: int, shifts: list[int], mask: int, up: int) -> Tensor:
    """int16 [count, len(shifts)]: fields of the row number, each moved up by `up` bits."""
    return ((torch.arange(count)[:, None] >> torch.tensor(shifts) & mask) << up).short()


def _pack(values: Tensor, container: torch.dtype) -> Tensor:
    """[entries, width] -> [entries] of one number as wide as a row."""
    return values.contiguous().view(container).flatten()


@cache
def _build(name: str) -> Tensor:
    match name:
        case "bits_pm":  # byte -> 8 x int8, 2 * bit - 1
            return _pack(-_signs(256, 8), torch.int64)
        case "bits_high0":  # byte -> 8 x int8, 16 where the bit is set, else 0
            return _pack((1 - _signs(256, 8)) * 8, torch.int64)
        case "bits_high16":  # byte -> 8 x int8, 0 where the bit is set, else -16
            return _pack((1 - _signs(256, 8)) * 8 - 16, torch.int64)
        case "two_bit":  # byte -> its four 2-bit fields less 1, 4 x int8
            return _pack(_fields(256, [0, 2, 4, 6], 3, 0).to(torch.int8) - 1, torch.int32)
        case "iq4_nl" | "e2m1":  # two nibbles in the low halves of two bytes -> 2 x float32
            level = _grid(name).flatten().float()
            index = torch.arange(0x0F10)
            return _pack(torch.stack((level[index & 15], level[index >> 8 & 15]), 1), torch.float64)
        case "iq2_xxs":  # grid | sign7 << 8 -> 8 x int8
            return _pack((_grid(name)[None] * _parity_signs()[:, None]).flatten(0, 1), torch.int64)
        case "iq2_xs":  # the file's own word: grid | sign7 << 9
            return _pack((_grid(name)[None] * _parity_signs()[:, None]).flatten(0, 1), torch.int64)
        case "iq2_s":  # grid of 10 bits -> 8 x int8
            return _pack(_grid(name), torch.int64)
        case "signs8":  # byte -> 8 x int8, +1 or -1
            return _pack(_signs(256, 8), torch.int64)
        case "iq3_xxs":  # grid | sign4 << 8 -> 4 x int8
            return _pack((_grid(name)[None] * _signs(16, 4)[:, None]).flatten(0, 1), torch.int32)
        case "iq3_s":  # grid of 9 bits | sign4 << 9 -> 4 x int8
            return _pack((_grid(name)[None] * _signs(16, 4)[:, None]).flatten(0, 1), torch.int32)
        case "iq1":  # grid of 11 bits | sign of delta << 11 -> 8 x int8, in eighths
            eighths = 8 * _grid(name)
            return _pack(torch.cat((eighths + 1, eighths - 1)), torch.int64)
        case "iq1_s_high":  # 3 x 4 bits | sign << 12 -> what to add to 4 indices: bits << 8 | sign << 11
            triples = _fields(1 << 13, [0, 3, 6, 9], 7, 8)
            return _pack(triples | _fields(1 << 13, [12], 1, 11), torch.int64)
        case "nibbles_8":  # byte -> two nibbles << 8, 2 x int16
            return _pack(_fields(256, [0, 4], 15, 8), torch.int32)
        case "nibbles_9":
            return _pack(_fields(256, [0, 4], 15, 9), torch.int32)
        case "two_bit_8":  # byte -> four 2-bit fields << 8, 4 x int16
            return _pack(_fields(256, [0, 2, 4, 6], 3, 8), torch.int64)
        case "bits_8":  # byte -> eight bits << 8, 8 x int16
            return _pack(_fields(256, [*range(8)], 1, 8), torch.complex128)
        case "sign14_7":  # two 7-bit sign indices -> each << 8, 2 x int16
            return _pack(_fields(1 << 14, [0, 7], 127, 8), torch.int32)
        case "sign14_4":  # two 7-bit sign indices -> four nibbles of signs << 8, parity included, 4 x int16
            index = torch.arange(128)
            full = index | ((index[:, None] >> torch.arange(7) & 1).sum(1) & 1) << 7
            pair = torch.stack((full & 15, full >> 4), 1)
            both = torch.cat((pair.repeat(128, 1), pair.repeat_interleave(128, 0)), 1)
            return _pack((both << 8).short(), torch.int64)
        case "e8m0_half":  # exponent byte -> 2^(e - 128); 0 and 1 are subnormal float32
            code = torch.arange(256)
            pattern = torch.where(code < 2, 0x00200000 << code.clamp(max=1), (code - 1).clamp(min=0) << 23)
            return pattern.to(torch.int32).view(torch.float32)
        case "ue4m3_half":  # unsigned E4M3 with bias 7, halved; 0 and 0x7F are zero, the top bit is ignored
            code = torch.arange(256)
            exponent, mantissa = (code >> 3 & 15).float(), (code & 7).float()
            normal = (1 + mantissa / 8) * torch.exp2(exponent - 7)
            value = torch.where(exponent == 0, mantissa * 2.0**-9, normal)
            return torch.where((code == 0) | (code == 0x7F), 0.0, value * 0.5)
        case "F8_E4M3" | "F8_E5M2":  # two bytes -> 2 x float32
            kind = torch.float8_e4m3fn if name == "F8_E4M3" else torch.float8_e5m2
            value = torch.arange(256).to(torch.uint8).view(kind).float()
            index = torch.arange(1 << 16)
            return _pack(torch.stack((value[index & 255], value[index >> 8]), 1), torch.float64)
    raise KeyError(name)


@cache
def table(name: str, device: torch.device) -> Tensor:
    """The table [entries] of that name on `device`, cached; `_build` describes the tables."""
    with torch.inference_mode(False):  # the table is used after the caller's mode ends
        return _build(name).to(device)
