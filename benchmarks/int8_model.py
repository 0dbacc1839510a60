"""What a step should cost in int8, beside its cost in 16 bits: `step_model.py` with other products.

Products of the blocks are int8, as `kernels.int8` multiplies them; embedders and the last layer stay. Weights
are quantised from their packed bytes for each product, or kept as int8 rows. Activations are quantised in the
norms and the gate before a product, and in a kernel of their own behind attention. None of it is measured;
`python -m benchmarks.model` writes the figures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from benchmarks import cases, step_model
from benchmarks.report import compiled_rows
from benchmarks.step_model import CUDNN, GPUS, Gpu, Range, total
from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.kernels.tiles import int8_tile
from zimage_core.quant.dispatch import ARCHITECTURES, INT8_SPREAD, int8_attention, int8_product

RATE = Range(1 - INT8_SPREAD, 1 + INT8_SPREAD)
"""How far the rate of int8 products may be from that of `dispatch.ARCHITECTURES`. None has been measured."""

SUMS = 10
"""Bytes a number of a result for which torch multiplies: int32 sums written and read, a half written."""

CARDS = {
    card.name: card
    for card in (
        *GPUS.values(),
        Gpu("B200", "sm_100", 148, 1.85e9),
        Gpu("RTX 5090", "sm_120", 170, 2.41e9),
        Gpu("RTX 4070 Ti S", "sm_89", 66, 2.61e9, 672 / 1008, tensor=66 * 2.61 / (128 * 2.52)),
        Gpu("RTX 2060", "sm_75", 30, 1.68e9),
    )
}
"""The cards of the table: those of `step_model`, and others that people ask about; from data sheets."""

ATTENTION = {
    "sm_100": Range(0.5, 0.8),
    "sm_120": step_model.ATTENTION["sm_89"][CUDNN],
    "sm_75": Range(0.35, 0.6),
}
"""Rate of attention over a large product's, where `step_model` has none: assumed. Turing takes torch's
memory-efficient kernel."""

SAGE = {"sm_75": 4, "sm_80": 2, "sm_86": 4, "sm_89": 4, "sm_90": 2, "sm_100": 2, "sm_120": 4}
"""Rate of int8 products over 16-bit ones in hardware: what q k^T could gain in attention."""
SAGE_KERNEL = {"sm_90": 0.8, "sm_100": 0.5}
"""Speed of attention by Triton over that by cuDNN, before anything is int8: on Hopper and Blackwell it lacks
the warp specialisation of cuDNN's kernels (assumed). 1 elsewhere."""


@dataclass(frozen=True)
class Int8Cost:
    """Seconds of a step in int8 by part.

    Args:
        linears: All products.
        attention: As `dispatch.int8_attention` has it: with q k^T in int8 on GeForce.
        quantise: Packed weights to int8 rows.
        elementwise: The steps between products, and the quantising of activations.
        gaps: Between the launches of a graph.
        sixteen: The whole step in 16 bits over packed weights.
        half: All attention in 16 bits.
        smooth: All attention with q k^T in int8.
    """

    linears: Range
    attention: Range
    quantise: Range
    elementwise: Range
    gaps: Range
    sixteen: Range
    half: Range
    smooth: Range

    @property
    def kept(self) -> Range:
        """The whole step over int8 rows in memory, replayed."""
        return total([self.linears, self.attention, self.elementwise, self.gaps])

    @property
    def packed(self) -> Range:
        """The whole step over packed weights, replayed."""
        return self.kept + self.quantise

    @property
    def attention_share(self) -> float:
        """Share of attention in 16 bits of the step over kept rows."""
        return self.half.middle / self._with(self.half)

    @property
    def attention_gain(self) -> float:
        """What an int8 q k^T saves of the step over kept rows; negative where it costs time."""
        return 1 - self._with(self.smooth) / self._with(self.half)

    def _with(self, attention: Range) -> float:
        return self.kept.middle - self.attention.middle + attention.middle


def product(case: cases.LinearCase, gpu: Gpu) -> Range:
    """Seconds of one int8 product."""
    ops = ARCHITECTURES[gpu.architecture].int8_ops * gpu.tensor
    moved = (case.n + case.m) * case.k + 2 * case.m * case.n
    if int8_product(gpu.architecture) == "torch":
        wasted, after = 1.0, SUMS * case.m * case.n / gpu.copy
    else:
        tile = int8_tile(case.m, case.n, gpu.architecture, gpu.multiprocessors)
        wasted, after = step_model.waste(case.m, case.n, gpu, ((tile.bm, tile.bn),)) / tile.rate, 0.0
    low, high = (max(case.flops * wasted / (ops * rate), moved / gpu.copy) for rate in (RATE.high, RATE.low))
    return Range(low + after, high + after)


@lru_cache
def _cells() -> dict[tuple[str, str, str, str], float]:
    """Instructions of a thread for each number of a row, by (kernel, format, tile, target)."""
    return {
        (row["kernel"], row["format"], row["tile"], row["target"]): float(row["per_weight"])
        for row in compiled_rows()
    }


def _counted(kernel: str, tile: str, gpu: Gpu, fmt: str = "") -> float:
    return _cells()[kernel, fmt, tile, gpu.architecture]


def quantised(cases_of: list[cases.LinearCase], fmt: BlockFormat, gpu: Gpu) -> Range:
    """Seconds of making int8 rows of packed weights."""
    found = []
    for case in cases_of:
        rotated = case.name.endswith("w2")  # to_out counts with q, k and v, which are not rotated
        count = _counted("requantize", "10240 rotated" if rotated else "3840", gpu, fmt.name)
        memory = case.weights * (fmt.nbytes / fmt.weights + 1) / gpu.copy
        found.append(step_model.busy(memory, case.weights * count / gpu.issue, "dequantise"))
    return total(found)


def _rows(name: str, tile: str, numbers: float, nbytes: float, gpu: Gpu) -> Range:
    issue = numbers * _counted(name, tile, gpu) / gpu.issue
    return step_model.busy(numbers * nbytes / gpu.copy, issue, "elementwise")


def stepped(case: cases.ElementwiseCase, gpu: Gpu) -> Range:
    """Seconds of one element-wise step; norms and the gate before a product end in int8 rows."""
    if case.name == "rms_norm_modulate":
        return _rows("rms_norm_modulate_int8", "3840", case.numbers, 3, gpu)
    if case.name == "silu_gate":
        return _rows("silu_gate_int8", "10240 rotated", case.numbers, 5, gpu)
    counted = (
        gpu if gpu.architecture != "sm_75" else replace(gpu, architecture="sm_80")
    )  # bfloat16 is counted
    found = step_model.stepped(case, counted)
    return found.times(counted.copy / gpu.copy)


def attended(case: cases.AttentionCase, gpu: Gpu) -> Range:
    """Seconds of one attention in 16 bits."""
    if gpu.architecture in step_model.ATTENTION:
        return step_model.attended(case, gpu, CUDNN)
    rate = ATTENTION[gpu.architecture].times(gpu.flops)
    return Range(case.flops / rate.high, case.flops / rate.low)


def smoothed(case: cases.AttentionCase, gpu: Gpu) -> Range:
    """Seconds of one attention whose q k^T, half of its work, is int8, with its two launches before."""
    slower = 1 / SAGE_KERNEL.get(gpu.architecture, 1.0)
    share = slower * (0.5 + 0.5 / SAGE[gpu.architecture])
    numbers = case.length * case.heads * case.head_dim
    found = _cells()
    key = ("quantize_heads", "", str(case.head_dim))
    # where it is not compiled it is charged as on sm_80
    counted = found.get((*key, gpu.architecture), found[(*key, "sm_80")])
    rows = step_model.busy(6 * numbers / gpu.copy, 2 * numbers * counted / gpu.issue, "elementwise")
    means = Range(2 * numbers / gpu.copy, 2 * numbers / gpu.copy)
    return total([attended(case, gpu).times(share), means, rows, step_model.GAP.times(2)])


def _taken(case: cases.AttentionCase, gpu: Gpu) -> Range:
    """The attention that the package takes."""
    fast = int8_attention(gpu.architecture, case.length, case.head_dim, "bfloat16")
    return smoothed(case, gpu) if fast else attended(case, gpu)


def step(gpu: Gpu, name: str = "Q4_K", pixels: int = cases.PIXELS, caption: int = cases.CAPTION) -> Int8Cost:
    """The parts of one step in int8.

    Args:
        gpu: The card.
        name: Format of the packed weights.
        pixels: Side of the image.
        caption: Tokens of the caption.
    """
    fmt = FORMATS[name]
    linears = cases.step_linears(pixels, caption)
    blocks = [case for case in linears if case.name.partition(".")[0] in cases.STEP]
    others = [case for case in linears if case not in blocks]
    elementwise, attention = cases.step_elementwise(pixels, caption), cases.step_attention(pixels, caption)
    behind = [(case.length * case.heads * case.head_dim, case.count) for case in attention]
    counts = (
        blocks,
        blocks,
        others,
        elementwise,
        attention,
        attention,
    )  # weights and attention's result as well
    launches = sum(case.count for part in counts for case in part) + step_model.OTHER
    # what `step_model` has no count for on Turing is charged as on sm_80
    steps = total([stepped(case, gpu).times(case.count) for case in elementwise])
    steps += total([_rows("quantize", "3840 rotated", n, 3, gpu).times(count) for n, count in behind])
    half, smooth, taken = (
        total([way(case, gpu).times(case.count) for case in attention])
        for way in (attended, smoothed, _taken)
    )
    linears_all = total([product(case, gpu).times(case.count) for case in blocks])
    linears_all += total([step_model.product(case, gpu).times(case.count) for case in others])
    gaps = step_model.GAP.times(launches)
    return Int8Cost(
        linears_all,
        taken,
        quantised(blocks, fmt, gpu),
        steps,
        gaps,
        _sixteen(gpu, fmt, pixels, caption, half),
        half,
        smooth,
    )


def _sixteen(gpu: Gpu, fmt: BlockFormat, pixels: int, caption: int, attention: Range) -> Range:
    """The step in 16 bits over packed weights, with kernels that are counted for the card."""
    if gpu.name in GPUS:
        return step_model.step(gpu, fmt.name, pixels, caption).replayed()
    counted = gpu if gpu.architecture != "sm_75" else replace(gpu, architecture="sm_80")
    linears = cases.step_linears(pixels, caption)
    weights = sum(case.weights for case in linears if case.k % fmt.weights == 0)
    launches = 2 * sum(case.count for case in linears) + step_model.OTHER
    elementwise = cases.step_elementwise(pixels, caption)
    scale = counted.copy / gpu.copy
    return total(
        [
            *(step_model.product(case, gpu).times(case.count) for case in linears),
            *(step_model.stepped(case, counted).times(case.count * scale) for case in elementwise),
            step_model.dequantised(weights, fmt, gpu),
            attention,
            step_model.GAP.times(launches + sum(case.count for case in elementwise)),
        ]
    )
