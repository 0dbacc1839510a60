"""Whether a step waits for the host, so that recording it as a CUDA graph makes it faster."""

from __future__ import annotations

import torch

from zimage_core.errors import BadArgument
from zimage_core.memory.activations import ITEMSIZE, step_bytes
from zimage_core.memory.rates import known, step_flops, step_products, step_traffic
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.nn.linear import packed_weights
from zimage_core.quant.gpu import architecture, free_bytes
from zimage_core.quant.int8 import is_int8

HOST = 0.9e-3
"""Seconds that the host takes to launch a block, as assumed: 0.4 ms of Python, measured on a server's core,
and 0.06 ms of the driver, twice over for slower and busier hosts."""
AFTER = 8
"""Steps with the same shapes before they are recorded, which takes as long as three more: one image of eight
steps is not slowed down."""
RESERVE = 2 << 30
"""Bytes of GPU memory that stay free for the decoder beside a recorded step."""


def device_seconds(
    transformer: ZImageTransformer, height: int, width: int, caption: int, architecture: str
) -> float:
    """Time of a step on a GPU in the network's arithmetic, by the rates of `memory.rates`.

    Args:
        transformer: The network with its weights, dense or packed.
        height: Height of the image in latents.
        width: Width of the image in latents.
        caption: Tokens of the caption, without pads.
        architecture: As `quant.dispatch` knows it.

    Raises:
        BadArgument: The architecture is not known.
    """
    sizes, item = (transformer.config, height, width, caption), transformer.dtype.itemsize
    rates, products = known(architecture), step_products(*sizes)
    in_int8 = transformer.compute == "int8" and rates.int8 > 0
    packed = [
        w for block in transformer.blocks for w in packed_weights(block) if not (in_int8 and is_int8(w))
    ]
    made = 1 if in_int8 else item
    unpacked = sum(weight.nbytes + weight.shape[0] * weight.shape[1] * made for weight in packed)
    moved = step_traffic(*sizes, item) + unpacked
    multiplied = products / (rates.int8 if in_int8 else rates.flops)
    return multiplied + (step_flops(*sizes) - products) / rates.flops + moved / rates.bandwidth


def pays(transformer: ZImageTransformer, height: int, width: int, caption: int) -> bool:
    """Whether the GPU would wait for the host in steps of these sizes; only NVIDIA's are asked."""
    device = transformer.device
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    try:
        seconds = device_seconds(transformer, height, width, caption, architecture(device))
    except BadArgument:  # a GPU older than any of the table
        return False
    return seconds <= HOST * len(transformer.blocks)


def has_room(transformer: ZImageTransformer, height: int, width: int, caption: int) -> bool:
    """Whether the GPU has memory for a recorded step, and then for the decoder."""
    device, dtype = transformer.device, str(transformer.dtype).removeprefix("torch.")
    if dtype not in ITEMSIZE:
        return False
    return free_bytes(device) >= step_bytes(transformer.config, height, width, caption, dtype) + RESERVE
