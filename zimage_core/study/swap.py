"""Temporarily replaces weights of a loaded transformer by the same weights in another format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.export.recipes import SOURCE, fitting
from zimage_core.formats import by_name
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.nn.linear import Linear
from zimage_core.quant.tensor import QuantTensor
from zimage_core.quantize.encode import encode
from zimage_core.quantize.imatrix import Imatrix
from zimage_core.weights.names import Table, transformer_table

Stored = Mapping[Linear, QuantTensor]


def linear_weights(net: nn.Module, table: Table) -> Iterator[tuple[str, str]]:
    """(name of the module, tensor of the file) of every Linear weight of a network."""
    modules = dict(net.named_modules())
    for entry in table:
        module, _, leaf = entry.module.rpartition(".")
        if leaf == "weight" and isinstance(modules.get(module), Linear):
            yield module, entry.checkpoint


def matrices(transformer: ZImageTransformer) -> dict[str, tuple[Linear, ...]]:
    """GGUF tensor -> the layers whose weights it holds, in the order of its rows.

    Each tensor belongs to one layer, except for q, k and v of an attention, which are one tensor in GGUF
    files.
    """
    found: dict[str, list[Any]] = {}
    for module, name in linear_weights(transformer, transformer_table(transformer.config, "fused")):
        found.setdefault(name, []).append(transformer.get_submodule(module))
    return {name: tuple(layers) for name, layers in found.items()}


def dense(layer: Linear) -> Tensor:
    """The weight of a layer, float32 [out_features, in_features]."""
    if isinstance(layer.weight, QuantTensor):
        return layer.weight.dequantize(torch.float32)
    return layer.weight.detach().float()


def encode_layers(
    layers: Sequence[Linear], fmt: str, importance: Tensor | None = None
) -> dict[Linear, QuantTensor]:
    """The weights of layers in another format.

    Args:
        layers: Layers whose weights have the same number of columns.
        fmt: Name of the format.
        importance: Float [in_features], as for `zimage_core.encode`.

    Raises:
        BadShape, BadWeights, Unsupported: `zimage_core.encode` refuses the weights or the format.
    """
    found = {}
    for layer in layers:
        weight = dense(layer)
        packed = encode(weight, fmt, None if importance is None else importance.to(weight.device))
        found[layer] = QuantTensor(packed, by_name(fmt), tuple(weight.shape))
    return found


def encode_all(
    transformer: ZImageTransformer, types: Mapping[str, str], imatrix: Imatrix | None = None
) -> dict[Linear, QuantTensor]:
    """Encode every tensor in `types` as for a file, with the importance from the imatrix if it has an entry.

    As in a file, a type whose blocks do not divide the rows is replaced, and "source" leaves a tensor
    unchanged.
    """
    layers, found = matrices(transformer), {}
    for name, wanted in types.items():
        if wanted != SOURCE:
            fmt = fitting(wanted, layers[name][0].in_features).name
            found.update(encode_layers(layers[name], fmt, importance_of(imatrix, name)))
    return found


def importance_of(imatrix: Imatrix | None, name: str) -> Tensor | None:
    """Importance of a tensor, float32 [K]; None if there is no entry for it."""
    return None if imatrix is None else imatrix.importance(name)


@contextmanager
def stored_as(weights: Stored) -> Iterator[None]:
    """Context in which layers use other weights; their own are restored at the end."""
    own: dict[Linear, nn.Parameter | QuantTensor] = {}
    try:
        for layer, quant in weights.items():
            own[layer] = layer.set_weight(quant)
        yield
    finally:
        for layer, weight in own.items():
            layer.set_weight(weight)
