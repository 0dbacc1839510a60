"""Opening a model file by what is in it.

The name of a file says nothing: the first bytes decide, and what is not GGUF or safetensors is named
and refused with the next step. Nothing that runs code (pickle) is ever unpacked.
"""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path

from zimage_core.errors import BadFile, printable
from zimage_core.weights.gguf import GGUFFile
from zimage_core.weights.magic import CONVERT, refuse_known
from zimage_core.weights.safetensors import SafetensorsFile, ShardedSafetensors
from zimage_core.weights.source import Source, TensorInfo, WeightFile

__all__ = ["Source", "TensorInfo", "WeightFile", "open_weights"]

_HEAD = 512


def open_weights(path: str | PathLike[str] | Source, mmap: bool = True) -> WeightFile:
    """Open a GGUF file, a safetensors file, an index of shards, or a folder with one of them.

    Only headers are read. Nothing else in the library decides what a file is.

    Args:
        path: The file or folder; its name does not matter. A Source is taken over: the file is opened
            only once, so that another one moved to its place meanwhile cannot be half of what is read.
        mmap: Hand out tensors as views of the file, which then must not change while in use. False
            reads each tensor into its own memory. A Source keeps its own choice.

    Raises:
        BadFile: Missing, not a model file (the message says what it is instead), damaged or cut.
        UnknownFormat: A tensor of a type that zimage_core.formats does not describe.
    """
    if isinstance(path, Source):
        source = path
    else:
        path = fspath(path)
        source = Source(_in_folder(path) if _is_folder(path) else path, mmap)
    try:
        return _reader(source)
    except BaseException:
        source.close()
        raise


def _reader(source: Source) -> WeightFile:
    """The reader that the first bytes ask for."""
    path, size = source.path, source.size
    head = bytes(source.read_at(0, min(_HEAD, size)))
    if head[:4] == b"GGUF"[: len(head)]:
        return GGUFFile(source)
    # the header's length comes first and may look like any magic, even "{": so the brace behind it decides
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and (length <= size or not head.startswith(b"{")):
        return SafetensorsFile(source)
    if head.lstrip()[:1] == b"{" and b'"' in head:
        return ShardedSafetensors(source)
    refuse_known(path, head)
    if size <= 8 or 2 <= length <= size - 8:
        return SafetensorsFile(source)  # says what is wrong with the header
    fault = f"not a model file: magic {printable(head[:8])} is neither GGUF nor safetensors"
    raise BadFile(path, fault, CONVERT)


def _is_folder(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False  # Source says why


def _in_folder(path: str) -> str:
    """The one model in a folder: its index of shards, else its only weight file."""
    try:
        names = sorted(entry.name for entry in Path(path).iterdir())
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise BadFile(path, f"a directory that cannot be read: {reason}") from None
    for ending in (".safetensors.index.json", ".safetensors", ".gguf"):
        found = [name for name in names if name.endswith(ending) and not name.startswith(".")]
        if len(found) == 1:
            return str(Path(path) / found[0])
        if found:
            listed = ", ".join(
                [*(printable(name, 60) for name in found[:4]), *(["..."] if found[4:] else [])]
            )
            raise BadFile(path, f"a directory with {len(found)} models: {listed}", "name one of them")
    fault = "a directory without model file: no *.safetensors.index.json, *.safetensors or *.gguf in it"
    raise BadFile(path, fault, "name the file, or the folder of one component")
