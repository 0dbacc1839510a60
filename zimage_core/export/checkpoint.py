"""Reads a checkpoint of any layout tensor by tensor, with the names of any other layout.

Two tables of weights/names.py, joined by module, give the rows of stored tensors that make up each tensor of
the wanted layout: one fused qkv from three tensors, or three from one. Bytes are read with pread, slab by
slab, because every page of a mapped file that is used would count as memory of this process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zimage_core.assets import named
from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig, VisionConfig
from zimage_core.errors import BadWeights, Unsupported, WrongModel, ZImageError, printable
from zimage_core.formats import BlockFormat
from zimage_core.quant.tensor import QuantTensor
from zimage_core.weights import names, storage
from zimage_core.weights.card import WANTED, require
from zimage_core.weights.components import open_component
from zimage_core.weights.facts import facts
from zimage_core.weights.opened import Opened

SLAB = 1 << 24
"""Number of weights that are dense in memory at once."""

TEXT_ENDS = {"hf": ("norm.weight", "lm_head.weight"), "gguf": ("output_norm.weight", "output.weight")}
"""Final norm and output matrix of a language model; other programs need them, this library does not."""

PREFIXES = {"text_encoder": "model.", "siglip": "vision_model."}
"""Component -> prefix of its tensors in transformers' files, except a language model's lm_head."""


@dataclass(frozen=True)
class Part:
    """Rows start..stop of a stored tensor that has `of` rows; 0 to 1 of 1 is the whole tensor."""

    name: str
    start: int = 0
    stop: int = 1
    of: int = 1


@dataclass(frozen=True)
class Target:
    """A tensor of the wanted layout, made of parts that are stacked along axis 0."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        """Number of rows; blocks lie along rows."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """Number of weights in a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def weights(self) -> int:
        """Number of all weights."""
        return math.prod(self.shape)


def is_small(target: Target) -> bool:
    """Whether the tensor is a norm, a bias or a pad token, which stay floats in every file."""
    return len(target.shape) < 2 or target.name.endswith("pad_token")


class Checkpoint:
    """An open model of one network; a context manager that closes it.

    Args:
        path: A GGUF or safetensors file, an index of shards, a folder of a component or of a pipeline, or
            "default" for the embedded model; or an open file, which `close` closes too.
        component: "transformer", "text_encoder", "vae" or "siglip". None means the one that the file or
            folder holds, and of several the transformer.
        variant: In a folder, the variant of the files, such as "fp16"; None for those without one.

    Attributes:
        facts: Image size and schedule, as `weights.facts` reads them.
        folder: The folder named, or that of the file.
        stated: The source's config.json if it agrees with the weights.

    Raises:
        BadFile, UnknownFormat: The file cannot be opened.
        WrongModel, BadWeights: The file is another model or a damaged one.
        Unsupported: The weights are stored in a way that is not supported.
    """

    def __init__(
        self, path: str | PathLike[str] | Opened, component: str | None = None, variant: str | None = None
    ) -> None:
        path = path if isinstance(path, Opened) else named(path)
        place = Path(path.file.path if isinstance(path, Opened) else path)
        opened = open_component(path, component or "", variant=variant)
        self.file, self.card = opened.file, opened.card
        self.component = component or self.card.kind
        try:
            if self.component not in WANTED:
                problem = f": {self.card.problem}" if self.card.problem else ""
                wanted = "a Z-Image transformer, text encoder, VAE or vision tower is wanted"
                raise WrongModel(self.file.path, f"this is {self.card.title}{problem}", wanted)
            require(self.card, self.component, self.file.path)
            self.stated = _agreeing(opened.stated, self.card.config)
            self.folder = place if place.is_dir() else place.parent
            self.facts = facts(opened, self.folder) if self.component == "transformer" else {}
        except BaseException:
            self.file.close()
            raise
        scaled = (
            name.removesuffix(suffix) + ".weight"
            for name in self.file.tensors
            for suffix in storage.SCALE_SUFFIXES
            if name.endswith(suffix)
        )
        self._scaled = set(scaled) & set(self.file.tensors)

    @property
    def config(self) -> Any:
        """Config with the sizes of the network."""
        return self.card.config

    def targets(self, layout: str, prefix: str = "") -> list[Target]:
        """The tensors of `layout` (one of weights/names.py), each made of stored tensors.

        Tensors without a name in the layouts (norm_final) are left out.

        Raises:
            Unsupported: Rows would have to be reordered (a llama between Hugging Face and GGUF).
        """
        stored = {entry.module: entry for entry in table_of(self.component, self.config, self.card.layout)}
        found: list[Target] = []
        for name, entries in names.sources(table_of(self.component, self.config, layout)).items():
            mine = [stored[entry.module] for entry in entries]
            if any(self.card.prefix + entry.checkpoint not in self.file.tensors for entry in mine):
                continue  # the last layer of a text encoder, which is never run
            if layout != self.card.layout and any(e.heads for e in (*mine, *entries)):
                raise Unsupported(
                    f"{printable(self.file.path)}: a llama's query and key rows lie in another order there; "
                    "convert it with llama.cpp's convert_hf_to_gguf.py"
                )
            if any(e.conv for e in mine):
                raise Unsupported(
                    f"{printable(self.file.path)}: its patch embedding is a convolution, with its numbers in "
                    "another order; take transformers' safetensors of the tower"
                )
            parts = _joined([_part(self.card.prefix + e.checkpoint, e) for e in mine])
            found.append(Target(prefix + name, entries[0].stored_shape, parts))
        return found + (self._text_ends(layout, prefix) if self.component == "text_encoder" else [])

    def _text_ends(self, layout: str, prefix: str) -> list[Target]:
        found = []
        for mine, theirs in zip(TEXT_ENDS[self.card.layout], TEXT_ENDS[layout], strict=True):
            for name in (self.card.prefix + mine, mine):
                if name in self.file.tensors:
                    outside = theirs == TEXT_ENDS["hf"][1]
                    shape = self.file.tensors[name].shape
                    found.append(Target(theirs if outside else prefix + theirs, shape, (Part(name),)))
                    break
        return found

    def format_of(self, target: Target) -> BlockFormat | None:
        """The format of all parts, or None if they have different ones."""
        found = {self.file.tensors[part.name].format.name: part for part in target.parts}
        return self.file.tensors[target.parts[0].name].format if len(found) == 1 else None

    def formats_of(self, target: Target) -> set[str]:
        """Names of the formats of the parts."""
        return {self.file.tensors[part.name].format.name for part in target.parts}

    def is_scaled(self, target: Target) -> bool:
        """Whether a separate scale multiplies the numbers of a part (fp8, int8)."""
        return any(part.name in self._scaled for part in target.parts)

    @property
    def path(self) -> str:
        """The file or index that is read."""
        return self.file.path

    def check_unchanged(self) -> None:
        """Raise BadFile if a file was written to or cut since it was opened."""
        self.file.check_unchanged()

    def raw(self, target: Target) -> Iterator[bytearray | memoryview]:
        """The stored bytes, little-endian, in pieces of whole rows."""
        for part in target.parts:
            info = self.file.tensors[part.name]
            first, size = self._span(part)
            width = info.format.row_bytes(info.shape[-1] if info.shape else 1)
            step = max(1, (SLAB * 4) // width) * width
            for start in range(0, size, step):
                data = self.file.source_of(part.name).read_at(first + start, min(step, size - start))
                yield self._native(data, info.format)

    def dense(self, target: Target) -> Iterator[Tensor]:
        """The numbers in slabs of float32 [rows, K]; scales are applied, and rotations undone."""
        for part in target.parts:
            info = self.file.tensors[part.name]
            columns = info.shape[-1] if info.shape else 1
            width = info.format.row_bytes(columns)
            first, size = self._span(part)
            scale, rotation = self._scale(part)
            step = max(1, SLAB // columns)
            for row in range(0, size // width, step):
                count = min(step, size // width - row)
                data = self.file.source_of(part.name).read_at(first + row * width, count * width)
                packed = torch.frombuffer(self._native(data, info.format), dtype=torch.uint8)
                rows = scale if scale is None or scale.numel() == 1 else scale[row : row + count]
                packed = packed.view(count, width)
                found = QuantTensor(packed, info.format, (count, columns), rows, rotation=rotation)
                yield found.dequantize() if info.format.name != "F64" else self._narrowed(found, part.name)

    def _narrowed(self, wide: QuantTensor, name: str) -> Tensor:
        """Float64 as float32; finite numbers that would become infinite are refused."""
        numbers = wide.dequantize(torch.float64)
        narrow = numbers.float()
        if bool((narrow.isinf() & numbers.isfinite()).any()):
            fault = f"{printable(name, 120)} holds numbers beyond the range of float32"
            raise BadWeights(f"{printable(self.file.path)}: {fault}")
        return narrow

    def _span(self, part: Part) -> tuple[int, int]:
        """Offset of a part in its file, and its number of bytes."""
        info = self.file.tensors[part.name]
        return (
            info.offset + info.nbytes * part.start // part.of,
            info.nbytes * (part.stop - part.start) // part.of,
        )

    def _scale(self, part: Part) -> tuple[Tensor | None, int]:
        """Scale of a part, float32: one number or one for each of its rows, or None; and its rotation."""
        if part.name not in self._scaled:
            return None, 0
        whole = storage.scaled_tensor(self.file, part.name)
        scale = whole.scale
        if scale is not None and scale.numel() != 1:
            scale = scale[len(scale) * part.start // part.of : len(scale) * part.stop // part.of]
        return scale, whole.rotation

    def _native(self, data: bytearray, fmt: BlockFormat) -> bytearray:
        if not self.file.swapped:
            return data
        size = int(fmt.fields[0].code[1:])
        flipped = torch.frombuffer(data, dtype=torch.uint8).view(-1, size).flip(1).contiguous()
        return bytearray(flipped.numpy().tobytes())

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _agreeing(stated: Mapping[str, Any] | None, config: object) -> Mapping[str, Any] | None:
    """The config.json beside the weights if it agrees with them; it may belong to another file."""
    try:
        same = stated is not None and type(config).from_json(stated) == config  # type: ignore[attr-defined]
    except (ZImageError, TypeError, ValueError, AttributeError):
        same = False
    return stated if same else None


def table_of(component: str, config: object, layout: str) -> names.Table:
    """The table of all parameters that have a name in files of the network."""
    if component == "transformer" and isinstance(config, TransformerConfig):
        return names.transformer_table(config, layout)
    if component == "text_encoder" and isinstance(config, TextEncoderConfig):
        # one layer more than the config has, since the table leaves out the last one
        return names.text_encoder_table(replace(config, num_layers=config.num_layers + 1), layout)
    if component == "vae" and isinstance(config, AutoencoderConfig):
        return names.autoencoder_table(config, layout)
    if component == "siglip" and isinstance(config, VisionConfig):
        return names.vision_table(config, layout)
    raise BadWeights(f"the size of the {component.replace('_', ' ')} cannot be told from the file")


def _part(name: str, entry: names.Entry) -> Part:
    return Part(name) if entry.rows is None else Part(name, *entry.rows, entry.total_rows)


def _joined(parts: list[Part]) -> tuple[Part, ...]:
    """The parts with neighbouring rows of one tensor joined into one part."""
    joined = [parts[0]]
    for part in parts[1:]:
        last = joined[-1]
        if part.name == last.name and part.start == last.stop:
            joined[-1] = replace(last, stop=part.stop)
        else:
            joined.append(part)
    return tuple(joined)
