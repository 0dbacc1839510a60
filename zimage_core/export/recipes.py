"""Recipes give each tensor a type by lines `PATTERN [LAYERS] = TYPE`, of which the first match decides.

    # more bits where the residual stream is written
    cap_embedder.* = source
    *.feed_forward.w2.weight [first 1/8] = Q6_K
    *.attention.qkv.weight [0-3,29] = Q5_K
    * = Q4_K

Patterns match whole tensor names, with `*`, `?` and `[...]` as in a shell, which also match dots. A type is a
name of zimage_core.formats; `source` keeps the checkpoint's type (float32 becomes F16). LAYERS selects blocks
by the number in the name: numbers and ranges, `first 1/N`, `last 1/N`, or `spread`: the first and the last
eighth and every third block between. Tensors of one dimension and pad tokens are always F32; a recipe cannot
change that.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os import PathLike, fspath
from pathlib import Path

from zimage_core.errors import BadArgument, BadFile, printable
from zimage_core.export.checkpoint import Checkpoint, Target
from zimage_core.files.atomic import write_atomically
from zimage_core.files.untrusted import lines, read_text
from zimage_core.formats import FORMATS, BlockFormat

SOURCE = "source"
"""The type of a rule that keeps the checkpoint's type."""
SMALL = 1024
"""Tensors of at most this many weights are F32, as in every published file."""

NOT_STORED = ("F8_E4M3", "F8_E5M2", "Q2_0_128", "F64", "I8", "I16", "I32", "I64")
TYPES = tuple(name for name in FORMATS if name not in NOT_STORED)
"""Types that a recipe may name."""

MAX_RECIPE = 1 << 20
MAX_RULES = 10_000

_RULE = re.compile(r"(?P<pattern>\S+)(?:\s+\[(?P<layers>[^\]]*)\])?\s*=\s*(?P<type>\S+)")
_LAYER = re.compile(r"(?:^|\.)(?:layers|blk|noise_refiner|context_refiner)\.(\d{1,4})\.")
_SHARE = re.compile(r"(first|last) 1/([1-9]\d?)")
_RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")

Layers = Callable[[int, int], bool]
"""(layer, number of layers) -> whether a rule applies."""


@dataclass(frozen=True)
class Rule:
    """One line of a recipe.

    Args:
        pattern: Shell pattern of tensor names.
        type: A name in `TYPES`, or "source".
        layers: Blocks, as written between the brackets; "" for all.

    Raises:
        BadArgument: The type is unknown, or `layers` has none of the forms above.
    """

    pattern: str
    type: str
    layers: str = ""

    def __post_init__(self) -> None:
        if self.type != SOURCE and self.type not in TYPES:
            raise BadArgument(
                f"unknown type {printable(self.type, 40)!r}; known are {', '.join(TYPES)}, source"
            )
        layer_set(self.layers)

    def applies(self, name: str, n_layers: int) -> bool:
        """Whether the tensor `name`, in a stack of `n_layers` blocks, gets this rule's type."""
        if not fnmatchcase(name, self.pattern):
            return False
        if not self.layers:
            return True
        number = layer_of(name)
        return number is not None and layer_set(self.layers)(number, n_layers)

    def __str__(self) -> str:
        return f"{self.pattern}{f' [{self.layers}]' if self.layers else ''} = {self.type}"


@dataclass(frozen=True)
class Recipe:
    """Rules in order.

    Args:
        name: Name for display and for the file's metadata, such as "Q4_K_M".
        rules: The rules; the first that applies decides.
        remarks: Comment lines at the top of the written file.
        file_type: llama.cpp's number for the mix (`general.file_type`), if it has one.
    """

    name: str
    rules: tuple[Rule, ...]
    remarks: tuple[str, ...] = ()
    file_type: int | None = None

    def type_of(self, name: str, n_layers: int) -> str:
        """The type of a tensor; BadArgument if no rule applies."""
        for rule in self.rules:
            if rule.applies(name, n_layers):
                return rule.type
        raise BadArgument(
            f"the recipe {printable(self.name, 60)!r} has no rule for {printable(name, 120)}; "
            "end it with a line `* = TYPE`"
        )

    def text(self) -> str:
        """The recipe as the text of a file."""
        return "\n".join([*(f"# {line}" for line in self.remarks), *map(str, self.rules)]) + "\n"

    @classmethod
    def of_types(cls, name: str, types: Mapping[str, str], remarks: tuple[str, ...] = ()) -> Recipe:
        """A recipe that gives each of these tensors its type and keeps every other one as it is."""
        return cls(name, (*_grouped(types), Rule("*", SOURCE)), remarks)


def layer_of(name: str) -> int | None:
    """The number of the block that a tensor belongs to."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def use_more_bits(layer: int, n_layers: int) -> bool:
    """Whether llama-quantize gives a block more bits: both ends get them, and every third block between.

    Source: llama.cpp, src/llama-quant.cpp.
    """
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def layer_set(text: str) -> Layers:
    """A test for the layers that the text between the brackets names; BadArgument if it names none."""
    if not text:
        return lambda layer, n: True
    if text == "spread":
        return use_more_bits
    if share := _SHARE.fullmatch(text):
        part = int(share[2])
        if share[1] == "first":
            return lambda layer, n: layer < n // part
        return lambda layer, n: layer >= (part - 1) * n // part
    wanted: set[int] = set()
    for piece in text.split(","):
        found = _RANGE.fullmatch(piece.strip())
        if not found:
            raise BadArgument(
                f"layers [{printable(text, 60)}]: wanted numbers and ranges such as 0-3,29, "
                "or `first 1/8`, `last 1/8`, `spread`"
            )
        wanted.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return lambda layer, n: layer in wanted


def read_recipe(path: str | PathLike[str]) -> Recipe:
    """Read a recipe file.

    Raises:
        BadFile: The file cannot be read, or a line is not a rule; the message has the line's number.
    """
    text = read_text(path)
    if len(text) > MAX_RECIPE:
        raise BadFile(path, f"not a recipe: longer than {MAX_RECIPE} characters", "name a recipe file")
    return parse_recipe(text, Path(path).stem, fspath(path))


def parse_recipe(text: str, name: str, path: str = "recipe") -> Recipe:
    """Read a recipe from its text, with the errors of `read_recipe`."""
    rules: list[Rule] = []
    remarks: list[str] = []
    for number, line in enumerate(lines(text), 1):
        stripped = line.strip()
        if stripped.startswith("#"):
            if not rules:
                remarks.append(stripped[1:].strip())
            continue
        stripped = stripped.partition(" #")[0].strip()
        if not stripped:
            continue
        match = _RULE.fullmatch(stripped)
        if match is None:
            shown = printable(stripped, 80)
            raise BadFile(path, f"line {number}: {shown!r} is no rule", "write PATTERN [LAYERS] = TYPE")
        try:
            kind = match["type"] if match["type"].lower() != SOURCE else SOURCE
            rules.append(
                Rule(match["pattern"], kind if kind == SOURCE else kind.upper(), match["layers"] or "")
            )
        except BadArgument as error:
            raise BadFile(path, f"line {number}: {error}") from None
        if len(rules) > MAX_RULES:
            raise BadFile(path, f"line {number}: more than {MAX_RULES} rules")
    if not rules:
        raise BadFile(path, "not a recipe: it has no rule", "write lines such as `* = Q4_K`")
    return Recipe(printable(name, 100), tuple(rules), tuple(remarks))


def write_recipe(recipe: Recipe, path: str | PathLike[str], overwrite: bool = False) -> None:
    """Write a recipe as a text file that `read_recipe` reads.

    Raises:
        BadFile: The file exists and may not be replaced, or cannot be written.
    """
    write_atomically(path, recipe.text().encode(), overwrite)


def _grouped(types: Mapping[str, str]) -> list[Rule]:
    """A rule for each pair of a part of a block and a type, and a rule for each tensor outside of blocks."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name, fmt in types.items():
        match = _LAYER.search(name)
        if match is None:
            groups[_literal(name), fmt] = []
        else:
            pattern = f"{_literal(name[: match.start(1)])}*{_literal(name[match.end(1) :])}"
            groups.setdefault((pattern, fmt), []).append(int(match[1]))
    parts = list(dict.fromkeys(pattern for pattern, _ in groups))
    ordered = sorted(groups, key=lambda group: (parts.index(group[0]), group[1]))
    return [Rule(pattern, fmt, _ranges(groups[pattern, fmt])) for pattern, fmt in ordered]


def _ranges(layers: list[int]) -> str:
    """[0, 1, 2, 7] -> "0-2,7"."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _literal(name: str) -> str:
    """A pattern that matches exactly this name."""
    return re.sub(r"([*?[])", r"[\1]", name)


# --- types for the tensors of a checkpoint ---------------------------------------------------

FALLBACKS = {
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "NVFP4"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
}
"""Type -> the type with blocks of 32 that replaces it if its blocks do not divide a row.
Source: llama.cpp, tensor_type_fallback; NVFP4 and Q1_0 are added here."""


def choose_formats(
    source: Checkpoint, targets: Sequence[Target], recipe: Recipe, log: Callable[[str], None] | None = None
) -> dict[str, BlockFormat]:
    """Tensor -> its type by the recipe, or a fallback if the blocks of that type do not divide the rows.

    Args:
        source: The checkpoint.
        targets: Its tensors, with their names in a GGUF.
        recipe: The recipe.
        log: Called with a message for each fallback.

    Raises:
        BadArgument: There is no rule for a tensor.
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
    """The type of one tensor: `wanted` or its fallback, or for "source" the checkpoint's type."""
    if not is_matrix(target):
        return FORMATS["F32"]
    if wanted != SOURCE:
        return fitting(wanted, target.columns)
    stored = source.format_of(target)
    if (
        stored is None
        or stored.ggml_type is None
        or source.is_scaled(target)
        or stored.name in ("F32", "F64")
    ):
        return FORMATS["F16"]
    return stored


def is_matrix(target: Target) -> bool:
    """Whether a recipe decides about a tensor; norms, biases, pad tokens and tiny tensors are F32."""
    return len(target.shape) > 1 and target.weights > SMALL and not target.name.endswith("pad_token")


def fitting(name: str, k: int) -> BlockFormat:
    """The type of that name if its blocks divide rows of k weights, else its fallback, else F16."""
    for candidate in (name, FALLBACKS.get(name, "F16")):
        if k % FORMATS[candidate].weights == 0:
            return FORMATS[candidate]
    return FORMATS["F16"]
