"""Measures the error in the predicted velocity that quantising each tensor causes.

One tensor at a time is stored in one type at a time, while all others are unchanged, and the transformer
repeats calls that were recorded while images were generated. The cost is the squared error of the velocity
divided by its square. Costs of several tensors add up if their errors are independent and small;
docs/guides/recipes.md shows how well that holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from zimage_core.errors import BadArgument, printable
from zimage_core.export.mixes import KEPT
from zimage_core.export.recipes import TYPES, fitting
from zimage_core.export.sensitivity import Sensitivity
from zimage_core.export.sizing import FAST
from zimage_core.nn.linear import Linear
from zimage_core.pipeline import ZImagePipeline
from zimage_core.quant.tensor import QuantTensor
from zimage_core.quantize.imatrix import Imatrix
from zimage_core.study.swap import dense, encode_layers, importance_of, matrices, stored_as
from zimage_core.study.velocity import Call, check_whole, velocity_error

OnTensor = Callable[[int, int, str], None]
"""(measurements done, measurements in all, tensor) -> None."""
OnCosts = Callable[[Sensitivity], None]
"""Function that is called with the costs measured so far."""


def candidates(pipe: ZImagePipeline, every_tensor: bool = False) -> dict[str, tuple[Linear, ...]]:
    """Tensors whose type a search may choose -> their layers.

    Args:
        pipe: The pipeline with the transformer.
        every_tensor: Include the tensors that standard mixes do not quantise: embedders, refiners, final
            layer.
    """

    def kept(name: str) -> bool:
        return not every_tensor and any(fnmatchcase(name, pattern) for pattern in KEPT)

    return {name: layers for name, layers in matrices(pipe.transformer).items() if not kept(name)}


def check_types(types: Sequence[str]) -> None:
    """Raise BadArgument for a name that is no type of a GGUF."""
    for name in types:
        if name not in TYPES:
            raise BadArgument(f"unknown type {printable(name, 40)!r}; known are {', '.join(TYPES)}")


def check_imatrix(pipe: ZImagePipeline, imatrix: Imatrix | None, every_tensor: bool = False) -> None:
    """Raise WrongModel for an importance matrix of another model than the pipeline's."""
    if imatrix is not None:
        tensors = candidates(pipe, every_tensor)
        imatrix.check_fits({name: layers[0].in_features for name, layers in tensors.items()})


def measure(
    pipe: ZImagePipeline,
    calls: Sequence[Call],
    types: Sequence[str] = FAST,
    *,
    imatrix: Imatrix | None = None,
    probe: str | None = None,
    every_tensor: bool = False,
    settings: Mapping[str, Any] | None = None,
    on_tensor: OnTensor | None = None,
    on_costs: OnCosts | None = None,
) -> Sensitivity:
    """Measure the cost of each type for each tensor.

    Args:
        pipe: The model that the calls were recorded from; all of it must be in memory.
        calls: Calls from `velocity.record`.
        types: Names of formats; one whose blocks do not divide a tensor's rows is measured as its fallback.
        imatrix: Importance for the encoders, as it will be used for the file.
        probe: Measure only this type, and scale its cost to the others by the ratio of their weight errors,
            weighted with the importance. A model of 180 tensors then needs 180 measurements instead of 180
            for each type.
        every_tensor: Include the tensors that the standard mixes do not quantise.
        settings: Conditions of the measurement, written into the file.
        on_tensor: Called before each measurement; an exception in it ends the work.
        on_costs: Called after each tensor.

    Returns:
        The costs of all tensors.

    Raises:
        BadArgument: A type is unknown, or there are no calls.
        Unsupported: The pipeline has a memory limit or captured steps.
        WrongModel: The imatrix belongs to another model.
    """
    check_types((*types, *(() if probe is None else (probe,))))
    if not calls or not types:
        raise BadArgument("sensitivity: wanted at least one recorded call and one type")
    check_whole(pipe)
    tensors = candidates(pipe, every_tensor)
    check_imatrix(pipe, imatrix, every_tensor)
    runs = len(tensors) * (1 if probe else len(types))
    costs: dict[str, dict[str, float]] = {}
    done = 0
    for name, layers in tensors.items():
        importance = importance_of(imatrix, name)
        measured: dict[str, float] = {}

        def cost(fmt: str, name: str = name, layers: Sequence[Linear] = layers) -> float:
            nonlocal done
            if on_tensor is not None:
                on_tensor(done, runs, name)
            done += 1
            with stored_as(encode_layers(layers, fmt, importance_of(imatrix, name))):
                return velocity_error(pipe.transformer, calls)

        # the type that the rows allow; several types may have the same fallback
        stored = {fmt: fitting(fmt, layers[0].in_features).name for fmt in types}
        if probe is None:
            for fmt in stored.values():
                if fmt not in measured:
                    measured[fmt] = cost(fmt)
        else:
            first = fitting(probe, layers[0].in_features).name
            unit = weight_error(layers, encode_layers(layers, first, importance), importance)
            per_error = cost(first) / unit if unit else 0.0
            for fmt in set(stored.values()):
                packed = encode_layers(layers, fmt, importance)
                measured[fmt] = per_error * weight_error(layers, packed, importance)
        costs[name] = {fmt: measured[actual] for fmt, actual in stored.items()}
        if on_costs is not None:
            on_costs(Sensitivity(dict(costs), dict(settings or {})))
    return Sensitivity(costs, dict(settings or {}))


def weight_error(
    layers: Sequence[Linear], packed: Mapping[Linear, QuantTensor], importance: Tensor | None
) -> float:
    """Sum over the layers of importance * squared error of the weights."""
    total = 0.0
    for layer in layers:
        wrong = (packed[layer].dequantize(torch.float32) - dense(layer)).square()
        total += float((wrong if importance is None else wrong * importance.to(wrong.device)).double().sum())
    return total
