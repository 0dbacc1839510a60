"""Opens, identifies and checks each model file once; later steps use the open file.

The first bytes of a file decide what it is, never its name. A file that is neither GGUF nor safetensors is
refused; the message says what it is and what to do. Nothing that runs code (pickle) is ever unpacked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from zimage_core.errors import BadFile, printable
from zimage_core.weights import documents, download
from zimage_core.weights.card import ModelCard, check_compatible, require
from zimage_core.weights.gguf import GGUFFile
from zimage_core.weights.identify import identify
from zimage_core.weights.magic import CONVERT, refuse_known, refuse_text
from zimage_core.weights.safetensors import SafetensorsFile, ShardedSafetensors
from zimage_core.weights.source import Source, WeightFile, path_text

MAX_CONFIG_BYTES = 1 << 20
_HEAD = 512


def open_weights(path: str | PathLike[str] | Source, mmap: bool = True) -> WeightFile:
    """Open a GGUF file, a safetensors file, an index of shards, or a folder with one of them.

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
        source = Source(_in_folder(path) if _is_folder(path) else path, mmap)
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


def _is_folder(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False  # opening the Source raises an error that says why


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


def open_component(path: str | PathLike[str] | Opened, component: str = "", mmap: bool = True) -> Opened:
    """Open the file of a component and identify it; headers only.

    Args:
        path: A GGUF or safetensors file, an index of shards, a component's folder, or a diffusers folder.
            An `Opened` is used as it is; only the config.json beside it may still be read.
        component: "transformer", "text_encoder" or "vae"; "" accepts any model.
        mmap: Hand out tensors as views of the file.

    Returns:
        The open file with its card, which may be another model's; `require` refuses that.

    Raises:
        BadFile: The path holds no model file that can be opened.
    """
    if isinstance(path, Opened):
        return _with_config(path.file, component, path.card, *_locate(path.file.path, component)[1:])
    place, stated, binding = _locate(path, component)
    file = open_weights(place, mmap=mmap)
    return _with_config(file, component, None, stated, binding)


def identify_open(file: WeightFile) -> Opened:
    """Identify an open file as any model; a config.json beside it is used if it agrees with the tensors."""
    return _with_config(file, "", None, *_locate(file.path, "")[1:])


def open_pipeline(paths: Mapping[str, str | PathLike[str] | Opened], mmap: bool = True) -> dict[str, Opened]:
    """Open the files of a pipeline and check by their headers that each is sound and that they fit together.

    Args:
        paths: "transformer", "text_encoder" and "vae" -> file or folder, as for `open_component`. Without a
            transformer each file is checked alone.
        mmap: Hand out tensors as views of the files.

    Returns:
        Component -> open file; the caller closes them.

    Raises:
        BadFile, UnknownFormat: A file cannot be opened.
        WrongModel: A file is another model, or the files do not fit each other.
        BadWeights: A file is damaged.
    """
    opened: dict[str, Opened] = {}
    try:
        for component, path in paths.items():
            opened[component] = part = open_component(path, component, mmap)
            require(part.card, component, part.file.path)
        configs = {component: part.card.config for component, part in opened.items()}
        if "transformer" in configs:
            places = {component: part.file.path for component, part in opened.items()}
            check_compatible(**configs, paths=places)  # type: ignore[arg-type]  # `require` checked the kinds
    except BaseException:
        for part in opened.values():
            part.file.close()
        raise
    return opened


def _with_config(
    file: WeightFile,
    component: str,
    card: ModelCard | None,
    stated: Mapping[str, Any] | None,
    binding: bool,
) -> Opened:
    """Identify a file together with its config.json, if that is binding or agrees with the tensors."""
    if not component:
        card = identify(file) if card is None else card
        component, stated = card.kind, stated if card.config is not None else None
    if stated is None:
        return Opened(file, card if card is not None else identify(file, component))
    agreed = identify(file, component, stated)
    if binding or not agreed.problem:
        return Opened(file, agreed, stated)
    # a config.json beside a single file may belong to another model; the tensors decide
    alone = card if card is not None else identify(file, component)
    if alone.problem:
        return Opened(file, agreed)
    caution = f"config.json beside the file was ignored: {agreed.problem}"
    return Opened(file, replace(alone, cautions=(*alone.cautions, caution)))


def _locate(path: str | PathLike[str], component: str) -> tuple[str, dict[str, Any] | None, bool]:
    """Find the file of a component and the config.json beside it, and whether that config is binding.

    Args:
        path: A weight file, a folder of one component, or a folder with `component` as a subfolder
            (diffusers' layout).
        component: "transformer", "text_encoder" or "vae".

    Returns:
        Path for `open_weights`; the parsed config.json or None; True if a folder was named, whose config.json
        must agree with the tensors. A config.json beside a single file may belong to another model.

    Raises:
        BadFile: The config.json of a named folder cannot be read.
    """
    place = Path(path_text(path))
    try:
        if not place.is_dir():
            return fspath(path), _read_config(place.parent / "config.json", binding=False), False
        if component and (place / component).is_dir():
            place = place / component
        elif (place / "model_index.json").is_file():
            raise BadFile(
                fspath(path), f"a model folder without the part {component!r}", f"download {component}/ to it"
            )
    except (OSError, ValueError):
        return fspath(path), None, False  # open_weights raises an error that says what is wrong
    return str(place), _read_config(place / "config.json", binding=True), True


def _read_config(path: Path, binding: bool) -> dict[str, Any] | None:
    """The parsed file; None if there is none, or if it cannot be read and is not binding."""
    try:
        if not path.is_file() and not path.is_symlink():
            return None
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
        data = json.loads(text) if len(text) <= MAX_CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError):
        data = None
    if isinstance(data, dict):
        return data
    if binding:
        raise BadFile(str(path), "not a JSON object of at most 1 MiB that can be read", "download it again")
    return None
