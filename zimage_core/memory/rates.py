"""How fast a machine copies and multiplies, and how many operations each network asks of it.

Rates are measured in a moment or known from a table; nothing of torch is imported before `measure` is called.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.errors import BadArgument
from zimage_core.memory.activations import image_tokens, padded
from zimage_core.quant.dispatch import ARCHITECTURES, family

if TYPE_CHECKING:
    import torch

PCIE = {3: 12.3e9, 4: 25e9, 5: 52e9}
"""Bytes a second from pinned host memory through 16 lanes of each generation, as assumed; 8 lanes of one
generation are 16 of the one before."""
DISK = 3.5e9
"""Bytes a second from an NVMe disk, as assumed."""
PAGEABLE = 0.5
"""Speed of a copy from ordinary memory over one from pinned memory, as assumed: the driver copies twice."""

CPU_FLOPS, CPU_BANDWIDTH = 3e11, 4e10
"""Operations, and bytes read and written, of a CPU in a second, as assumed for eight cores."""
CPU_INT8, CPU_BFLOAT16 = 4.0, 2.0
"""Rates of int8 and bfloat16 products of a CPU over float32's, as assumed: VNNI and AVX512-BF16."""

# generation of the slot that cards of a family stand in
_SLOT = {
    "sm_50": 3, "sm_70": 3, "sm_75": 3, "sm_80": 4, "sm_86": 4, "sm_89": 4, "sm_90": 5, "sm_100": 5,
    "sm_103": 5, "sm_120": 5, "gfx906": 3, "gfx942": 5, "gfx1030": 4, "gfx1100": 4, "gfx1201": 5,
}  # fmt: skip
_TF32 = 1 / 3
"""Rate of float32 convolutions over bfloat16 products where TF32 exists: half the peak, and less of it."""
_NO_TF32 = 1 / 5


@dataclass(frozen=True)
class Rates:
    """What the expected times are computed from.

    Args:
        flops: Operations a second in large 16-bit products with float32 sums.
        flops32: Operations a second in float32 convolutions and products.
        bandwidth: Bytes a second that a copy within device memory reads and writes.
        link: Bytes a second from pinned host memory to the device.
        pageable: Bytes a second from ordinary host memory to the device.
        disk: Bytes a second from the file to host memory.
        architecture: As `quant.dispatch` knows it.
        source: "measured", or what they were taken from.
        int8: Operations a second in large int8 products; 0 where there are none.
    """

    flops: float
    flops32: float
    bandwidth: float
    link: float
    pageable: float
    disk: float = DISK
    architecture: str = "sm_86"
    source: str = ""
    int8: float = 0.0

    def __post_init__(self) -> None:
        """Refuse rates that no time can be divided by."""
        for name in ("flops", "flops32", "bandwidth", "link", "pageable", "disk"):
            if not 0 < getattr(self, name) < float("inf"):
                raise BadArgument(f"rates: {name} is {getattr(self, name)!r}, wanted a positive number")


def known(architecture: str, link: float | None = None) -> Rates:
    """Rates of a family of GPUs, from the table of `quant.dispatch` and the slot that it usually stands in.

    Args:
        architecture: "sm_86", "gfx1100" ...; others map to the nearest older one; or "cpu".
        link: Bytes per second from host memory, if known.

    Raises:
        BadArgument: The architecture is not known, or the link not positive.
    """
    if architecture == "cpu":
        if link is not None:
            raise BadArgument("link: on a CPU nothing is moved to a GPU; leave it out")
        half = CPU_BFLOAT16 * CPU_FLOPS
        speeds = (half, CPU_FLOPS, CPU_BANDWIDTH, CPU_BANDWIDTH / 2, CPU_BANDWIDTH / 2)
        source = "eight cores with VNNI and BF16 assumed"
        return Rates(*speeds, architecture="cpu", source=source, int8=CPU_INT8 * CPU_FLOPS)
    name = family(architecture)
    found, slot = ARCHITECTURES[name], _SLOT[name]
    speed = PCIE[slot] if link is None else link
    wide = _TF32 if name.startswith("sm_") and int(name[3:]) >= 80 else _NO_TF32
    return Rates(
        flops=found.tensor_flops,
        flops32=found.tensor_flops * wide,
        bandwidth=found.bandwidth,
        link=speed,
        pageable=speed * PAGEABLE,
        architecture=architecture,
        int8=found.int8_ops,
        source=f"table of {name}, " + (f"PCIe {slot} x16 assumed" if link is None else "link as given"),
    )


def measure(device: str | torch.device, seconds: float = 0.05) -> Rates:
    """Rates of this machine by small timed runs.

    Args:
        device: A CUDA GPU, or the CPU: then both links are a copy in memory.
        seconds: For each of four to five runs, about.
    """
    import torch

    where = torch.device(device)
    gpu = where.type == "cuda"
    size, side = (64 << 20, 4096) if gpu else (32 << 20, 768)
    target = torch.empty(size, dtype=torch.uint8, device=where)

    def wait() -> None:
        if gpu:
            torch.cuda.synchronize(where)

    def product(dtype: torch.dtype) -> float:
        x = torch.ones(side, side, dtype=dtype, device=where)
        return 2 * side**3 / _timed(lambda: x @ x, seconds, wait)

    def copy(source: torch.Tensor) -> float:
        return size / _timed(lambda: target.copy_(source, non_blocking=True), seconds, wait)

    ordinary, single = copy(torch.empty(size, dtype=torch.uint8)), product(torch.float32)
    if not gpu:
        from zimage_core.cpu.capability import rates as cpu_rates

        found = cpu_rates()
        half, eighth = (single * rate / max(found.float32, 1e-9) for rate in (found.bfloat16, found.int8))
        moves = (2 * ordinary, ordinary, ordinary)
        return Rates(max(half, single), single, *moves, architecture="cpu", source="measured", int8=eighth)
    from zimage_core.quant.gpu import architecture

    name = architecture(where)
    half = product(torch.bfloat16 if torch.cuda.get_device_capability(where)[0] >= 8 else torch.float16)
    return Rates(
        flops=half,
        # convolutions use TF32 where there is one, plain products do not unless asked to
        flops32=max(single, half * (known(name).flops32 / known(name).flops)),
        int8=half * (known(name).int8 / known(name).flops),
        bandwidth=2 * copy(torch.empty_like(target)),
        link=copy(torch.empty(size, dtype=torch.uint8, pin_memory=True)),
        pageable=ordinary,
        architecture=name,
        source="measured",
    )


def _timed(work: Callable[[], object], seconds: float, wait: Callable[[], None]) -> float:
    """Seconds that one call of `work` takes, the best of those that fit into the time."""
    work()
    wait()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        work()
        wait()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return max(best, 1e-9)


def _all_blocks(
    config: TransformerConfig, height: int, width: int, caption: int, of_block: Callable[[int], int]
) -> int:
    """The sum of a function of a block's tokens over the blocks of one call of the transformer."""
    image, text = padded(image_tokens(config, height, width)), padded(caption)
    refiners = config.n_refiner_layers * (of_block(image) + of_block(text))
    return refiners + config.n_layers * of_block(image + text)


def step_flops(config: TransformerConfig, height: int, width: int, caption: int) -> int:
    """Operations of one call of the transformer on latents of height x width and a caption.

    A product of M, N and K counts 2 M N K, here and in the other counts.
    """
    attention = _all_blocks(config, height, width, caption, lambda tokens: 4 * tokens * tokens * config.dim)
    return attention + step_products(config, height, width, caption)


def step_products(config: TransformerConfig, height: int, width: int, caption: int) -> int:
    """Those of `step_flops` that are products with weights."""
    linear = 4 * config.dim**2 + 3 * config.dim * config.hidden_dim
    return _all_blocks(config, height, width, caption, lambda tokens: 2 * tokens * linear)


def step_traffic(config: TransformerConfig, height: int, width: int, caption: int, item: int) -> int:
    """Bytes that the element-wise steps of a call read and write: two norms, two gates, rotation, SwiGLU."""
    image = padded(image_tokens(config, height, width))
    tokens = config.n_refiner_layers * image + config.n_layers * (image + padded(caption))
    return item * tokens * (14 * config.dim + 3 * config.hidden_dim)


def encode_flops(config: TextEncoderConfig, tokens: int) -> int:
    """Operations of the text encoder on one caption, causal attention counted whole."""
    attention = 4 * tokens * tokens * config.num_heads * config.head_dim
    return (config.num_layers - 1) * attention + encode_products(config, tokens)


def encode_products(config: TextEncoderConfig, tokens: int) -> int:
    """Those of `encode_flops` that are products with weights."""
    q, k = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linear = 2 * config.hidden_size * (q + k) + 3 * config.hidden_size * config.intermediate_size
    return (config.num_layers - 1) * 2 * tokens * linear


def decode_flops(config: AutoencoderConfig, height: int, width: int) -> int:
    """Operations of one VAE decode of latents of height x width at once."""
    widths = config.block_out_channels[::-1]
    pixels, wide = height * width, widths[0]
    weights = pixels * 9 * (config.latent_channels * wide + 4 * wide * wide) + pixels * 4 * wide * wide
    attention = 4 * pixels * pixels * wide
    before = wide
    for level, channels in enumerate(widths):
        first = 9 * (before + channels) * channels + (before * channels if before != channels else 0)
        weights += pixels * (first + config.layers_per_block * 18 * channels * channels)
        if level < len(widths) - 1:
            pixels *= 4
            weights += pixels * 9 * channels * channels
        before = channels
    return 2 * (weights + pixels * 9 * before * config.out_channels) + attention
