"""Which type each tensor of a GGUF gets from a recipe, given what the source has and what its rows allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from zimage_core.export.checkpoint import Checkpoint, Target
from zimage_core.export.recipes import SOURCE, Recipe, fitting, layer_of
from zimage_core.export.streaming import Log
from zimage_core.formats import FORMATS, BlockFormat

SMALL = 1024
"""Tensors of at most so many weights are F32, as in every published file."""


def choose_formats(
    source: Checkpoint, targets: Sequence[Target], recipe: Recipe, log: Log | None = None
) -> dict[str, BlockFormat]:
    """Tensor -> the type that the recipe means for it; a type that does not divide the rows is replaced.

    Raises:
        BadArgument: No rule for a tensor.
    """
    numbers = [
        number for t in targets if (number := layer_of(t.name)) is not None and "refiner." not in t.name
    ]
    n_layers = max(numbers, default=-1) + 1
    formats: dict[str, BlockFormat] = {}
    replaced: Counter[tuple[str, str, int]] = Counter()
    for target in targets:
        wanted = recipe.type_of(target.name, n_layers) if is_matrix(target) else "F32"
        fmt = formats[target.name] = choose_format(source, target, wanted)
        if wanted not in (SOURCE, fmt.name) and is_matrix(target):
            replaced[wanted, fmt.name, target.columns] += 1
    if log is not None:
        for (wanted, got, columns), count in replaced.items():
            noun = "tensor has" if count == 1 else "tensors have"
            log(f"{count} {noun} rows of {columns}, which blocks of {wanted} do not divide: {got} instead")
    return formats


def choose_format(source: Checkpoint, target: Target, wanted: str) -> BlockFormat:
    """The type of one tensor: `wanted`, what fits its rows in its place, or what the source has."""
    if not is_matrix(target):
        return FORMATS["F32"]
    if wanted != SOURCE:
        return fitting(wanted, target.columns)
    stored = source.format_of(target)
    keeps = stored is not None and stored.ggml_type is not None and not source.is_scaled(target)
    if stored is None or not keeps or stored.name in ("F32", "F64"):
        return FORMATS["F16"]
    return stored


def is_matrix(target: Target) -> bool:
    """Whether a recipe decides about it; norms, biases, pad tokens and tiny tensors are F32."""
    return len(target.shape) > 1 and target.weights > SMALL and not target.name.endswith("pad_token")
