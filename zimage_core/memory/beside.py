"""ControlNets, adapters and the vision tower in a budget.

ControlNets are on the device in the phase of the steps alone: whole where that leaves enough for the
transformer, else block by block as its own blocks are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from zimage_core.memory.activations import image_tokens, padded
from zimage_core.memory.attach import blocks_of, stream_model, unstream
from zimage_core.memory.nets import Net
from zimage_core.memory.references import References
from zimage_core.memory.sizes import Matrix, Sizes
from zimage_core.memory.stream import Stream
from zimage_core.memory.tower import Tower
from zimage_core.memory.traffic import Traffic
from zimage_core.nn.linear import Linear, tensors_of
from zimage_core.quant.tensor import QuantTensor
from zimage_core.weights.opened import Opened


def weighed(net: Any) -> Net:
    """What a ControlNet on the host weighs."""
    moving = tuple(block.nbytes for block in blocks_of(net.blocks, (), torch.device("cpu")))
    always = sum(tensor.nbytes for tensor in tensors_of(net)) - sum(moving)
    return Net(always, moving, tuple(_packed(net)))


def adapted(sizes: Sizes, networks: Mapping[str, Any], width: int, height: int, caption: int) -> Sizes:
    """The sizes with what the adapters of the networks take: factors on the device, the files on the host.

    Args:
        sizes: Those of the files.
        networks: The pipeline's networks by name.
        width: Pixels of an image.
        height: Pixels of an image.
        caption: Tokens of the caption.
    """
    net, factor, held = networks["transformer"], networks["vae"].config.spatial_factor, 0
    rows = padded(image_tokens(net.config, height // factor, width // factor)) + padded(caption)
    for name in ("text_encoder", "transformer"):
        applied = getattr(networks[name], "adapted", None)
        if applied is not None:
            held += applied.host_bytes()
            part = getattr(sizes, name)
            more = replace(part, always=part.always + applied.device_bytes(rows))
            sizes = replace(sizes, **{name: more})
    return replace(sizes, transformer=replace(sizes.transformer, host=held)) if held else sizes


def tower_of(network: Any, references: References) -> Tower:
    """The vision tower of a run as a plan counts it, from the network on the host."""
    net, dtype = weighed(network), str(network.dtype).removeprefix("torch.")
    scratch = max((matrix.scratch(dtype) for matrix in net.matrices), default=0)
    return Tower(network.config, net.always, net.blocks, max(references.features), dtype, scratch)


@contextmanager
def on(
    nets: Mapping[str, Any], device: torch.device, ring: int, streamed: bool, traffic: dict[str, Traffic]
) -> Iterator[None]:
    """Inside, these networks are on the device; what was moved of each is told in `traffic` by its name."""
    with ExitStack() as stack:
        for name, net in nets.items():
            file = net.opened.file if isinstance(net.opened, Opened) else None
            resident = () if streamed else range(len(net.blocks))
            stream = stream_model(net, file, resident, device, ring=ring)
            stack.callback(_off, name, net, stream, traffic)
        yield


def _off(name: str, net: Any, stream: Stream, traffic: dict[str, Traffic]) -> None:
    traffic[name] = stream.traffic()
    unstream(net)


def _packed(net: nn.Module) -> Iterator[Matrix]:
    for module in net.modules():
        if isinstance(module, Linear) and isinstance(weight := module.weight, QuantTensor):
            rows, width = weight.shape
            yield Matrix(weight.format.name, rows, width, weight.scale is not None)
