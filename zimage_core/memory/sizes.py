"""What the parts of a pipeline weigh, from headers alone: no tensor is read, torch is not loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.errors import BadArgument, BadWeights, printable
from zimage_core.formats import DTYPE_NAMES, FORMATS
from zimage_core.memory.activations import FLOAT32, ITEMSIZE
from zimage_core.quant.dispatch import PLANAR_BITS, SCRATCH_BYTES, crossover, planar_bytes, planar_width
from zimage_core.weights import names
from zimage_core.weights.opened import Opened, open_pipeline
from zimage_core.weights.source import WeightFile

COMPONENTS = ("transformer", "text_encoder", "vae")


@dataclass(frozen=True)
class Matrix:
    """The weight of one Linear layer.

    Args:
        format: Name in `zimage_core.formats`.
        rows: Outputs.
        width: Inputs.
        scaled: Whether a scale lies beside it (fp8).
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
    def weights(self) -> int:
        """Numbers in it."""
        return self.rows * self.width

    def scratch(self, dtype: str) -> int:
        """Bytes that a product with it needs for its dense form."""
        item = ITEMSIZE[dtype]
        if FORMATS[self.format].weights > 1:
            return min(SCRATCH_BYTES, self.weights * item)
        if self.scaled:  # in float32, then multiplied, then rounded
            return self.weights * (2 * FLOAT32 + item)
        return 0 if DTYPE_NAMES.get(self.format) == dtype else self.weights * item

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


@dataclass(frozen=True)
class Part:
    """One network.

    Args:
        name: "transformer", "text_encoder" or "vae".
        config: Its sizes.
        blocks: In the order in which they run, as the network's `blocks`; the VAE has none.
        always: Bytes that lie on the device as long as the network runs: norms, biases, embedders, adaptive
            norms; of the VAE its decoder in float32.
        host: Bytes that may stay in host memory: the table of tokens, the VAE's encoder.
        matrices: Linear weights in none of the blocks, with the name of their module.
        once: Bytes of each block that runs once for each caption: those of the context refiner.
    """

    name: str
    config: TransformerConfig | TextEncoderConfig | AutoencoderConfig
    blocks: tuple[Block, ...]
    always: int
    host: int
    matrices: tuple[tuple[str, Matrix], ...] = ()
    once: tuple[int, ...] = ()

    @property
    def streamable(self) -> int:
        """Bytes of all blocks."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.streamable + self.always + self.host + sum(self.once)

    def scratch(self, dtype: str) -> int:
        """Bytes of dense weights at a time, at most."""
        return max((matrix.scratch(dtype) for _, matrix in matrices(self)), default=0)


@dataclass(frozen=True)
class Sizes:
    """The three networks of a pipeline, and the dtype that their small tensors are kept in."""

    transformer: Part
    text_encoder: Part
    vae: Part
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return self.transformer.nbytes + self.text_encoder.nbytes + self.vae.nbytes


def read_sizes(paths: Mapping[str, str | PathLike[str]], dtype: str = "bfloat16") -> Sizes:
    """Sizes from files.

    Args:
        paths: "transformer", "text_encoder" and "vae" -> file or folder, as for loading.
        dtype: Dtype of the computation.

    Raises:
        BadFile, UnknownFormat, WrongModel, BadWeights: As loading them would.
    """
    parts = open_pipeline({name: paths[name] for name in COMPONENTS})
    try:
        return sizes_of(parts, dtype)
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
    return Sizes(**{name: _part(name, parts[name], dtype) for name in COMPONENTS}, dtype=dtype)


def folder_files(folder: str | PathLike[str]) -> dict[str, str]:
    """The three networks of a folder: diffusers' layout, or loose files told apart by their contents.

    Raises:
        BadFile: The folder cannot be read; BadArgument: one of the networks is not there, or twice.
    """
    from zimage_core.weights.inspection import inspect_file

    place = Path(folder)
    if all((place / name).is_dir() for name in COMPONENTS):
        return {name: str(place / name) for name in COMPONENTS}
    parts = inspect_file(place).parts
    found: dict[str, str] = {}
    for name in COMPONENTS:
        paths = [part.path for part in parts if part.kind == name]
        if len(paths) != 1:
            what = name.replace("_", " ")
            state = "no" if not paths else f"{len(paths)}"
            raise BadArgument(f"{printable(place)} holds {state} {what}; wanted one: give its file instead")
        found[name] = paths[0]
    return found


def _part(name: str, part: Opened, dtype: str) -> Part:
    card = part.card
    config, read = card.config, _Reader(part.file, card.prefix, dtype)
    if isinstance(config, TransformerConfig):
        return _transformer(config, names.transformer_table(config, card.layout), read)
    if isinstance(config, TextEncoderConfig):
        return _text_encoder(config, names.text_encoder_table(config, card.layout), read)
    if isinstance(config, AutoencoderConfig):
        read.dtype = "float32"  # convolutions are in float32, whatever the file holds
        return _vae(config, names.autoencoder_table(config, card.layout), read)
    raise BadWeights(f"{printable(part.file.path)}: the size of the {name.replace('_', ' ')} cannot be told")


class _Reader:
    """Matrices of an open file, by their entries."""

    def __init__(self, file: WeightFile, prefix: str, dtype: str) -> None:
        self.file, self.prefix, self.dtype = file, prefix, dtype

    def matrix(self, entry: names.Entry) -> Matrix | None:
        """The weight of a Linear layer; None for anything else."""
        if len(entry.shape) != 2 or not entry.module.endswith(".weight"):
            return None
        name = self.prefix + entry.checkpoint
        stem = name.removesuffix(".weight")
        scaled = any(stem + end in self.file.tensors for end in (".scale_weight", ".weight_scale"))
        return Matrix(self.file.tensors[name].format.name, *entry.shape, scaled)

    def small(self, entry: names.Entry) -> int:
        """Bytes of a tensor that is kept dense in the dtype of the computation."""
        return math.prod(entry.shape) * ITEMSIZE[self.dtype]


def _transformer(config: TransformerConfig, table: names.Table, read: _Reader) -> Part:
    # the lists of blocks that can be streamed, in the order of `ZImageTransformer.blocks`
    counts = {"noise_refiner": config.n_refiner_layers, "layers": config.n_layers}
    inside: dict[str, list[Matrix]] = {f"{stack}.{i}": [] for stack in counts for i in range(counts[stack])}
    always, once, beside = 0, [0] * config.n_refiner_layers, []
    for entry in table:
        if entry.module.startswith("siglip_"):
            continue  # the vision branch of an Omni checkpoint is not loaded
        matrix = read.matrix(entry)
        block = ".".join(entry.module.split(".")[:2])
        if entry.module.startswith("context_refiner."):
            size = read.small(entry) if matrix is None else matrix.nbytes
            once[int(entry.module.split(".")[1])] += size
        elif matrix is None:
            always += read.small(entry)
        elif block in inside and ".adaLN_modulation." not in entry.module:
            inside[block].append(matrix)
            continue
        else:  # adaptive norms of all steps go through their matrices once, before the first block
            always += matrix.nbytes
        if matrix is not None:
            beside.append((entry.module, matrix))
    blocks = tuple(Block(name, tuple(found)) for name, found in inside.items())
    return Part("transformer", config, blocks, always, 0, tuple(beside), tuple(once))


def _text_encoder(config: TextEncoderConfig, table: names.Table, read: _Reader) -> Part:
    inside: list[list[Matrix]] = [[] for _ in range(config.num_layers - 1)]
    always, host = 0, 0
    for entry in table:
        matrix = read.matrix(entry)
        if matrix is None:
            always += read.small(entry)
        elif entry.module == "embed_tokens.weight":
            host += matrix.nbytes  # few of its rows are read, wherever it lies
        else:
            inside[int(entry.module.split(".")[1])].append(matrix)
    blocks = tuple(Block(f"layers.{i}", tuple(found)) for i, found in enumerate(inside))
    return Part("text_encoder", config, blocks, always, host)


def _vae(config: AutoencoderConfig, table: names.Table, read: _Reader) -> Part:
    """Images from text need the decoder alone."""
    halves = {"decoder": 0, "encoder": 0}
    for entry in table:
        matrix = read.matrix(entry)
        halves[entry.module.partition(".")[0]] += read.small(entry) if matrix is None else matrix.nbytes
    return Part("vae", config, (), halves["decoder"], halves["encoder"])


def matrices(part: Part) -> Iterator[tuple[str, Matrix]]:
    """Every Linear weight of a network with the name of its module or block."""
    yield from part.matrices
    for block in part.blocks:
        for matrix in block.matrices:
            yield block.name, matrix
