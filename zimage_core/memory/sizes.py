"""What the parts of a pipeline weigh, from headers alone: no tensor is read, torch is not loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike

from zimage_core.config import (
    COMPONENTS,
    NATIVE_SIZE,
    ONCE,
    AutoencoderConfig,
    TextEncoderConfig,
    TransformerConfig,
    VisionConfig,
)
from zimage_core.errors import BadArgument, BadWeights, printable
from zimage_core.formats import DTYPE_NAMES, FORMATS
from zimage_core.memory.activations import FLOAT32, ITEMSIZE
from zimage_core.quant.arithmetic import EXACT, arithmetic_of
from zimage_core.quant.dispatch import (
    PLANAR_BITS,
    SCRATCH_BYTES,
    crossover,
    int8_bytes,
    plain_bytes,
    planar_bytes,
    planar_width,
)
from zimage_core.weights import names
from zimage_core.weights.components import open_pipeline
from zimage_core.weights.facts import SIZE, facts
from zimage_core.weights.opened import Opened
from zimage_core.weights.source import WeightFile


@dataclass(frozen=True)
class Matrix:
    """The weight of one Linear layer.

    Args:
        format: Name in `zimage_core.formats`.
        rows: Outputs.
        width: Inputs.
        scaled: Whether a scale lies beside it (fp8, int8).
    """

    format: str
    rows: int
    width: int
    scaled: bool = False

    @property
    def nbytes(self) -> int:
        """As the file holds it."""
        return FORMATS[self.format].row_bytes(self.width) * self.rows

    @property
    def scales(self) -> int:
        """Bytes of the scales of int8 weights, one for each row; fp8 has one number, which is not counted."""
        return self.rows * FLOAT32 if self.scaled and self.format == "I8" else 0

    @property
    def weights(self) -> int:
        """Numbers in it."""
        return self.rows * self.width

    def scratch(self, dtype: str, kernels: bool = True) -> int:
        """Bytes that a product with it needs for its dense form, with Triton kernels or without."""
        item = ITEMSIZE[dtype]
        if FORMATS[self.format].weights > 1:
            if not kernels:
                return plain_bytes(FORMATS[self.format], self.rows, self.width, dtype)
            return min(SCRATCH_BYTES, self.weights * item)
        if self.scaled:  # in float32, then multiplied, then rounded
            return self.weights * (2 * FLOAT32 + item)
        return 0 if DTYPE_NAMES.get(self.format) == dtype else self.weights * item

    @property
    def in_rows(self) -> bool:
        """Whether the file holds int8 rows with scales."""
        return self.format == "I8" and self.scaled

    @property
    def int8_bytes(self) -> int:
        """As int8 rows with a scale each."""
        return self.nbytes if self.in_rows else int8_bytes(self.rows, self.width)

    def planes(self, tokens: int, architecture: str) -> int:
        """Bytes of its planes if a product with so many rows of x would use them, else 0."""
        fmt = FORMATS[self.format]
        if self.format not in PLANAR_BITS or self.width % planar_width(fmt):
            return 0
        return planar_bytes(fmt, self.rows, self.width) if tokens <= crossover(fmt, architecture) else 0


@dataclass(frozen=True)
class Block:
    """What is moved at once: the Linear weights of one block, as in the file.

    Args:
        name: As a module, "layers.3".
        matrices: Its weights.
    """

    name: str
    matrices: tuple[Matrix, ...]

    @property
    def nbytes(self) -> int:
        """Bytes moved."""
        return sum(matrix.nbytes for matrix in self.matrices)

    @property
    def int8_bytes(self) -> int:
        """Bytes of its weights as int8 rows."""
        return sum(matrix.int8_bytes for matrix in self.matrices)


@dataclass(frozen=True)
class Part:
    """One network.

    Args:
        name: "transformer", "text_encoder", "vae" or "siglip".
        config: Its sizes.
        blocks: In the order in which they run, as the network's `blocks`; the VAE has none.
        always: Bytes that lie on the device as long as the network runs: norms, biases, embedders, adaptive
            norms, scales of int8 weights; of the VAE its decoder in float32.
        host: Bytes that may stay in host memory: the table of tokens, the VAE's encoder.
        matrices: Linear weights in none of the blocks, with the name of their module.
        once: Bytes of each block that runs once for each caption: those of the context refiner and of
            Omni's siglip_refiner.
    """

    name: str
    config: TransformerConfig | TextEncoderConfig | AutoencoderConfig | VisionConfig
    blocks: tuple[Block, ...]
    always: int
    host: int
    matrices: tuple[tuple[str, Matrix], ...] = ()
    once: tuple[int, ...] = ()

    @cached_property
    def block_bytes(self) -> list[int]:
        """Bytes of each block."""
        return [block.nbytes for block in self.blocks]

    @property
    def streamable(self) -> int:
        """Bytes of all blocks."""
        return sum(self.block_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.streamable + self.always + self.host + sum(self.once)


@dataclass(frozen=True)
class Sizes:
    """The three networks of a pipeline, the dtype of their small tensors, and the side of an image."""

    transformer: Part
    text_encoder: Part
    vae: Part
    dtype: str
    sample_size: int = NATIVE_SIZE

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return self.transformer.nbytes + self.text_encoder.nbytes + self.vae.nbytes


def read_sizes(paths: Mapping[str, str | PathLike[str] | Opened], dtype: str = "bfloat16") -> Sizes:
    """Sizes from files.

    Args:
        paths: "transformer", "text_encoder" and "vae" -> file or folder, as for loading, or the open file.
        dtype: Dtype of the computation.

    Raises:
        BadFile, UnknownFormat, WrongModel, BadWeights: As loading them would.
    """
    parts = open_pipeline({name: paths[name] for name in COMPONENTS})
    try:
        side = facts(parts["transformer"]).get(SIZE, NATIVE_SIZE)
        return replace(sizes_of(parts, dtype), sample_size=side)
    finally:
        for part in parts.values():
            part.file.close()


def sizes_of(parts: Mapping[str, Opened], dtype: str = "bfloat16") -> Sizes:
    """Sizes from files that are open, as a pipeline's are.

    Raises:
        BadArgument: The dtype is none of float32, float16, bfloat16.
        BadWeights: A file's network has no known sizes.
    """
    if dtype not in ITEMSIZE:
        raise BadArgument(f"dtype: got {printable(dtype, 40)!r}, wanted one of {', '.join(ITEMSIZE)}")
    transformer, text_encoder, vae = (part_of(name, parts[name], dtype) for name in COMPONENTS)
    return Sizes(transformer, text_encoder, vae, dtype)


def part_of(name: str, part: Opened, dtype: str) -> Part:
    """What one network weighs, tensor by tensor of its table.

    Raises:
        BadWeights: Its sizes are not known.
    """
    card, config = part.card, part.card.config
    if isinstance(config, TransformerConfig):
        table = names.transformer_table(config, card.layout)
        counts = {"noise_refiner": config.n_refiner_layers, "layers": config.n_layers}
    elif isinstance(config, TextEncoderConfig):
        table, counts = names.text_encoder_table(config, card.layout), {"layers": config.num_layers - 1}
    elif isinstance(config, AutoencoderConfig):
        table, counts = names.autoencoder_table(config, card.layout), {}
        dtype = "float32"  # convolutions are in float32, whatever the file holds
    elif isinstance(config, VisionConfig):
        table, counts = names.vision_table(config, card.layout), {"layers": config.num_layers}
    else:
        raise BadWeights(
            f"{printable(part.file.path)}: the size of the {name.replace('_', ' ')} cannot be told"
        )
    # in the order of the network's `blocks`
    inside: dict[str, list[Matrix]] = {f"{stack}.{i}": [] for stack in counts for i in range(counts[stack])}
    once: dict[str, int] = {}
    always, host, beside = 0, 0, []
    for entry in table:
        matrix = _matrix(part.file, card.prefix, entry)
        nbytes = math.prod(entry.shape) * ITEMSIZE[dtype] if matrix is None else matrix.nbytes
        always += 0 if matrix is None else matrix.scales
        block = ".".join(entry.module.split(".")[:2])
        # adaptive norms of all steps go through their matrices once, before the first block
        if matrix is not None and block in inside and ".adaLN_modulation." not in entry.module:
            inside[block].append(matrix)
            continue
        if entry.module == "embed_tokens.weight" or entry.module.startswith("encoder."):
            # few rows of a table are read, wherever it lies; images need a VAE's decoder alone
            host += nbytes
            continue
        if block.partition(".")[0] in ONCE:
            once[block] = once.get(block, 0) + nbytes
        else:
            always += nbytes
        if matrix is not None:
            beside.append((entry.module, matrix))
    blocks = tuple(Block(block, tuple(found)) for block, found in inside.items())
    return Part(name, config, blocks, always, host, tuple(beside), tuple(once.values()))


def _matrix(file: WeightFile, prefix: str, entry: names.Entry) -> Matrix | None:
    """The weight of a Linear layer or a table; None for a tensor that is kept dense."""
    if len(entry.shape) != 2 or not entry.module.endswith(".weight"):
        return None
    name = prefix + entry.checkpoint
    stem = name.removesuffix(".weight")
    scaled = any(stem + end in file.tensors for end in (".scale_weight", ".weight_scale"))
    return Matrix(file.tensors[name].format.name, *entry.shape, scaled)


def matrices(part: Part) -> Iterator[tuple[str, Matrix]]:
    """Every Linear weight of a network with the name of its module or block."""
    yield from part.matrices
    for block in part.blocks:
        for matrix in block.matrices:
            yield block.name, matrix


def in_int8(name: str) -> bool:
    """Whether a weight takes part in products of int8, by the name that `matrices` gives it."""
    return not name.endswith(".weight") or arithmetic_of(name.removesuffix(".weight"), "int8") is not EXACT
