"""What products of int8 change in a plan: scratch, activations, and which blocks are kept as int8 rows.

A pure module, as the plan is. The rows themselves are made in `memory.int8_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence

from zimage_core.config import TextEncoderConfig, TransformerConfig
from zimage_core.formats import FORMATS
from zimage_core.memory.activations import FLOAT32, ITEMSIZE
from zimage_core.memory.rates import Rates
from zimage_core.memory.residency import spread
from zimage_core.memory.sizes import Matrix, Part, in_int8, matrices
from zimage_core.quant.dispatch import PLAIN_WEIGHTS, SCRATCH_BYTES, int8_gain, int8_product

THREADS = 8
"""Threads of a CPU where a plan is made for no machine in particular; its rates assume as many cores."""
SLAB_ROWS = 1024
"""Rows of a weight that a thread of a CPU multiplies at a time: `quant.int8.HEIGHT`."""
GROWN = 2
"""A thread's scratch memory on a CPU has up to twice the bytes of what was asked for (`cpu.workspace`)."""
QUERIES, SHORTEST = 256, 512
"""Queries at a time of attention in int8 on a CPU, and its least tokens: those of `cpu.attention`."""
HEAD = 128
"""Channels of a head, as Z-Image has them."""
DECODING = 28 << 20
"""Bytes of scratch memory in which a thread of a CPU makes int8 rows of packed weights (`cpu.int8`)."""
GAIN, WIDE = 1.5, 1024
"""What `auto` asks of a device and of the width of layers: `cpu.capability.INT8_GAIN`, `nn.compute.WIDE`."""
SUM_BYTES = 64 << 20
"""Bytes of int32 sums at a time where torch multiplies int8 on a GPU: `quant.gpu_int8.SUM_BYTES`."""


def automatic(net: Part, rates: Rates) -> str:
    """What `compute="auto"` means for a network on a device with such rates; see `nn.compute.automatic`."""
    inside = [matrix for name, matrix in matrices(net) if in_int8(name)]
    packed = any(FORMATS[m.format].weights > 1 or FORMATS[m.format].nbytes == 1 for m in inside)
    wide = max((min(m.rows, m.width) for m in inside), default=0) >= WIDE
    if isinstance(net.config, TextEncoderConfig):
        return "exact"
    cpu = rates.architecture == "cpu"
    gain = rates.int8 / rates.flops32 if cpu else int8_gain(rates.architecture)
    return "int8" if packed and wide and gain >= GAIN else "exact"


def scratch_bytes(
    part: Part, tokens: int, dtype: str, architecture: str, kernels: bool, threads: int, int8: bool
) -> int:
    """Bytes that products with the weights of a network need beside x and result, at most.

    Args:
        part: The network.
        tokens: Rows of x.
        dtype: Dtype of the computation.
        architecture: As `quant.dispatch` knows it, or "cpu".
        kernels: Whether Triton kernels run on the GPU.
        threads: Threads of a CPU.
        int8: Whether the blocks multiply int8.

    Raises:
        Unsupported: The GPU multiplies no int8.
    """
    found = 0
    for name, matrix in matrices(part):
        if not int8 or not in_int8(name):
            found = max(found, matrix.scratch(dtype, kernels))
        elif architecture == "cpu":
            found = max(found, threads * _on_cpu(matrix, tokens))
        else:
            found = max(found, _on_gpu(matrix, tokens, architecture, kernels))
    if int8 and architecture == "cpu" and part.name == "transformer" and tokens >= SHORTEST:
        found += threads * _attention(tokens)
    return found


def _on_cpu(matrix: Matrix, tokens: int) -> int:
    """Bytes of a thread: int32 sums, int8 rows of a slab, and what quantises them."""
    rows = min(SLAB_ROWS, matrix.rows)
    return GROWN * rows * (FLOAT32 * tokens + matrix.width + FLOAT32) + DECODING


def _attention(tokens: int) -> int:
    """Bytes of a thread of a CPU for attention in int8: a head's operands, and scores of some queries."""
    operands = tokens * (HEAD * (2 + FLOAT32 + 2) + 2 * FLOAT32)
    scores = min(QUERIES, tokens) * tokens * (2 * FLOAT32 + 2)
    return GROWN * (operands + scores)


def _on_gpu(matrix: Matrix, tokens: int, architecture: str, kernels: bool) -> int:
    """Bytes of the int8 rows of a weight, and of sums where torch multiplies."""
    # a weight that is kept as rows comes to the device as it is in the file, one at a time
    rows = max(min(SCRATCH_BYTES, matrix.weights) + FLOAT32 * matrix.rows, matrix.nbytes)
    if not kernels:  # float32, rotated and scaled
        rows += 4 * FLOAT32 * min(matrix.weights, PLAIN_WEIGHTS)
    if kernels and int8_product(architecture) == "triton":
        return rows
    return rows + 2 * min(SUM_BYTES, FLOAT32 * tokens * matrix.rows)


def x_bytes(config: TransformerConfig | TextEncoderConfig, tokens: int, dtype: str, architecture: str) -> int:
    """Bytes of the widest activations as int8; on a CPU results are float32 before they are rounded."""
    wide = config.hidden_dim if isinstance(config, TransformerConfig) else config.intermediate_size
    out = FLOAT32 * wide if architecture == "cpu" and ITEMSIZE[dtype] < FLOAT32 else 0
    return tokens * (wide + FLOAT32 + out)


def choose(costs: Sequence[int], room: int | None, some: bool = True) -> list[int]:
    """Places in `costs` of what is kept as int8 rows: as many as room allows, spread evenly.

    More room never chooses fewer.

    Args:
        costs: Bytes that each would take beyond what it takes now; below zero where it then takes less.
        room: Bytes that there are; None for enough.
        some: False where it must be all or none.
    """
    if room is None or sum(costs) <= room:
        return list(range(len(costs)))
    if not some:
        return []
    saving = [place for place, cost in enumerate(costs) if cost <= 0]
    others = [place for place, cost in enumerate(costs) if cost > 0]
    room -= sum(costs[place] for place in saving)
    for count in range(len(others), -1, -1):
        chosen = [others[place] for place in spread(len(others), count)]
        if sum(costs[place] for place in chosen) <= room:
            return sorted((*saving, *chosen))
    return []
