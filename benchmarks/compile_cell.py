"""One cell of the compile matrix: a kernel, format, dtype and tile for one GPU, compiled and measured.

A cell is compiled as a launch would compile it: the host function runs on tensors without storage, its launch
is caught, and Triton's own binder turns the arguments into types, hints and options.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from zimage_core.formats import FORMATS
from zimage_core.kernels import attention_int8, elementwise, int8, int8_steps, tiles
from zimage_core.kernels.decode.table import DECODERS
from zimage_core.kernels.dequantize import dequantize_into
from zimage_core.kernels.matmul import matmul
from zimage_core.kernels.planar import Planes, plane_shapes, repack, step_weights
from zimage_core.quant.dispatch import int8_product

TARGETS = (
    "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100", "gfx1201",
)  # fmt: skip
NO_TENSOR_CORES = ("sm_75",)
"""Triton emits none there: such cards dequantise and leave the product to cuBLAS."""
SHARED = {
    "sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99,
    "gfx942": 64, "gfx1100": 64, "gfx1201": 64,
}  # fmt: skip
"""KB that one program may have: the CUDA programming guide's table of compute capabilities; LDS on AMD."""
HALVES = ("float16", "bfloat16")
ROWS, WIDTH = 3840, 10240  # the second feed-forward weight: the widest rows, so up to 16 splits
TOKENS, HEADS, HEAD = 4096, 30, 128
FEW, MANY = 1, 1 << 20
"""Multiprocessors of a card that never splits the sum over K, and of one that always does."""


class Cell(NamedTuple):
    """What is compiled. `tile` names the launch's sizes; fields that a kernel lacks are empty."""

    kernel: str
    format: str
    dtype: str
    tile: str
    target: str


@dataclass
class Row:
    """What came of a cell; for AMD, registers are vector registers and spills those of either kind."""

    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    tensor_core: int = 0
    instructions: int = 0
    loop: int = 0
    per_weight: float = 0.0
    failure: str = ""


FIELDS = [*Cell._fields, *Row.__dataclass_fields__, "triton"]
ELEMENTWISE = {
    "rms_norm_modulate": ("", "no scale"),
    "gate_norm_residual": ("", "no gate"),
    "qk_norm_rope": ("",),
    "silu_gate": ("",),
}
INT8 = {
    "quantize": ("3840", "3840 rotated", "10240 rotated"),
    "rms_norm_modulate_int8": ("3840", "3840 no scale"),
    "silu_gate_int8": ("10240 rotated",),
}
"""Kernels of rows that are quantised -> numbers of a row, and whether it is rotated."""
WIDEST = "10240 rotated"
"""Row of w2 as packed weights are quantised, which takes the most registers."""
USUAL = ("Q3_K", "Q4_K", "Q6_K", "Q8_0")
FEW_TARGETS = ("sm_80", "sm_90", "gfx942")
"""Where all other formats are quantised, too: one decodes as another on the rest."""
ATTENTION = ("sum_keys", "quantize_heads", "attend")
KERNELS = (
    "dequantize",
    "repack",
    "matmul",
    "sum",
    *ELEMENTWISE,
    *INT8,
    "requantize",
    "int8_matmul",
    "rescale",
    *ATTENTION,
)
PRODUCTS = ("matmul", "int8_matmul", "attend")
ATTENDED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
"""Where attention by int8 is compiled. It is used on GeForce alone; see `quant.dispatch.INT8_ATTENTION`."""
INTEGER_PRODUCT = re.compile(r"IGMMA|IMMA|v_mfma_i32\w*|v_wmma_i32\w*")
"""Tensor-core instructions of int8: wgmma and mma of NVIDIA, matrix cores of AMD."""
HOPPER = "IGMMA"


def tiles_of(target: str) -> dict[str, tuple[int, tiles.Tile]]:
    """Name -> (rows of x that lead to it, tile) of every tile of tiles.json for a target."""
    table = json.loads(tiles.TABLE.read_text("utf-8"))
    found: dict[str, tuple[int, tiles.Tile]] = {}
    count = 16
    for entry in table.get(target, table["default"]):
        tile = tiles.matmul_tile(count, target)
        found.setdefault(tile_name(tile), (count, tile))
        count = entry["rows"] // 16 * 16 + 16
    return found


def tile_name(tile: tiles.Tile) -> str:
    """A tile in a cell."""
    return f"{tile.bm}x{tile.bn} w{tile.warps} s{tile.stages}"


def int8_tiles_of(target: str) -> dict[str, tiles.Int8Tile]:
    """Name -> tile of the int8 product on a target; each also for rows that its steps do not divide."""
    found = {}
    for tile in tiles.int8_tiles(target):
        found[f"{tile.bm}x{tile.bn}x{tile.bk} d{tile.dots} w{tile.warps} s{tile.stages}"] = tile
    return found


def planar_formats() -> list[str]:
    """Formats that the fused kernel takes."""
    return [name for name, decoder in DECODERS.items() if decoder.bits]


def cells() -> Iterator[Cell]:
    """The whole matrix."""
    for target in TARGETS:
        for name in DECODERS:
            for dtype in ("float32", *HALVES):
                yield Cell("dequantize", name, dtype, "", target)
        dtypes = ("float16", "float32") if target in NO_TENSOR_CORES else HALVES
        for kernel, variants in ELEMENTWISE.items():
            for variant in variants:
                for dtype in dtypes:
                    yield Cell(kernel, "", dtype, variant, target)
        yield from int8_cells(target)
        if target in NO_TENSOR_CORES:
            continue
        every = tiles_of(target)
        smallest = min(every, key=lambda tile: every[tile][1].bm * every[tile][1].bn)
        for dtype in HALVES:
            yield Cell("sum", "", dtype, "", target)
        for name in planar_formats():
            yield Cell("repack", name, "", "", target)
            for dtype in HALVES:
                for tile in (*every, f"{smallest} split"):
                    yield Cell("matmul", name, dtype, tile, target)


def int8_cells(target: str) -> Iterator[Cell]:
    """Cells of the int8 kernels; the dtype of activations is that of a load and a store, so one is enough."""
    dtype = "float16" if target in NO_TENSOR_CORES else "bfloat16"
    for kernel, variants in INT8.items():
        for variant in variants:
            yield Cell(kernel, "", dtype, variant, target)
    for name in DECODERS:
        if name in USUAL or target in FEW_TARGETS:
            yield Cell("requantize", name, "", WIDEST, target)
        if name in USUAL:
            yield Cell("requantize", name, "", "3840", target)
    if int8_product(target) == "torch":
        yield Cell("rescale", "", dtype, "", target)
        return
    tile = ""
    for tile in int8_tiles_of(target):
        yield Cell("int8_matmul", "", dtype, tile, target)
    yield Cell("int8_matmul", "", dtype, f"{tile} odd", target)
    if target in ATTENDED:
        for kernel in ("sum_keys", "quantize_heads"):
            yield Cell(kernel, "", dtype, str(HEAD), target)
        tile = tile_name(tiles.attention_tile(target))
        for size in attention_int8.HEADS:
            yield Cell("attend", "", dtype, f"{size} {tile}", target)
        yield Cell("attend", "", "float16", f"{HEAD} {tile}", target)


def name(cell: Cell) -> str:
    """A cell in one line."""
    return " ".join(filter(None, cell))


def judge(cell: Cell, row: Row) -> list[str]:
    """What is wrong with a cell, each fault a few words."""
    if row.failure:
        return [row.failure]
    faults = []
    if row.stack:
        faults.append(f"{row.stack} bytes of stack")
    if row.spills:
        faults.append(f"{row.spills} spills")
    if row.shared > SHARED[cell.target] * 1024:
        faults.append(f"{row.shared / 1024:.0f} KB of shared memory, {cell.target} has {SHARED[cell.target]}")
    if cell.kernel in PRODUCTS and not row.tensor_core:
        faults.append("no tensor-core instruction")
    if cell.kernel in PRODUCTS and cell.target in NO_TENSOR_CORES:
        faults.append(f"a fused product on {cell.target}")
    return faults


# A launch, caught.


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without storage, whose address is a multiple of 16, as an allocator's are."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(cell: Cell) -> None:
    """Call the host function of a cell's kernel."""
    dtype = getattr(torch, cell.dtype) if cell.dtype else torch.float16
    row = empty(ROWS, dtype=dtype)
    if cell.kernel in ("dequantize", "repack"):
        fmt = FORMATS[cell.format]
        packed = empty(ROWS, WIDTH // fmt.weights * fmt.nbytes, dtype=torch.uint8)
        if cell.kernel == "repack":
            repack(packed, fmt)
        else:
            dequantize_into(empty(ROWS, WIDTH, dtype=dtype), packed, fmt)
    elif cell.kernel in ("matmul", "sum"):
        fmt = FORMATS[cell.format or "Q8_0"]
        shapes = plane_shapes(fmt, ROWS, WIDTH)
        planes = Planes(**{name: empty(*shape, dtype=kind) for name, (shape, kind) in shapes.items()})
        count = tiles_of(cell.target)[cell.tile.removesuffix(" split")][0] if cell.tile else 16
        splits = cell.kernel == "sum" or cell.tile.endswith(" split")
        arch = (cell.target, MANY if splits else FEW)
        with patch.object(tiles, "architecture", lambda device: arch):
            matmul(empty(count, WIDTH, dtype=dtype), planes, fmt, ROWS, row if cell.kernel == "sum" else None)
    elif cell.kernel in (*INT8, "requantize", "int8_matmul", "rescale"):
        launch_int8(cell, dtype)
    elif cell.kernel in ATTENTION:
        x = empty(1, TOKENS, HEADS, int(cell.tile.split()[0]), dtype=dtype)
        with patch.object(tiles, "attention", lambda device: tiles.attention_tile(cell.target)):
            attention_int8.attention(x, x, x)
    elif cell.kernel in ("rms_norm_modulate", "gate_norm_residual"):
        x = empty(TOKENS, ROWS, dtype=dtype)
        factor = None if cell.tile else empty(ROWS, dtype=torch.float32)
        if cell.kernel == "rms_norm_modulate":
            elementwise.rms_norm_modulate(x, row, 1e-5, factor)
        else:
            elementwise.gate_norm_residual(x, x, row, 1e-5, factor, 1.0)
    elif cell.kernel == "qk_norm_rope":
        q = empty(1, TOKENS, HEADS, HEAD, dtype=dtype)
        angles = empty(TOKENS, HEAD // 2, dtype=torch.float32)
        weight = empty(HEAD, dtype=dtype)
        elementwise.qk_norm_rope(q, q, weight, weight, 1e-5, angles, angles)
    else:
        gate = empty(TOKENS, WIDTH, dtype=dtype)
        elementwise.silu_gate(gate, gate, 1.0)


def launch_int8(cell: Cell, dtype: torch.dtype) -> None:
    """Call the host function of an int8 kernel."""
    if cell.kernel == "int8_matmul":
        tile = int8_tiles_of(cell.target)[cell.tile.removesuffix(" odd")]
        width = WIDTH - 16 if cell.tile.endswith("odd") else WIDTH
        x, w = empty(TOKENS, width, dtype=torch.int8), empty(ROWS, width, dtype=torch.int8)
        scales = (empty(n, dtype=torch.float32) for n in (TOKENS, ROWS))
        with patch.object(tiles, "int8", lambda *_: tile):
            int8.matmul(x, next(scales), w, next(scales), None, dtype)
        return
    if cell.kernel == "rescale":
        sums, scales = empty(TOKENS, ROWS, dtype=torch.int32), empty(TOKENS, dtype=torch.float32)
        factors = empty(ROWS, dtype=torch.float32)
        int8.rescale_into(empty(TOKENS, ROWS, dtype=dtype), sums, scales, factors, None)
        return
    size, group = int(cell.tile.split()[0]), 256 if cell.tile.endswith("rotated") else 0
    x, row = empty(TOKENS, size, dtype=dtype), empty(size, dtype=dtype)
    if cell.kernel == "quantize":
        int8.quantize_rows(x, group)
    elif cell.kernel == "requantize":
        fmt = FORMATS[cell.format]
        packed = empty(ROWS, size // fmt.weights * fmt.nbytes, dtype=torch.uint8)
        q, scale = empty(ROWS, size, dtype=torch.int8), empty(ROWS, dtype=torch.float32)
        int8.requantize_into(q, scale, packed, fmt, group)
    elif cell.kernel == "silu_gate_int8":
        int8_steps.silu_gate(x, x, 1.0, group)
    else:
        scale = None if cell.tile.endswith("no scale") else empty(size, dtype=torch.float32)
        int8_steps.rms_norm_modulate(x, row, 1e-5, scale, group)


def caught(cell: Cell) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The kernel that the host function launches for a cell, its arguments and its options."""
    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        seen.append((kernel, args, options))

    with patch.object(JITFunction, "run", run):
        launch(cell)
    wanted = f"_{cell.kernel}_kernel"
    return next(found for found in seen if found[0].__name__ == wanted)


def gpu(target: str) -> GPUTarget:
    """A name of ours as Triton's."""
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target[3:]), 32)
    return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)


def compiled(cell: Cell) -> Any:
    """The compiled kernel of a cell, by the steps of JITFunction.run."""
    kernel, args, given = caught(cell)
    target = gpu(cell.target)
    backend = make_backend(target)
    bound, special, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **given
    )
    options, signature, constants, hints = kernel._pack_args(backend, given, bound, special, options)
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=target, options=options.__dict__)


# What the compiler made of it.

SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
GCN = re.compile(r"^\t([a-z]\w*)(.*)")
LABEL = re.compile(r"^\s*(\.L\w+):")
TENSOR_CORE = re.compile(r"\w*MMA|v_s?w?mma\w*|v_s?mfma\w*|v_s?wmma\w*")
BRANCH = re.compile(r"BRA|s_c?branch")


def listing(text: str, instruction: re.Pattern[str]) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Assembly -> (operation, operands) in order, and the place of each label."""
    found: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := LABEL.match(line):
            labels[match[1]] = len(found)
        elif match := instruction.match(line):
            found.append((match[1].split(".")[0], match[2]))
    return found, labels


def hot_loop(code: list[tuple[str, str]], labels: dict[str, int]) -> int:
    """Length of the loop with the most tensor-core instructions, the shortest of such; 0 without a loop."""
    best = (0, 0)
    for i, (operation, operands) in enumerate(code):
        label = re.search(r"\.L\w+", operands) if BRANCH.match(operation) else None
        start = labels.get(label[0], i + 1) if label else i + 1
        if start <= i:
            span = code[start : i + 1]
            best = max(best, (sum(bool(TENSOR_CORE.match(o)) for o, _ in span), -len(span)))
    return -best[1]


def number(pattern: str, text: str) -> int:
    """The number that a pattern finds in a compiler's report."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's report lacks {pattern}")
    return int(match[1])


def tool(name: str, *args: str) -> str:
    """Output of one of the binary tools that Triton brings."""
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def resources(kernel: Any) -> tuple[Row, list[tuple[str, str]], dict[str, int]]:
    """Figures of a compiled kernel, its instructions and its labels."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        code, labels = listing(text, GCN)
        row = Row(
            registers=number(r"\.vgpr_count:\s+(\d+)", text),
            stack=number(r"\.private_segment_fixed_size:\s+(\d+)", text),
            spills=number(r"\.vgpr_spill_count:\s+(\d+)", text)
            + number(r"\.sgpr_spill_count:\s+(\d+)", text),
        )
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = tool("cuobjdump", "-res-usage", file.name)
            code, labels = listing(tool("nvdisasm", "-c", file.name), SASS)
        row = Row(
            registers=number(r"REG:(\d+)", usage),
            stack=number(r"STACK:(\d+)", usage),
            spills=sum(operation in ("LDL", "STL") for operation, _ in code),
        )
    row.shared = kernel.metadata.shared
    row.instructions = len(code)
    row.tensor_core = sum(bool(TENSOR_CORE.match(operation)) for operation, _ in code)
    return row, code, labels


def integer_products(code: list[tuple[str, str]], target: str) -> int:
    """Tensor-core instructions of int8, on Hopper only those of whole warp groups."""
    found = [operation for operation, _ in code if INTEGER_PRODUCT.fullmatch(operation)]
    return sum(target != "sm_90" or operation == HOPPER for operation in found)


def measure(cell: Cell) -> Row:
    """Compile a cell and read the result."""
    row, code, labels = resources(compiled(cell))
    if cell.kernel == "matmul":
        tile = tiles_of(cell.target)[cell.tile.removesuffix(" split")][1]
        weights = tile.bn * step_weights(DECODERS[cell.format].bits)
        row.loop = hot_loop(code, labels)
        row.per_weight = round(row.loop * tile.warps * gpu(cell.target).warp_size / weights, 2)
    elif cell.kernel == "int8_matmul":
        row.tensor_core = integer_products(code, cell.target)
        row.loop = hot_loop(code, labels)
    elif cell.kernel == "attend":
        integers = integer_products(code, cell.target)
        row.tensor_core = integers and row.tensor_core - integers and row.tensor_core  # of both kinds
        row.loop = hot_loop(code, labels)
    elif cell.kernel == "quantize_heads":
        numbers = 2 * attention_int8.TOKENS * HEAD
        row.per_weight = round(row.instructions * attention_int8.ROW_WARPS * 32 / numbers, 2)
    elif cell.kernel in (*INT8, "requantize"):
        size = int(cell.tile.split()[0])
        threads = int8.row_warps(int8.row_tiles(size)[0]) * gpu(cell.target).warp_size
        row.per_weight = round(row.instructions * threads / size, 2)
    return row
