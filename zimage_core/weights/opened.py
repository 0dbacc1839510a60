"""Opens model files; what is opened once serves every later step.

The first bytes of a file decide what it is, never its name. A file that is neither GGUF nor safetensors is
refused; the message says what it is and what to do. Nothing that runs code (pickle) is ever unpacked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from zimage_core.errors import BadFile, printable
from zimage_core.weights import documents, download
from zimage_core.weights.card import ModelCard
from zimage_core.weights.folder import (
    Model,
    chosen,
    listed,
    models_in,
)
from zimage_core.weights.gguf import GGUFFile
from zimage_core.weights.magic import CONVERT, refuse_known, refuse_text
from zimage_core.weights.safetensors import SafetensorsFile, ShardedSafetensors
from zimage_core.weights.source import Source, WeightFile, path_text

_HEAD = 512


def open_weights(path: str | PathLike[str] | Source, mmap: bool = True) -> WeightFile:
    """Open a GGUF file, a safetensors file, an index of shards, or a folder with one model.

    Only headers are read. Nothing else in the library decides what a file is.

    Args:
        path: The file or folder; its name does not matter. An open Source is taken over instead of opening
            its path again, where another file may have been moved meanwhile.
        mmap: Hand out tensors as views of the file, which then must not change while in use. False
            reads each tensor into its own memory. A Source keeps its own choice.

    Raises:
        BadArgument: The path is no path, or empty.
        BadFile: The file is missing, no model file (the message says what it is instead), damaged or cut.
        UnknownFormat: A tensor has a type that zimage_core.formats does not describe.
    """
    if isinstance(path, Source):
        source = path
    else:
        path = path_text(path)
        if is_folder(path):
            return open_model(only_model(path), mmap)
        source = Source(path, mmap)
    head = b""
    try:
        head = bytes(source.read_at(0, min(_HEAD, source.size)))
        file = _reader(source, head)
        file.notes, file.cautions = download.remarks(file)
        return file
    except BaseException as error:
        source.close()
        if isinstance(error, BadFile) and error.path == source.path:
            raise download.explained(error, head) from None
        raise


def _reader(source: Source, head: bytes) -> WeightFile:
    """Choose the reader by the first bytes."""
    path, size = source.path, source.size
    if head[:4] == b"GGUF"[: len(head)]:
        return GGUFFile(source)
    # safetensors starts with the header's length, which may look like any magic number, even "{"; the
    # brace after it decides
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and (length <= size or not head.startswith(b"{")):
        return SafetensorsFile(source)
    if head.lstrip()[:1] == b"{" and b'"' in head:
        return ShardedSafetensors(source)
    refuse_known(path, head)
    if documents.legacy_imatrix(head):
        raise BadFile(path, f"{documents.IMATRIX}, not a model", f"it is {documents.FOR_QUANTIZE}")
    refuse_text(path, head)
    if size <= 8 or 2 <= length <= size - 8:
        return SafetensorsFile(source)  # raises an error that says what is wrong with the header
    fault = f"not a model file: magic {printable(head[:8])} is neither GGUF nor safetensors"
    raise BadFile(path, fault, CONVERT)


def is_folder(path: str) -> bool:
    """Whether the path is a folder; False for one that cannot be asked, whose opening says why."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def open_model(model: Model, mmap: bool) -> WeightFile:
    """Open a model that was found in a folder."""
    if model.missing:
        count = len(model.shards) + len(model.missing)
        lacking = ", ".join(printable(name, 80) for name in model.missing[:3])
        fault = f"one of {count} shards, of which {len(model.missing)} are missing: {lacking}"
        raise BadFile(model.path, fault, "download them to the same folder")
    if not model.shards:
        return open_weights(model.path, mmap)
    file = ShardedSafetensors(model.shards[0], mmap, model.shards)
    file.notes, file.cautions = download.remarks(file)
    return file


def only_model(path: str, variant: str | None = None) -> Model:
    """The one model of a folder.

    Raises:
        BadFile: There is none, or there are several.
    """
    found = chosen(models_in(path), variant, component=True)
    if not found:
        fault = "a directory without model file: no *.safetensors.index.json, *.safetensors or *.gguf in it"
        raise BadFile(path, fault + download.beside(path), "name the file, or the folder of one component")
    if len(found) > 1:
        raise BadFile(path, f"a directory with {len(found)} models: {listed(found)}", "name one of them")
    return found[0]


@dataclass(frozen=True, eq=False)
class Opened:
    """An open model file and its identification.

    Args:
        file: The file; its header is parsed, no tensor is read.
        card: What the file was identified as.
        stated: The config.json beside the file, if there is one and the card agrees with it.
    """

    file: WeightFile
    card: ModelCard
    stated: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return Path(self.file.path).name

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Copy and pickle as None: a copied network may be changed, so it belongs to no file."""
        return type(None), ()
