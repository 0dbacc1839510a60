"""Launch parameters: weights per program, rows and columns of a tile, warps, stages."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

DEQUANTIZE_WARPS = 4
REPACK_WARPS = 4
ORDER = 8
"""Tiles along N that run side by side and share a tile of x."""
SPLITS = 16
"""Most programs along K."""
TABLE = Path(__file__).parent / "tiles.json"
"""File of the tiles: written from the analysis in docs/explanation/kernels.md, then by `python -m benchmarks.tune`."""


@dataclass(frozen=True)
class Tile:
    """A tile of BM rows of x by BN rows of W, with `splits` programs along K."""

    bm: int
    bn: int
    warps: int
    stages: int
    splits: int = 1


@dataclass(frozen=True)
class Int8Tile:
    """A tile of BM rows of x by BN rows of W in int8, `dots` products over BK numbers of a row each step.

    Args:
        bm: Rows of x.
        bn: Rows of W.
        bk: Numbers of a row in one product.
        dots: Products in a step. Before Blackwell, Triton takes a product over more than 32 int8 numbers apart
            into bytes to fetch the next one ahead (264 instructions a step); several products over 32 cost none.
        warps: Warps of a program.
        stages: Steps that are loaded ahead.
        rate: Assumed speed, relative to the quickest tile of the architecture, where all multiprocessors work.
    """

    bm: int
    bn: int
    bk: int
    dots: int
    warps: int
    stages: int
    rate: float


@cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, where every program takes about a millisecond."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def dequantize_weights() -> int:
    """Weights per program: 16 for each of 128 threads, so that stores are 128 bits wide."""
    return 1 << 16 if interpreted() else 2048


def repack_weights() -> int:
    """Weights per program of the repacking kernel."""
    return 1 << 16 if interpreted() else 2048


def sum_elements() -> int:
    """Elements per program of the kernel that adds partial sums."""
    return 1 << 16 if interpreted() else 1024


@cache
def _table() -> dict[str, list[dict[str, int]]]:
    found: dict[str, list[dict[str, int]]] = json.loads(TABLE.read_text("utf-8"))
    return found


@cache
def architecture(device: torch.device) -> tuple[str, int]:
    """("sm_90", multiprocessors) of a GPU, ("gfx942", ...) on AMD; ("cpu", 1) of a CPU."""
    if device.type != "cuda":
        return "cpu", 1
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def _entries(arch: str, kernel: str = "") -> list[dict[str, int]]:
    """Entries of a kernel's table for an architecture, or for its nearest relative.

    An NVIDIA GPU without entries uses those of an older one of its generation: sm_121 those of sm_120. AMD GPUs
    without entries use those of another AMD GPU, because AMD's compiler fails with NVIDIA's stages.
    """
    table = _table()
    relative = "gfx942" if arch.startswith("gfx9") else "gfx1100" if arch.startswith("gfx") else "default"
    if arch.startswith("sm_"):
        known = [key.removeprefix(kernel) for key in table if key.startswith(kernel)]
        relative = max((key for key in known if key[:-1] == arch[:-1] and key <= arch), default=relative)
    return table.get(kernel + arch) or table[kernel + relative]


def matmul_tile(count: int, arch: str) -> Tile:
    """The tile of the fused kernel for `count` rows of x: the first entry of the table that is tall enough."""
    entries = _entries(arch)
    entry = next((e for e in entries if count <= e["rows"]), entries[-1])
    return Tile(entry["bm"], entry["bn"], entry["warps"], entry["stages"])


def int8_tiles(arch: str) -> list[Int8Tile]:
    """The tiles of the int8 product on an architecture."""
    return [Int8Tile(**entry) for entry in _entries(arch, "int8 ")]


def attention_tile(arch: str) -> Tile:
    """The tile of attention by int8: BM queries by BN keys of a head."""
    return Tile(**_entries(arch, "attention ")[0])


def attention(device: torch.device) -> Tile:
    """The tile of attention by int8 on a device."""
    return attention_tile(architecture(device)[0])


@cache
def int8_tile(count: int, rows: int, arch: str, processors: int) -> Int8Tile:
    """The tile of the int8 product with which x [count, K] and W [rows, K] take the fewest rounds of programs."""

    def seconds(tile: Int8Tile) -> float:
        programs = -(-count // tile.bm) * -(-rows // tile.bn)
        return -(-programs // processors) * tile.bm * tile.bn / tile.rate

    return min(int8_tiles(arch), key=seconds)


def int8(count: int, rows: int, device: torch.device) -> Int8Tile:
    """Tile of x [count, K] and W [rows, K]."""
    return int8_tile(count, rows, *architecture(device))


def matmul(count: int, rows: int, width: int, device: torch.device) -> Tile:
    """Tile and splits for x [count, width] and W [rows, width].

    Splits double until every multiprocessor has two programs, as long as each has 512 weights of a row or more.
    """
    arch, processors = architecture(device)
    tile = matmul_tile(count, arch)
    programs = -(-count // tile.bm) * -(-rows // tile.bn)
    splits = 1
    while splits < SPLITS and programs * splits < 2 * processors and width >= 1024 * splits:
        splits *= 2
    return Tile(tile.bm, tile.bn, tile.warps, tile.stages, splits)
