"""What a step should cost on a GPU, in parts: products, attention, dequantising, element-wise steps, gaps.

This is a model, not a measurement. Work is counted: operations and bytes from the shapes (`cases.py`),
instructions from compiled code (`results/compile_matrix.csv`). Rates of products and copies are those that
`quant.dispatch` assumes. What is uncertain is a range, from the best case to the worst. `python -m
benchmarks.model` writes the figures.

The ranges of a 1024 px step on an H200 are those of an audit made without a GPU in November 2026, which
counted launches under a stand-in for the driver, and instructions in machine code. Constants marked *audit*
are its, or were chosen so that its ranges come out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from benchmarks import cases
from benchmarks.report import compiled_rows
from zimage_core.config import TransformerConfig
from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.quant.dispatch import ARCHITECTURES


@dataclass(frozen=True)
class Range:
    """A predicted quantity between two values, `low` <= `high`."""

    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Range:
        """Both ends times a positive number."""
        return Range(self.low * factor, self.high * factor)

    def over(self, other: Range) -> Range:
        """The quotient of two independent quantities."""
        return Range(self.low / other.high, self.high / other.low)

    @property
    def middle(self) -> float:
        """Halfway."""
        return (self.low + self.high) / 2

    def holds(self, value: float) -> bool:
        """Whether a value lies between the ends."""
        return self.low <= value <= self.high


ZERO = Range(0.0, 0.0)


@dataclass(frozen=True)
class Gpu:
    """A card, by its data sheet.

    Args:
        name: Its name, with which that of the driver ends unless `driver` is given.
        architecture: Key of `dispatch.ARCHITECTURES`, which has the rates of products and copies.
        multiprocessors: Their number.
        clock: Cycles a second under load.
        bandwidth: Its memory's over that of the card of this architecture in `dispatch.ARCHITECTURES`.
        driver: The end of the driver's name for it.
        tensor: Its products' rate over that of the card of this architecture in `dispatch.ARCHITECTURES`.
    """

    name: str
    architecture: str
    multiprocessors: int
    clock: float
    bandwidth: float = 1.0
    driver: str = ""
    tensor: float = 1.0

    @property
    def flops(self) -> float:
        """Operations a second of a large product."""
        return ARCHITECTURES[self.architecture].tensor_flops * self.tensor

    @property
    def copy(self) -> float:
        """Bytes a second of a large copy."""
        return ARCHITECTURES[self.architecture].bandwidth * self.bandwidth

    @property
    def issue(self) -> float:
        """Instructions of threads a second: four schedulers a multiprocessor, 32 lanes each."""
        return self.multiprocessors * 4 * 32 * self.clock


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200", "sm_90", 132, 1.7e9),  # 1.98 GHz at most; large products hold it down
        Gpu("H100", "sm_90", 132, 1.7e9, 3.35 / 4.8, "H100 80GB HBM3"),
        Gpu("RTX 4090", "sm_89", 128, 2.52e9),
        Gpu("RTX 3060", "sm_86", 28, 1.78e9),
    )
}
MAIN = GPUS["H200"]

TILES = {
    "best": ((64, 128), (64, 192), (64, 256), (128, 128), (128, 192), (128, 256)),
    "worst": ((128, 128), (128, 256)),
}
"""Tiles of y from which a product takes the ones that fill the multiprocessors best. cuBLAS has all of these;
in the worst case its choice falls on the two usual ones."""

CUDNN, FLASH = "cudnn", "flash"
ATTENTION = {
    "sm_90": {CUDNN: Range(580e12, 617e12), FLASH: Range(335e12, 370e12)},
    "sm_89": {CUDNN: Range(0.60, 0.95), FLASH: Range(0.65, 0.90)},
    "sm_86": {CUDNN: Range(0.60, 0.95), FLASH: Range(0.65, 0.90)},
}
"""Operations a second, or up to 1 the share of a large product's rate. sm_90: head size 128 without a mask;
the top is measured on an H100 in arXiv 2407.08608, figure 5 (FlashAttention-2 350 to 370, cuDNN 574 to 617
from 1k to 16k tokens), the bottom is the audit's. GeForce: assumed for flash; cuDNN is 1.23 times as fast as
flash in pytorch #192799 and 0.93 times in transformers #48163."""

OVERLAP = {"dequantise": Range(0.1, 0.6), "elementwise": Range(0.42, 0.66), "fused": Range(0.5, 1.0)}
"""Share of the shorter of memory time and instruction time that hides behind the longer. Audit: the first two
give its 4.5 to 6 and 6.5 to 7.5 ms. The fused kernel reads ahead, so all may hide."""

FUSED_SPREAD = 0.1
"""How far the fused kernel's efficiency for many rows may be from that of `dispatch.ARCHITECTURES`."""

TANH = 328 / 16
"""Instructions a number that `gate_norm_residual` spends on tanh of its gate if every row computes it. Audit:
0.8 ms a step of an H200's issue slots. A run that computes it once, with the modulations, saves them."""

GAP = Range(0.75e-6, 2.2e-6)
"""Seconds from one kernel to the next of a graph. Audit: 0.5 to 1.5 ms a step."""
OTHER = 7
"""Launches of a step besides the four parts: patches, pads, concatenations, the last norm. Audit: 668 to 682
in all. The time of these few is counted as gaps."""

HOST = {"linear": Range(18e-6, 18e-6), "elementwise": Range(12e-6, 19e-6), "attention": Range(19e-6, 19e-6)}
"""Seconds of the host for one operation up to the call of the driver, counted with a driver that does nothing
on one core of an EPYC."""
MODULES = 0.16e-3
"""Seconds of the host for the modules of a block: what its operations leave of 12.6 ms counted for a step."""
DRIVER = Range(2e-6, 5e-6)
"""Seconds of the driver for one launch."""

EAGER_BYTES = 14.5
"""Bytes a weight that a dequantiser of plain torch operations moves, as in diffusers, counted for Q4_K."""
TORCH_BYTES = {"rms_norm_modulate": 40, "qk_norm_rope": 48, "silu_gate": 38, "gate_norm_residual": 50}
"""Bytes a number that the functions `*_torch` of `nn/elementwise.py` move in bfloat16; counted."""


def gpu_named(name: str) -> Gpu | None:
    """The card of a driver's name; None for one that the model does not know, such as a variant of these."""
    return next((gpu for gpu in GPUS.values() if name.endswith(gpu.driver or gpu.name)), None)


@lru_cache
def _cells() -> dict[tuple[str, str, str, str], dict[str, str]]:
    """Compiled bfloat16 kernels by (kernel, format, tile, target)."""
    return {
        (row["kernel"], row["format"], row["tile"], row["target"]): row
        for row in compiled_rows()
        if row["dtype"] == "bfloat16"
    }


PER_THREAD = 16
"""Numbers of one thread, in the dequantising kernel and in all element-wise ones at this network's sizes."""


def instructions(kernel: str, target: str, fmt: str = "", tile: str = "") -> float:
    """Counted instructions of a thread for each number."""
    return int(_cells()[kernel, fmt, tile, target]["instructions"]) / PER_THREAD


def elementwise_instructions(name: str, target: str, tanh: bool = False) -> float:
    """The same for an element-wise step; `tanh`: of a gate whose tanh every row computes."""
    counted = instructions(name, target)
    if name != "gate_norm_residual":
        return counted
    norm = "rms_norm_modulate"  # multiplies by a vector, too, which costs what the gate costs
    vector = instructions(norm, target) - instructions(norm, target, tile="no scale")
    # a matrix that was compiled before tanh left the kernel counts it
    plain = min(counted, instructions(name, target, tile="no gate") + vector)
    return plain + (TANH if tanh else 0.0)


def fused_instructions(fmt: str, target: str) -> float:
    """Instructions of a thread for each weight in the loop of the fused kernel, for 32 rows."""
    found = [
        float(row["per_weight"])
        for (kernel, name, tile, arch), row in _cells().items()
        if (kernel, name, arch) == ("matmul", fmt, target) and tile.startswith("32x64")
    ]
    return found[-1]


def busy(memory: float, issue: float, kind: str) -> Range:
    """Seconds of kernels that need so many for their bytes and for their instructions."""
    longer, shorter = max(memory, issue), min(memory, issue)
    overlap = OVERLAP[kind]
    return Range(longer + (1 - overlap.high) * shorter, longer + (1 - overlap.low) * shorter)


def waste(m: int, n: int, gpu: Gpu, tiles: Sequence[tuple[int, int]]) -> float:
    """Work of all multiprocessors until the last tile of y [m, n] is done, over the work of y."""
    sms = gpu.multiprocessors
    rounds = (math.ceil(math.ceil(m / a) * math.ceil(n / b) / sms) * a * b for a, b in tiles)
    return min(rounds) * sms / (m * n)


def product(case: cases.LinearCase, gpu: Gpu, itemsize: int = 2) -> Range:
    """Seconds of one dense product."""
    moved = (case.n * case.k + case.m * (case.n + case.k)) * itemsize / gpu.copy
    low, high = (case.flops / gpu.flops * waste(case.m, case.n, gpu, TILES[w]) for w in ("best", "worst"))
    return Range(max(low, moved), max(high, moved))


def attended(case: cases.AttentionCase, gpu: Gpu, backend: str) -> Range:
    """Seconds of one attention."""
    rate = ATTENTION[gpu.architecture][backend]
    rate = rate.times(gpu.flops) if rate.high <= 1 else rate
    return Range(case.flops / rate.high, case.flops / rate.low)


def dequantised(weights: float, fmt: BlockFormat, gpu: Gpu, itemsize: int = 2) -> Range:
    """Seconds of dequantising matrices of so many weights in all."""
    memory = weights * (fmt.nbytes / fmt.weights + itemsize) / gpu.copy
    issue = weights * instructions("dequantize", gpu.architecture, fmt.name) / gpu.issue
    return busy(memory, issue, "dequantise")


def of_copy(fmt: BlockFormat, gpu: Gpu, itemsize: int = 2) -> Range:
    """Bandwidth of dequantising over that of a copy."""
    memory = (fmt.nbytes / fmt.weights + itemsize) / gpu.copy
    seconds = dequantised(1.0, fmt, gpu, itemsize)
    return Range(memory / seconds.high, memory / seconds.low)


def stepped(case: cases.ElementwiseCase, gpu: Gpu, tanh: bool = False, itemsize: int = 2) -> Range:
    """Seconds of one fused element-wise step."""
    padded = (
        2 ** math.ceil(math.log2(case.size)) / case.size
        if case.name.endswith(("modulate", "residual"))
        else 1
    )
    issue = padded * case.numbers * elementwise_instructions(case.name, gpu.architecture, tanh) / gpu.issue
    return busy(case.nbytes(itemsize) / gpu.copy, issue, "elementwise")


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step by part, and its counts.

    Args:
        linears: All dense products.
        attention: By backend.
        dequantise: Of all packed weights.
        elementwise: Of the four fused steps.
        gaps: Between the launches of a graph.
        host: Of the host if it launches one by one.
        floor: The operations at the rate of a large product.
        launches: Their number.
    """

    linears: Range
    attention: dict[str, Range]
    dequantise: Range
    elementwise: Range
    gaps: Range
    host: Range
    floor: float
    launches: int

    def replayed(self, backend: str = CUDNN) -> Range:
        """Seconds of the step as one graph."""
        return self.dense(backend) + self.dequantise

    def dense(self, backend: str = CUDNN) -> Range:
        """The same over dense weights."""
        return self.linears + self.attention[backend] + self.elementwise + self.gaps

    def eager(self, backend: str = CUDNN) -> Range:
        """Seconds of the step launched one by one: host and device work at the same time."""
        device = self.replayed(backend)
        return Range(max(device.low, self.host.low), max(device.high, self.host.high))


def total(found: Sequence[Range]) -> Range:
    """Their sum."""
    return sum(found, ZERO)


def step(
    gpu: Gpu = MAIN,
    name: str = "Q4_K",
    pixels: int = cases.PIXELS,
    caption: int = cases.CAPTION,
    tanh: bool = False,
    config: TransformerConfig = cases.TRANSFORMER,
) -> StepCost:
    """The parts of one step of the transformer.

    Args:
        gpu: The card.
        name: Format of all weights whose rows are whole blocks.
        pixels: Side of the image.
        caption: Tokens of the caption.
        tanh: As if every row computed tanh of the gates.
        config: Of the transformer; by default the full size.
    """
    fmt = FORMATS[name]
    size = (pixels, caption, config)
    linears, attention = cases.step_linears(*size), cases.step_attention(*size)
    elementwise = cases.step_elementwise(*size)
    packed = [case for case in linears if case.k % fmt.weights == 0]
    counts = {
        "linear": sum(case.count for case in linears),
        "elementwise": sum(case.count for case in elementwise),
        "attention": sum(case.count for case in attention),
    }
    launches = sum(counts.values()) + sum(case.count for case in packed) + OTHER
    modules = MODULES * counts["attention"]  # one attention a block
    host = total([HOST[kind].times(n) for kind, n in counts.items()]) + Range(modules, modules)
    return StepCost(
        total([product(case, gpu).times(case.count) for case in linears]),
        {
            backend: total([attended(case, gpu, backend).times(case.count) for case in attention])
            for backend in (CUDNN, FLASH)
        },
        dequantised(sum(case.weights for case in packed), fmt, gpu),
        total([stepped(case, gpu, tanh).times(case.count) for case in elementwise]),
        GAP.times(launches),
        host + DRIVER.times(launches),
        1e12 * cases.teraflops([*linears, *attention]) / gpu.flops,
        launches,
    )
