"""Sets `compute=` of a network, and decides what "auto" means for it; `quant.arithmetic` has the modes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from zimage_core.cpu import capability
from zimage_core.nn.linear import Linear
from zimage_core.quant import dispatch, gpu, int8
from zimage_core.quant.arithmetic import EXACT, arithmetic_of
from zimage_core.quant.tensor import QuantTensor

if TYPE_CHECKING:
    from collections.abc import Iterator

WIDE = 1024
"""Least width of a layer for which `auto` chooses int8; below it quantising x costs what is saved."""


def set_compute(network: nn.Module, mode: str, device: torch.device) -> str:
    """Let the layers of a network's blocks multiply in a mode.

    Args:
        network: S3-DiT or text encoder.
        mode: One of `quant.arithmetic.MODES`.
        device: Where it will compute; `auto` asks what that device gains.

    Returns:
        The mode, with "auto" decided: "exact", "bfloat16" or "int8". The network keeps it as `compute`, and
        what was asked for as `asked`.
    """
    network.asked = mode  # type: ignore[assignment]
    if mode == "auto":
        mode = automatic(network, device)[0]
    for name, layer in _layers(network):
        layer.arithmetic = arithmetic_of(name, mode)
    network.compute = mode  # type: ignore[assignment]
    return mode


def automatic(network: nn.Module, device: torch.device) -> tuple[str, str]:
    """What `auto` chooses for a network, and why in a few words."""
    layers = [layer for name, layer in _layers(network) if arithmetic_of(name, "int8") != EXACT]
    if not any(_packed(layer) for layer in layers):
        return "exact", "the weights are not packed"
    if max(min(layer.in_features, layer.out_features) for layer in layers) < WIDE:
        return "exact", "the network is too small to gain from int8"
    if getattr(network, "few_rows", False):
        return "exact", "a prompt has few tokens, so that most of the time goes into unpacking the weights"
    return automatic_on(device)


def automatic_on(device: torch.device) -> tuple[str, str]:
    """What `auto` chooses on a device for a network of full size with packed weights, and why."""
    gain, where = gain_of(device)
    than = f"{gain:.1f} times as fast as {'16 bits' if device.type == 'cuda' else 'float32'} on {where}"
    return ("exact", f"int8 is {than}") if gain < capability.INT8_GAIN else ("int8", than)


def gain_of(device: torch.device) -> tuple[float, str]:
    """How many times as fast a device multiplies int8 as it does otherwise, and the name of the device."""
    if device.type == "cuda":
        name = gpu.architecture(device)
        return dispatch.int8_gain(name), name
    if device.type != "cpu":
        return 1.0, device.type
    rates = capability.rates()
    return rates.int8 / max(rates.float32, 1e-9), f"this CPU ({capability.features()})"


def _layers(network: nn.Module) -> Iterator[tuple[str, Linear]]:
    for name, module in network.named_modules():
        if isinstance(module, Linear):
            yield name, module


def _packed(layer: Linear) -> bool:
    """Whether a weight has fewer than 16 bits a number."""
    weight = layer.weight
    if not isinstance(weight, QuantTensor):
        return False
    return weight.format.weights > 1 or weight.format.nbytes == 1 or int8.is_int8(weight)
