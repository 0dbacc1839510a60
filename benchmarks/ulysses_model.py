"""What a step should cost on 1 to 8 GPUs that share its tokens: a model, from the bytes that they exchange.

    python -m benchmarks.ulysses_model

The work of a GPU is that of `step_model` over its share of the tokens and of the heads. Each GPU decodes all
packed weights, and starts as many kernels as one GPU does. The rates of the links are assumed, and that they
do not fall where more cards use them. Nothing overlaps with the exchanges. No GPU has measured any of this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import cases, step_model
from benchmarks.report import arguments, markdown, write
from benchmarks.step_model import CUDNN, GAP, GPUS, Gpu, Range, total
from zimage_core.formats import FORMATS

NAME, CAPTION, BYTES = "Q4_K", 128, 2
PIXELS, RANKS = (1024, 2048), (1, 2, 3, 4, 6, 8)
LATENCY = Range(15e-6, 40e-6)
"""Seconds of an exchange besides its bytes: NCCL's start on all ranks. Assumed."""
MORE = 6
"""Launches of an attention beyond those of one GPU: packing, two exchanges, unpacking."""


@dataclass(frozen=True)
class Setup:
    """GPUs of one machine.

    Args:
        gpu: The card.
        link: Bytes a second that one card sends to the others while it receives as many.
    """

    gpu: Gpu
    link: Range


PCIE4, HOST, NVLINK = Range(20e9, 25e9), Range(8e9, 12e9), Range(250e9, 350e9)
"""PCIe 4 x16 from card to card; the same through the memory of the host, without peer access; NVLink 4."""
SETUPS = {
    "L20, PCIe 4": Setup(Gpu("L20", "sm_89", 92, 2.52e9, 864 / 1008, tensor=119.5 / 165.2), PCIE4),
    "RTX 4090, PCIe 4 without peer access": Setup(GPUS["RTX 4090"], HOST),
    "H100, PCIe 4": Setup(GPUS["H100"], PCIE4),
    "H100, NVLink": Setup(GPUS["H100"], NVLINK),
}


def traffic(tokens: int, blocks: int, ranks: int, dim: int = cases.TRANSFORMER.dim) -> float:
    """Bytes that a GPU sends in a step: q, k, v and the result of its tokens, but for its own heads."""
    return 4 * tokens / ranks * dim * BYTES * blocks * (ranks - 1) / ranks


def sent(pixels: int, ranks: int) -> float:
    """The same for an image."""
    stacks = [stack for stack in cases.stages(pixels, CAPTION) if stack[0] in cases.STEP]
    return sum(traffic(tokens, blocks, ranks) for _, tokens, blocks in stacks)


def computed(gpu: Gpu, pixels: int, ranks: int) -> Range:
    """Seconds of a step without its exchanges."""
    size = (pixels, CAPTION)
    linears, attention = cases.step_linears(*size), cases.step_attention(*size)
    fmt = FORMATS[NAME]
    packed = sum(case.weights for case in linears if case.k % fmt.weights == 0)
    blocks = sum(case.count for case in attention)
    launches = step_model.step(gpu, NAME, pixels, CAPTION).launches + (MORE * blocks if ranks > 1 else 0)
    # a GPU writes and reads its q, k and v once more before they are sent, and the result behind that
    copied = 2 * 4 * sent(pixels, ranks) / 4 * ranks / (ranks - 1) / gpu.copy if ranks > 1 else 0.0

    def share(case: Any, name: str) -> Any:
        """A case with the part of the busiest rank."""
        return replace(case, **{name: math.ceil(getattr(case, name) / ranks)})

    steps = cases.step_elementwise(*size)
    return total(
        [
            *(step_model.product(share(case, "m"), gpu).times(case.count) for case in linears),
            *(step_model.attended(share(case, "heads"), gpu, CUDNN).times(case.count) for case in attention),
            *(step_model.stepped(share(case, "rows"), gpu).times(case.count) for case in steps),
            step_model.dequantised(packed, fmt, gpu),
            GAP.times(launches),
            Range(copied, copied),
        ]
    )


def exchanged(setup: Setup, pixels: int, ranks: int) -> Range:
    """Seconds of the exchanges of a step."""
    if ranks == 1:
        return Range(0.0, 0.0)
    count = 2 * sum(blocks for name, _, blocks in cases.stages(pixels, CAPTION) if name in cases.STEP)
    nbytes = sent(pixels, ranks)
    return Range(nbytes / setup.link.high, nbytes / setup.link.low) + LATENCY.times(count)


def figures() -> dict[str, Any]:
    """Milliseconds and megabytes by setup, size and number of GPUs."""
    out: dict[str, Any] = {}
    for name, setup in SETUPS.items():
        for pixels in PIXELS:
            alone = computed(setup.gpu, pixels, 1).middle
            for ranks in RANKS:
                work, wait = computed(setup.gpu, pixels, ranks), exchanged(setup, pixels, ranks)
                out.setdefault(name, {}).setdefault(str(pixels), {})[str(ranks)] = {
                    "computed_ms": _ms(work),
                    "exchanged_ms": _ms(wait),
                    "sent_mb": round(sent(pixels, ranks) / 1e6),
                    "times": round(alone / (work + wait).middle, 2),
                }
    return out


def _ms(value: Range) -> list[float]:
    return [round(1e3 * end, 2) for end in (value.low, value.high)]


def table(report: Mapping[str, Any]) -> str:
    """A row a setup and size: how many times as fast so many GPUs are, and the share of the exchanges."""
    lines = []
    for name, sizes in report["model"].items():
        for pixels, found in sizes.items():
            one = Range(*found["1"]["computed_ms"])
            cells = []
            for row in (found[str(ranks)] for ranks in RANKS[1:]):
                work, wait = Range(*row["computed_ms"]).middle, Range(*row["exchanged_ms"]).middle
                cells.append(f"{row['times']:.1f} ({100 * wait / (work + wait):.0f} %)")
            lines.append([name, f"{pixels} px", f"{one.middle:.0f} ms", *cells])
    return markdown(" | ".join(["GPUs, link", "image", "a step of one", *map(str, RANKS[1:])]), lines)


def main() -> None:
    """Write the figures and print the table."""
    args = arguments(__doc__, "ulysses_model.json").parse_args()
    report = {"format": NAME, "caption": CAPTION, "model": figures()}
    write(args.out, report)
    print(table(report))


if __name__ == "__main__":
    main()
