"""The largest size of a file that fits a GPU (`--fit`), and the types for a wanted size (`--size`).

Types are chosen by measured costs, or by a rule of thumb if nothing was measured. By that rule the cost of a
tensor is its number of weights, times the mean square error of the type relative to the weights, times a
factor for its part of a block. The errors are those of a Gaussian matrix. The factors follow the standard
mixes: qkv, and above all the output of the feed-forward network, get more bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from os import PathLike

from zimage_core.config import AutoencoderConfig, TransformerConfig
from zimage_core.errors import BadArgument, OverBudget, WrongModel, printable
from zimage_core.export.budget import Option, assign
from zimage_core.export.checkpoint import Checkpoint, Target
from zimage_core.export.metadata import gguf_metadata, recipe_keys
from zimage_core.export.mixes import KEPT, TEXT_PARTS, TRANSFORMER_PARTS
from zimage_core.export.recipes import SOURCE, Recipe, choose_format, is_matrix
from zimage_core.export.sensitivity import Sensitivity
from zimage_core.files.units import in_bytes
from zimage_core.memory.activations import denoise_bytes
from zimage_core.memory.allocator import GAPS, SMALL_SEGMENTS, WORKSPACE
from zimage_core.quant.dispatch import SCRATCH_BYTES
from zimage_core.weights import gguf_writer

RELATIVE_ERROR = {
    "IQ1_S": 0.4452, "IQ2_XXS": 0.3272, "IQ2_S": 0.2381, "IQ3_XXS": 0.1763,
    "Q2_K": 0.2588, "Q3_K": 0.1435, "Q4_K": 0.0692, "Q5_K": 0.0339, "Q6_K": 0.0164, "Q8_0": 0.0054,
}  # fmt: skip
"""Root mean square error of a type over the root mean square of Gaussian weights, without importance.
Source: benchmarks/results/quality.json, `random`."""
FAST = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
"""Types to choose from. The IQ types, which are slow to encode, are added only if these do not fit."""

FACTORS = {
    TRANSFORMER_PARTS["down"]: 4.0,
    TRANSFORMER_PARTS["qkv"]: 2.0,
    TEXT_PARTS["v"]: 4.0,
    TEXT_PARTS["down"]: 2.0,
    "token_embd.weight": 4.0,
    "output.weight": 4.0,
}
"""Pattern of tensors -> estimated factor of the cost of their errors."""

_ATTEMPTS = 4

CAPTION = 128
"""Tokens of a caption, as assumed by `zimage plan`."""
STEPS = 8
"""Steps of an image, as assumed by `zimage plan`."""


def recipe_for_size(
    source: Checkpoint, targets: Sequence[Target], size: int, sensitivity: Sensitivity | None = None
) -> Recipe:
    """The recipe of a GGUF of at most `size` bytes.

    Args:
        source: The checkpoint.
        targets: Its tensors, with their names in a GGUF.
        size: Bytes of the whole file.
        sensitivity: Measured costs; tensors without costs keep their type. None uses the rule of thumb.

    Raises:
        WrongModel: The sensitivity was measured on another model.
        OverBudget: The smallest possible file is larger; the message has its size.
    """
    costs = None if sensitivity is None else _measured(sensitivity, source, targets)
    free = [t for t in targets if is_matrix(t) and (t.name in costs if costs else not _kept(source, t.name))]
    kept = {t.name for t in targets} - {t.name for t in free}
    how = "by measured costs" if costs else "by a rule of thumb"
    metadata = gguf_metadata(source)

    def layout(types: Mapping[str, str]) -> tuple[Recipe, gguf_writer.Layout]:
        # the header holds the recipe, so its size depends on the types
        recipe = Recipe.of_types(f"{size} bytes", types, (f"types for {in_bytes(size)}, {how}",))
        rows = [
            (t.name, t.shape, choose_format(source, t, recipe.type_of(t.name, 0) if is_matrix(t) else "F32"))
            for t in targets
        ]
        return recipe, gguf_writer.lay_out(metadata | recipe_keys(recipe), rows)

    _, draft = layout({t.name: "IQ2_XXS" for t in free})
    fixed = len(draft.header) + sum(_padded(draft.places[name][1]) for name in kept)
    options = {t.name: _options(source, t, costs[t.name] if costs else _guessed(t, FAST)) for t in free}
    if costs is None and fixed + _smallest(options) > size:
        options = {t.name: _options(source, t, _guessed(t, tuple(RELATIVE_ERROR))) for t in free}
    least = fixed + _smallest(options)
    if least > size:
        raise OverBudget(
            f"size: {in_bytes(size)} do not hold this model; the smallest possible is {least} bytes "
            f"({in_bytes(least)}), of which {in_bytes(fixed)} are tensors that stay as they are"
        )
    spare = 0
    for _ in range(_ATTEMPTS):
        recipe, found = layout(assign(options, size - fixed - spare).types)
        if found.nbytes <= size:
            return recipe
        spare += found.nbytes - size
    raise OverBudget(f"size: no choice of types came to {in_bytes(size)} or less; allow a little more")


def _kept(source: Checkpoint, name: str) -> bool:
    return source.component == "transformer" and any(fnmatchcase(name, pattern) for pattern in KEPT)


def _measured(
    sensitivity: Sensitivity, source: Checkpoint, targets: Sequence[Target]
) -> dict[str, dict[str, float]]:
    """Tensor -> type -> measured cost; refuses costs of another model."""
    if unknown := sorted(set(sensitivity.costs) - {t.name for t in targets}):
        raise WrongModel(
            source.file.path,
            f"the sensitivity is that of another model, with costs for {printable(unknown[0], 120)}",
            "measure this one with `zimage sensitivity`",
        )
    return sensitivity.costs


def _guessed(target: Target, types: Sequence[str]) -> dict[str, float]:
    """Type -> cost by the rule of thumb."""
    factor = next((f for pattern, f in FACTORS.items() if fnmatchcase(target.name, pattern)), 1.0)
    return {name: factor * target.weights * RELATIVE_ERROR[name] ** 2 for name in types}


def _options(source: Checkpoint, target: Target, costs: Mapping[str, float]) -> list[Option]:
    """The choices for one tensor: each type at its cost, and the source's type, which costs nothing."""
    found = []
    for name, cost in (*costs.items(), (SOURCE, 0.0)):
        fmt = choose_format(source, target, name)
        kept = SOURCE if name == SOURCE else fmt.name
        found.append(Option(kept, _padded(target.rows * fmt.row_bytes(target.columns)), cost))
    return found


def _smallest(options: Mapping[str, Sequence[Option]]) -> int:
    return sum(min(option.nbytes for option in row) for row in options.values())


def _padded(nbytes: int) -> int:
    return -(-nbytes // gguf_writer.ALIGNMENT) * gguf_writer.ALIGNMENT


def largest_transformer(
    path: str | PathLike[str], vram: int, width: int, height: int, dtype: str = "bfloat16"
) -> int:
    """Bytes of the largest transformer whose weights all stay on the GPU while it denoises one image.

    The other memory of a step is counted as in `memory.plan`: activations, one dense matrix at a time, and
    the workspace of libraries. The text encoder and the VAE are not in memory at the same time
    (docs/guides/memory.md).

    Args:
        path: The checkpoint of a transformer, in any type: only the sizes of its network are used.
        vram: Memory of the GPU in bytes.
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        dtype: Type of the computation.

    Raises:
        BadArgument: The checkpoint is no transformer, or width or height is not a multiple of 16.
        OverBudget: The steps alone need more memory.
    """
    with Checkpoint(path, "transformer") as checkpoint:
        config = checkpoint.config
    if not isinstance(config, TransformerConfig):
        raise BadArgument("fit: wanted the checkpoint of a transformer")
    factor = AutoencoderConfig().spatial_factor
    multiple = factor * config.patch_size
    if width < 1 or height < 1 or width % multiple or height % multiple:
        raise BadArgument(f"fit: got {width} x {height} px, wanted multiples of {multiple}")
    live = denoise_bytes(config, height // factor, width // factor, CAPTION, dtype, 1, 1, STEPS)
    around = int((1 + GAPS["denoise"]) * live) + SCRATCH_BYTES + max(WORKSPACE.values()) + SMALL_SEGMENTS
    if vram <= around:
        raise OverBudget(
            f"fit: {in_bytes(vram)} of GPU memory do not hold the steps of {width} x {height} px, which take "
            f"{in_bytes(around)} beside the weights; make a smaller image"
        )
    return vram - around
