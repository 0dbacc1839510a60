"""Chooses how a packed weight is multiplied, and whether Triton kernels run at all.

    fused        decoded inside the product, from planes (kernels/planar.py): for few rows of x
    dequantise   dequantised into scratch for each product, then torch's own product: for many rows of x
    cpu          slab by slab in float32

`choose` is a pure function that needs no device, no Triton and no tensor; `zimage doctor --paths` prints its
results.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from zimage_core.errors import BadArgument, Unsupported
from zimage_core.formats import BlockFormat, by_name
from zimage_core.quant.probe import works

if TYPE_CHECKING:
    import torch

MODES = ("auto", "fused", "dequantise")

MODE: str | None = None
"""One of MODES, used for every packed product. None until `mode` reads the environment at its first call."""

KERNELS: str | None = None
"""auto: kernels run on GPUs where Triton can launch one. off: never. on: everywhere, for tests in Triton's
interpreter. None until `kernels_for` reads the environment at its first call."""

SCRATCH_BYTES = 192 << 20
"""Most bytes of dequantised weights at a time; a larger packed matrix is multiplied in slabs of rows.

The largest matrices of the family are w1 and w3, 79 MB in bfloat16.
"""

PLAIN_WEIGHTS = 20 << 20
"""Most weights that plain torch decodes at a time on a GPU without kernels, 80 MiB in float32: 3840 x 3840 at
once, 10240 x 3840 in two slabs. A larger slab saves launches and costs memory; see `plain_bytes`."""

PLANES_MARGIN = 4 << 30
"""Bytes of device memory that must stay free after planes are made, for activations and decoding."""

PLANAR_BITS = {
    "Q4_0": 4.5, "Q4_1": 5.0, "Q5_0": 5.5, "Q5_1": 6.0, "Q8_0": 8.5, "Q2_K": 3.125, "Q3_K": 3.5625,
    "Q4_K": 4.625, "Q5_K": 5.625, "Q6_K": 6.5625, "IQ4_NL": 4.5, "IQ4_XS": 4.3125,
    "TQ2_0": 2.0625, "MXFP4": 4.5, "NVFP4": 5.25, "Q2_0": 2.25, "Q2_0_128": 2.125,
}  # fmt: skip
"""Format that has planes -> bits per weight in planes; tests/kernels compare it with kernels/planar.py.

The other formats are dequantised: planes would make grid formats two to five times as large, and base-3
digits and single bits cost more instructions than the traffic they save.
"""


@dataclass(frozen=True)
class Architecture:
    """Properties of a GPU that the choice depends on.

    Args:
        tensor_flops: Operations per second of large bfloat16 products with float32 sums.
        bandwidth: Bytes per second of a large copy.
        efficiency: Speed of the fused kernel for many rows relative to torch's product; 0 if Triton cannot
            use tensor cores.
        int8_ops: Operations per second of large int8 products, by Triton or else torch; 0 if there are none.
    """

    tensor_flops: float
    bandwidth: float
    efficiency: float
    int8_ops: float = 0.0


# Assumed, not measured: rates are a usual fraction of the peak in data sheets; efficiencies are estimated
# from the kernel's instructions and the time that its tensor-core work leaves for them
# (docs/explanation/kernels.md). int8: the peak without sparsity, times 0.62 for Hopper's asynchronous
# products without TMA, 0.5 for AMD and for sm_100, whose product by torch nobody has measured, 0.65 for A100,
# 0.75 elsewhere: there a product takes five times as long as what is issued around it.
ARCHITECTURES = {
    "sm_50": Architecture(8e12, 0.3e12, 0),  # no tensor cores, no Triton: float16 at the rate of float32
    "sm_70": Architecture(80e12, 0.75e12, 0),  # no tensor cores for int8
    "sm_75": Architecture(24e12, 0.305e12, 0, 77e12),  # Triton emits no tensor-core code for Turing
    "sm_80": Architecture(250e12, 1.6e12, 0.6, 405e12),
    "sm_86": Architecture(24e12, 0.33e12, 0.85, 76e12),
    "sm_89": Architecture(155e12, 0.93e12, 0.85, 495e12),
    "sm_90": Architecture(790e12, 4.3e12, 0.6, 1230e12),
    "sm_100": Architecture(1600e12, 7.0e12, 0.5, 2250e12),
    "sm_103": Architecture(1600e12, 7.0e12, 0.5, 150e12),  # the int8 of sm_100 was given up for 4-bit floats
    "sm_120": Architecture(200e12, 1.6e12, 0.85, 630e12),
    "gfx906": Architecture(20e12, 0.8e12, 0),  # no matrix cores, like all before gfx908
    "gfx942": Architecture(600e12, 4.0e12, 0.6, 1300e12),
    "gfx1030": Architecture(30e12, 0.45e12, 0),  # no matrix cores, like all before gfx1100
    "gfx1100": Architecture(80e12, 0.85e12, 0.6, 60e12),  # int8 has the rate of float16
    "gfx1201": Architecture(120e12, 0.58e12, 0.6, 195e12),
}


INT8_BY_TORCH = ("sm_100", "sm_103")
"""Where torch multiplies int8 though Triton could: before 3.8 it emits mma of single warps, not tcgen05."""

INT8_SPREAD = 0.2
"""How far the rate of int8 products may be from what is assumed."""


INT8_ATTENTION = ("sm_86", "sm_89", "sm_120")
"""Where attention with q k^T in int8 is the faster one, by the model of a step: benchmarks/int8_model.py.

Tensor cores of GeForce multiply int8 four times as fast as half precision with float32 sums, and Triton's
attention is about as fast as cuDNN's. On data-centre cards int8 is twice as fast, which the lead of cuDNN's
attention takes back. Turing gets no tensor-core code from Triton. No GPU has measured any of this.
"""
INT8_ATTENTION_FROM = 512
"""Tokens from which on it is used: at fewer, two more launches cost what the product saves."""
INT8_ATTENTION_HEADS = (32, 64, 128)
"""Channels of a head that it takes: `kernels.attention_int8.HEADS`, which imports Triton."""


@dataclass(frozen=True)
class Choice:
    """A path, the reason for it, and the device memory it needs besides packed weight, x and result."""

    path: str
    reason: str
    nbytes: int = 0


def kernels_for(device: torch.device) -> bool:
    """Whether Triton kernels run for tensors on `device`.

    Raises:
        BadArgument: The environment variable ZIMAGE_KERNELS is none of auto, on, off.
        Unsupported: It is on, and kernels do not run on this GPU; see `probe.works`.
    """
    global KERNELS
    if KERNELS is None:
        KERNELS = os.environ.get("ZIMAGE_KERNELS", "auto")
    if KERNELS not in ("auto", "on", "off"):
        raise BadArgument(f"ZIMAGE_KERNELS is {KERNELS!r}; it must be auto, on or off")
    if device.type == "cuda" and KERNELS != "off":
        return works(device, required=KERNELS == "on")
    return KERNELS == "on"


def mode() -> str:
    """The mode of every packed product: one of MODES.

    Raises:
        BadArgument: The environment variable ZIMAGE_MATMUL is none of auto, fused, dequantise.
    """
    global MODE
    if MODE is None:
        MODE = os.environ.get("ZIMAGE_MATMUL", os.environ.get("ZIMAGE_PATH", "auto"))
        if "ZIMAGE_PATH" in os.environ:
            warnings.warn("ZIMAGE_PATH is now called ZIMAGE_MATMUL", DeprecationWarning, stacklevel=2)
    if MODE not in MODES:
        raise BadArgument(f"ZIMAGE_MATMUL is {MODE!r}; it must be auto, fused or dequantise")
    return MODE


def family(architecture: str) -> str:
    """The nearest key of ARCHITECTURES: sm_87 -> sm_86; BadArgument lists the known ones."""
    if architecture in ARCHITECTURES:
        return architecture
    kind, number = architecture[:3], architecture[3:]
    if kind == "sm_" and number.isdigit():
        older = [int(k[3:]) for k in ARCHITECTURES if k.startswith("sm_") and int(k[3:]) <= int(number)]
        if older:
            return f"sm_{max(older)}"
    if kind == "gfx":
        if number.startswith("90") and number not in ("908", "90a"):
            return "gfx906"
        start = number[: 1 if number.startswith("9") else 2]
        return {"9": "gfx942", "10": "gfx1030", "12": "gfx1201"}.get(start, "gfx1100")
    raise BadArgument(
        f"architecture {architecture!r} is not known; known are cpu, {', '.join(ARCHITECTURES)}"
    )


def crossover(fmt: BlockFormat, architecture: str) -> int:
    """Rows of x up to which the fused kernel is faster; there its inefficiency costs as much as dequantising.

    M* = T_dequantise / ((1 / e - 1) t_row); both times are proportional to N K, which cancels.
    """
    if architecture == "cpu":
        return 0
    arch = ARCHITECTURES[family(architecture)]
    if not arch.efficiency:
        return 0
    dequantise = (fmt.nbytes / fmt.weights + 2) / arch.bandwidth
    row = 2 / arch.tensor_flops
    return int(dequantise / ((1 / arch.efficiency - 1) * row))


def int8_gain(architecture: str) -> float:
    """How many times as fast as those of 16 bits large int8 products are at least expected to be; 0 for none.

    At least: `INT8_SPREAD` below the assumed rate, because int8 costs accuracy and no rate has been measured.
    """
    if architecture == "cpu":
        return 0.0
    arch = ARCHITECTURES[family(architecture)]
    return (1 - INT8_SPREAD) * arch.int8_ops / arch.tensor_flops


def int8_product(architecture: str) -> str:
    """What multiplies int8 on a GPU: "triton", or "torch" where Triton uses no tensor cores or old ones.

    Raises:
        Unsupported: The GPU has no fast int8 product.
    """
    if architecture == "cpu":
        return "torch"
    name = family(architecture)
    arch = ARCHITECTURES[name]
    if not arch.int8_ops:
        raise Unsupported(f'{architecture} multiplies no int8; use compute="exact"')
    return "triton" if arch.efficiency and name not in INT8_BY_TORCH else "torch"


def int8_attention(architecture: str, tokens: int, head_dim: int, dtype: str) -> bool:
    """Whether attention without mask takes q k^T in int8, on a GPU where kernels run.

    Args:
        architecture: As for `choose`.
        tokens: Queries of a head, and its keys.
        head_dim: Channels of a head.
        dtype: Name of the dtype of q, k and v.
    """
    gains = architecture != "cpu" and family(architecture) in INT8_ATTENTION
    suits = head_dim in INT8_ATTENTION_HEADS and dtype in ("float16", "bfloat16")
    return gains and suits and tokens >= INT8_ATTENTION_FROM


def int8_bytes(rows: int, width: int) -> int:
    """Bytes of a weight [rows, width] as int8 rows with their scales."""
    return rows * width + 4 * rows


def choose_int8(format_name: str, rows: int, width: int, architecture: str) -> Choice:
    """How a packed weight [rows, width] takes part in an int8 product.

    Args:
        format_name: Key of `zimage_core.formats.FORMATS`.
        rows: Rows of W.
        width: Weights of a row.
        architecture: As for `choose`.

    Raises:
        UnknownFormat: No such format.
        BadArgument: The architecture is unknown.
        Unsupported: The GPU has no fast int8 product.
    """
    fmt = by_name(format_name)
    by = {"triton": "a kernel", "torch": "torch"}[int8_product(architecture)]
    if fmt.name == "I8":
        return Choice("kept", f"int8 rows; multiplied by {by}")
    nbytes = min(SCRATCH_BYTES, int8_bytes(rows, width))
    return Choice("scratch", f"quantised from {fmt.name} for each product; multiplied by {by}", nbytes)


def planar_bytes(fmt: BlockFormat, rows: int, width: int) -> int:
    """Bytes of the planes of a weight [rows, width]."""
    return int(PLANAR_BITS[fmt.name] * rows * width / 8)


def plain_bytes(fmt: BlockFormat, rows: int, width: int, dtype: str = "bfloat16") -> int:
    """Device memory of a product without kernels besides packed weight, x and result; see `quant.plain`.

    A weight in x's dtype, its slab in float32, and what the decoder holds for a weight of the slab: at most
    2.6 bytes for Q2_K to Q6_K, 9.4 for the formats with blocks of 32, 6.3 for the others, as measured.
    """
    dense = min(rows * width * (4 if dtype == "float32" else 2), SCRATCH_BYTES)
    if fmt.weights == 1:
        return dense
    held = 3 if fmt.name.endswith("_K") else 10 if fmt.weights == 32 else 7
    return dense + min(rows * width, PLAIN_WEIGHTS) * (held + (0 if dtype == "float32" else 4))


def planar_width(fmt: BlockFormat) -> int:
    """Weights of a row per step of the fused kernel; only rows of whole steps have planes."""
    return 128 if fmt.name == "Q2_0" else 64


def _why_not_fused(fmt: BlockFormat, width: int, architecture: str, dtype: str) -> str:
    """Why the fused kernel cannot multiply this weight; empty if it can."""
    if fmt.name not in PLANAR_BITS:
        return f"{fmt.name} has no planar layout"
    if width % planar_width(fmt):
        return f"rows of {width} weights are no multiple of {planar_width(fmt)}"
    if not ARCHITECTURES[family(architecture)].efficiency:
        return f"Triton has no tensor cores to offer on {architecture}"
    if dtype not in ("float16", "bfloat16"):
        return f"{dtype} has no tensor cores; torch's own product is faster"
    return ""


@lru_cache(4096)
def choose(
    format_name: str,
    rows: int,
    width: int,
    tokens: int,
    architecture: str,
    free_bytes: int,
    mode: str = "auto",
    dtype: str = "bfloat16",
    planes: bool = False,
) -> Choice:
    """Choose the path of x [tokens, width] times a packed W [rows, width].

    Args:
        format_name: Key of `zimage_core.formats.FORMATS`.
        rows: Rows of W.
        width: Weights of a row.
        tokens: Rows of x.
        architecture: "cpu", "sm_75" ... "sm_120", "gfx942" ...; others map to the nearest older one.
        free_bytes: Device memory that the path may use.
        mode: One of MODES; "fused" is refused if it is not possible. Plain numbers (F16, fp8) are always
            converted, since there is nothing to fuse.
        dtype: Name of x's dtype.
        planes: Whether the planes of the weight exist already.

    Raises:
        UnknownFormat: No such format.
        BadArgument: mode or architecture is unknown, or a size is not positive.
        Unsupported: The mode requires a path that this weight, GPU or memory does not allow.
    """
    fmt = by_name(format_name)
    if mode not in MODES:
        raise BadArgument(f"path mode {mode!r} is not known; it must be one of {', '.join(MODES)}")
    if min(rows, width) <= 0 or tokens < 0:
        raise BadArgument(f"a product of x [{tokens}, {width}] and W [{rows}, {width}] has no positive size")
    if architecture == "cpu":
        return Choice("cpu", "no GPU: slab by slab in float32")
    dense = rows * width * (4 if dtype == "float32" else 2)
    if fmt.weights == 1:
        return Choice("dequantise", f"{fmt.name} needs a conversion only", dense)
    obstacle = _why_not_fused(fmt, width, architecture, dtype)
    repacked = 0 if obstacle or planes else planar_bytes(fmt, rows, width)
    if not obstacle and repacked > free_bytes:
        obstacle = f"the planes need {repacked} bytes and {free_bytes} are free"
    if mode == "fused":
        if obstacle:
            raise Unsupported(f"the fused path was asked for, but {obstacle}; use auto")
        return Choice("fused", "asked for", repacked)
    if mode == "dequantise":
        return Choice("dequantise", "asked for", dense)
    if obstacle:
        return Choice("dequantise", obstacle, dense)
    most = crossover(fmt, architecture)
    if tokens <= most:
        return Choice("fused", f"{tokens} rows of x are at most {most}", repacked)
    return Choice("dequantise", f"{tokens} rows of x are more than {most}", dense)


def largest_that_fit(sizes: dict[str, int], budget: int) -> list[str]:
    """Choose the weights to dequantise once within a budget, those that grow most first.

    Args:
        sizes: Bytes that each weight grows by when it is dequantised.
        budget: Bytes of growth allowed in all.

    Returns:
        The names in the order in which to dequantise them; equal sizes keep the order of `sizes`.
    """
    chosen, left = [], budget
    for name, growth in sorted(sizes.items(), key=lambda item: -item[1]):
        if growth <= left:
            chosen.append(name)
            left -= growth
    return chosen
