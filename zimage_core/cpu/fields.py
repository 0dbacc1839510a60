"""Access to fields of blocks, scales and tables that at least two families of formats share.

The file of a family has two functions per format. `x_header(blocks, work)` reads the scales and indices of
many blocks at once, because the cost of an operation on a few bytes per block is mostly that of the call; it
returns tensors with one row per block. `x_body(blocks, out, work, *header)` converts the weights of a tile
that fits the core's cache to float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zimage_core.cpu.tables import table
from zimage_core.cpu.workspace import Workspace

u8, i8, i16, i32, i64, f32 = torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32


def column(blocks: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """One number at byte `offset` of every block, contiguous [n]."""
    return blocks[:, offset : offset + dtype.itemsize].view(dtype)[:, 0].contiguous()


def half(blocks: Tensor, offset: int) -> Tensor:
    """The float16 at byte `offset` of every block as float32 [n, 1]."""
    return column(blocks, offset, i16).view(torch.float16).float()[:, None]


def run(blocks: Tensor, offset: int, count: int, work: Workspace) -> Tensor:
    """Bytes offset..offset+count of every block, contiguous and aligned: uint8 [n, count]."""
    return work.take(u8, len(blocks), count).copy_(blocks[:, offset : offset + count])


def floats(integers: Tensor, work: Workspace) -> Tensor:
    """Integers of any width as float32, same shape."""
    return work.take(f32, *integers.shape).copy_(integers)


def word_columns(raw: Tensor) -> tuple[Tensor, ...]:
    """Contiguous uint8 [n, 4 m] -> m contiguous int32 [n], one for every fourth byte."""
    return raw.view(i32).t().contiguous().unbind(0)


def bytes_of_columns(columns: list[Tensor], work: Workspace) -> Tensor:
    """m int32 [n] -> uint8 [n, 4 m], the inverse of `word_columns`."""
    return torch.stack(columns, 1, out=work.take(i32, len(columns[0]), len(columns))).view(u8)


def words16(raw: Tensor, work: Workspace) -> Tensor:
    """Contiguous uint8 [..., 2 m] -> its m little-endian words as int32, 0 to 65535."""
    signed = raw.view(i16)
    return work.take(i32, *signed.shape).copy_(signed).bitwise_and_(0xFFFF)


def gather(name: str, index: Tensor, container: torch.dtype, work: Workspace) -> Tensor:
    """Rows of a table by int32 index [n, m], its entries read as `container`: [n, m * width]."""
    entries = table(name, index.device)
    out = work.take(entries.dtype, index.numel())
    torch.index_select(entries, 0, index.view(-1), out=out)
    return out.view(container).view(index.shape[0], -1)


def gather_bytes(name: str, raw: Tensor, container: torch.dtype, work: Workspace) -> Tensor:
    """`gather` with bytes as indices: uint8 [n, m] -> [n, m * width]."""
    return gather(name, work.take(i32, *raw.shape).copy_(raw), container, work)


def nibbles(raw: Tensor, work: Workspace) -> tuple[Tensor, Tensor]:
    """Low and high halves of every byte, uint8 of the same shape."""
    shape = raw.shape
    low = torch.bitwise_and(raw, 15, out=work.take(u8, *shape))
    return low, torch.bitwise_right_shift(raw, 4, out=work.take(u8, *shape))


def levels(name: str, low_nibbles: Tensor, work: Workspace) -> Tensor:
    """Look up uint8 [n, 2 m] of values below 16 in a table of sixteen levels: float32 [n, 2 m].

    Two bytes make one index, because a gather of two results costs the same as a gather of one.
    """
    pairs = low_nibbles.view(i16)
    return gather(name, work.take(i32, *pairs.shape).copy_(pairs), f32, work)
