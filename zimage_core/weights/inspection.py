"""Describes a file from its headers: what it is, what it holds, and what it lacks to make an image.

Accepts model files (GGUF, safetensors, sharded or not), folders of them, tokenizer files and images made
by this library. Imports neither torch nor NumPy unless the data itself is to be read (`full=True`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_core.config import COMPONENTS
from zimage_core.errors import BadFile, ZImageError, printable

if TYPE_CHECKING:
    from zimage_core.weights.opened import Opened
    from zimage_core.weights.source import WeightFile

PARTS = (*COMPONENTS, "tokenizer")
"""What is needed to make an image; a GGUF text encoder contains its tokenizer."""
NOT_USED = ("unknown", "lora", "adapter", "controlnet")
"""Kinds of files that no command takes."""
NOTHING_FOUND = "no NaN, no infinity, nothing beyond float16, no long runs of zeros"
MAX_FILES = 200  # of one folder
MODEL_SUFFIXES = (".gguf", ".safetensors", ".safetensors.index.json")
_HEAD = 1 << 16
_TOKENIZER = re.compile(rb'"(added_tokens|normalizer|pre_tokenizer|post_processor|decoder|model|merges)"\s*:')
_MAX_TEXT = 2000


@dataclass(frozen=True)
class TypeCount:
    """Tensors of one format in a file.

    Args:
        format: Name, as in `zimage_core.formats`.
        tensors: Number of tensors.
        weights: Number of weights in all of them.
        nbytes: Size of all of them in bytes.
    """

    format: str
    tensors: int
    weights: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """The answer of `inspect_file`.

    Args:
        path: As given.
        container: "gguf", "safetensors", "tokenizer", "document", "png" or "folder".
        nbytes: Size on disk in bytes; for a folder, that of all its model files.
        kind: "transformer", "text_encoder", "vae", "lora", "tokenizer", "image", "imatrix", "document",
            "pipeline", "other" ...
        title: Noun phrase that says what the file is.
        usable: Whether this library can use the file.
        problem: Why it cannot, or "".
        config: Sizes of the network, or other facts.
        types: Formats of the tensors, largest first.
        needs: Components that must come from other files before an image can be made.
        notes: Remarks for the user.
        warnings: Values that are not finite or do not fit float16 (only with `full`).
        metadata: Keys of the file, long values shortened; the settings of an image.
        tensors: name -> (format, shape, bytes).
        parts: The files of a folder.
    """

    path: str
    container: str
    nbytes: int
    kind: str
    title: str
    usable: bool = True
    problem: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    types: tuple[TypeCount, ...] = ()
    needs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = field(default_factory=dict)
    parts: tuple[Inspection, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return asdict(self)


def inspect_file(path: str | PathLike[str], full: bool = False) -> Inspection:
    """Describe a file or folder by what is in it.

    Args:
        path: Model file, folder, tokenizer.json, importance matrix, config, recipe or PNG.
        full: Read all data too and warn of NaN, infinity, values outside float16 and long runs of zeros.

    Raises:
        BadArgument: The path is no path, or empty.
        BadFile: The file is damaged, truncated, or of no kind known here; the message says which.
        UnknownFormat: The file holds a tensor type that zimage_core.formats does not describe.
    """
    from zimage_core.weights import documents
    from zimage_core.weights.opened import identify_open, open_weights
    from zimage_core.weights.source import Source, path_text

    place = Path(path_text(path))
    if "\0" not in fspath(path) and place.is_dir():
        return _folder(place, full)
    source = Source(path, mmap=False)
    try:
        head = bytes(source.read_at(0, min(_HEAD, source.size)))
        if head.startswith(b"\x89PNG"):
            return _image(place)
        looks = head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and _TOKENIZER.search(head)
        if not looks and b'"weight_map"' not in head and (found := documents.describe(source, head)):
            kind, title, facts = found
            return Inspection(fspath(path), "document", source.size, kind, title, config=facts)
        # a JSON file too damaged to recognise is treated as a tokenizer, whose reader names the fault
        if looks or (place.suffix == ".json" and b'"weight_map"' not in head):
            return _tokenizer(place)
        with open_weights(source) as file:  # not by its path: another file may have been moved there
            return _weights(identify_open(file), full)
    finally:
        source.close()


def _weights(opened: Opened, full: bool) -> Inspection:
    file, card = opened.file, opened.card
    faults = card.faults()
    needs = list(card.needs)
    if card.kind in PARTS and not _has_tokenizer(file, card.kind):
        needs.append("tokenizer")
    warnings = tuple(_warnings(file)) if full else ()
    read = (f"all data was read: {'see the warnings' if warnings else NOTHING_FOUND}",) if full else ()
    return Inspection(
        path=file.path,
        container=file.kind,
        nbytes=file.size,
        kind=card.kind,
        title=card.title,
        usable=not card.problem and not faults and card.kind not in NOT_USED,
        problem="; ".join(filter(None, (card.problem, faults))),
        config={} if card.config is None else asdict(card.config),
        types=_types(file),
        needs=tuple(needs),
        notes=card.notes + card.cautions + tuple(f"holds a {other} too" for other in card.also) + read,
        warnings=warnings,
        metadata={key: _short(value) for key, value in file.metadata.items()},
        tensors={name: (t.format.name, t.shape, t.nbytes) for name, t in file.tensors.items()},
    )


def _has_tokenizer(file: WeightFile, kind: str) -> bool:
    """Whether the file has a tokenizer: inside it for a GGUF text encoder, else in its folder."""
    if kind != "text_encoder":
        return False
    if "tokenizer.ggml.tokens" in file.metadata:
        return True
    folder = Path(file.path) if Path(file.path).is_dir() else Path(file.path).parent
    return any(_holds_tokenizer(place) for place in (folder, folder.parent / "tokenizer"))


def _holds_tokenizer(folder: Path) -> bool:
    names = ("vocab.json", "merges.txt")
    return (folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in names)


def _types(file: WeightFile) -> tuple[TypeCount, ...]:
    tensors: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for info in file.tensors.values():
        count = 1
        for size in info.shape:
            count *= size
        tensors[info.format.name] += 1
        weights[info.format.name] += count
        nbytes[info.format.name] += info.nbytes
    return tuple(TypeCount(name, tensors[name], weights[name], n) for name, n in nbytes.most_common())


def _warnings(file: WeightFile) -> Iterator[str]:
    from zimage_core.weights.scan import scan

    yield from scan(file)


def _short(value: object) -> Any:
    """A metadata value for display: arrays as their length, long text cut."""
    if isinstance(value, (bool, int, float)) or value is None:
        return value
    if isinstance(value, str):
        return value if len(value) <= _MAX_TEXT else value[:_MAX_TEXT] + "..."
    try:
        return f"[{len(value)} values]"  # type: ignore[arg-type]
    except TypeError:
        return printable(value)


def _tokenizer(path: Path) -> Inspection:
    from zimage_core.text.tokenizer_json import read_folder, read_tokenizer_json

    vocabulary = read_folder(path) if path.is_dir() else read_tokenizer_json(path)
    tokens = vocabulary.checked()
    return Inspection(
        path=fspath(path),
        container="tokenizer",
        nbytes=Path(vocabulary.path).stat().st_size,
        kind="tokenizer",
        title="a byte-level BPE tokenizer",
        config={
            "tokens": len(tokens),
            "merges": len(vocabulary.merges),
            "added_tokens": len(vocabulary.added),
        },
        needs=("transformer", "text_encoder", "vae"),
    )


def _image(path: Path) -> Inspection:
    from zimage_core.files.png import read_metadata

    found = read_metadata(path)
    settings = found.settings
    texts: dict[str, Any] = dict(found.text)
    if settings is not None:
        texts["zimage"] = settings
    return Inspection(
        path=fspath(path),
        container="png",
        nbytes=path.stat().st_size,
        kind="image",
        title=f"a PNG of {found.width} x {found.height} pixels",
        config={"width": found.width, "height": found.height},
        notes=() if found.text else ("it carries no settings",),
        metadata=texts,
    )


def _folder(path: Path, full: bool) -> Inspection:
    """A diffusers folder, a folder with a sharded model, or a folder of single files."""
    parts: list[Inspection] = []
    broken: list[str] = []
    for place in _places(path):
        try:
            if place.is_dir() and _holds_tokenizer(place):
                parts.append(_tokenizer(place))
            if not place.is_dir():
                parts.append(inspect_file(place, full))
        except ZImageError as error:
            broken.append(str(error))
    if not parts and broken:
        raise BadFile(path, f"a directory in which nothing can be read: {broken[0]}")
    if not parts:
        raise BadFile(path, "a directory without model files", "name a model file or its folder")
    have = {part.kind for part in parts if part.usable}
    needs = [name for name in COMPONENTS if name not in have]
    encoders = [part for part in parts if part.kind == "text_encoder"]
    if "tokenizer" not in have and all("tokenizer" in part.needs for part in encoders):
        needs.append("tokenizer")
    if not needs:
        broken += _mismatch(parts)
    whole = not needs and not broken
    return Inspection(
        path=fspath(path),
        container="folder",
        nbytes=sum(part.nbytes for part in parts),
        kind="pipeline" if whole else "collection",
        title="all parts of a Z-Image pipeline" if whole else f"a folder with {_listing(parts)}",
        usable=not broken,
        problem="; ".join(broken),
        needs=tuple(needs),
        warnings=tuple(f"{Path(part.path).name}: {text}" for part in parts for text in part.warnings),
        parts=tuple(parts),
    )


def _mismatch(parts: list[Inspection]) -> list[str]:
    """Why the three networks, each of them usable, do not belong together."""
    from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
    from zimage_core.weights.card import check_compatible

    found = {part.kind: part for part in reversed(parts) if part.usable}
    try:
        check_compatible(
            TransformerConfig(**found["transformer"].config),
            TextEncoderConfig(**found["text_encoder"].config),
            AutoencoderConfig(**found["vae"].config),
            {kind: part.path for kind, part in found.items()},
        )
    except ZImageError as error:
        return [str(error)]
    return []


def _listing(parts: list[Inspection]) -> str:
    counts = Counter(part.kind.replace("_", " ") for part in parts)
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _places(path: Path) -> list[Path]:
    """Model files of a folder and its subfolders, and the subfolders themselves, which may hold tokenizers.

    Shards that an index lists are left out in favour of the index.
    """
    from zimage_core.weights.safetensors import shard_names

    places: list[Path] = []
    try:
        inside = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        for folder in (path, *inside[:MAX_FILES]):
            files = sorted(p for p in folder.iterdir() if p.name.endswith(MODEL_SUFFIXES) and not p.is_dir())
            listed = {s for p in files if p.name.endswith(".index.json") for s in shard_names(p)}
            places += [folder, *(p for p in files if p.name not in listed)]
    except OSError as error:
        raise BadFile(path, f"a directory that cannot be read: {error.strerror}") from None
    if len(places) > 2 * MAX_FILES:
        raise BadFile(
            path, f"a directory with {len(places)} model files and folders, more than {2 * MAX_FILES}"
        )
    return places


def dumps(inspections: list[Inspection], tensors: bool = False) -> str:
    """JSON text: one object for one file, a list for several; with the table of tensors if `tensors`."""
    data = [_pruned(item.to_json(), tensors) for item in inspections]
    return json.dumps(data[0] if len(data) == 1 else data, ensure_ascii=True, indent=2, default=str)


def _pruned(item: dict[str, Any], tensors: bool) -> dict[str, Any]:
    if not tensors:
        del item["tensors"]
    item["parts"] = [_pruned(part, tensors) for part in item["parts"]]
    return item
