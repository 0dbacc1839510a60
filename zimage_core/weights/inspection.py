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
from zimage_core.scheduler_config import scheduler_shift
from zimage_core.weights import documents, download
from zimage_core.weights.components import (
    check_pipeline_class,
    identify_open,
    open_optional,
    open_parts,
    open_pipeline,
    scheduler_values,
)
from zimage_core.weights.folder import folders_below, has_tokenizer, loose_models, tokenizer_of
from zimage_core.weights.identify import identify
from zimage_core.weights.opened import Opened, open_model, open_weights
from zimage_core.weights.source import Source, path_text

if TYPE_CHECKING:
    from zimage_core.weights.source import WeightFile

PARTS = (*COMPONENTS, "tokenizer")
"""What is needed to make an image; a GGUF text encoder contains its tokenizer."""
NOT_USED = ("unknown",)
"""Kinds of files that no command takes."""
NOTHING_FOUND = "no NaN, no infinity, nothing beyond float16, no long runs of zeros"
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
        also: Other components in the same file.
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
    also: tuple[str, ...] = ()
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
        also=card.also,
        notes=card.notes + card.cautions + tuple(_beside(file, other) for other in card.also) + read,
        warnings=warnings,
        metadata={key: _short(value) for key, value in file.metadata.items()},
        tensors={name: (t.format.name, t.shape, t.nbytes) for name, t in file.tensors.items()},
    )


def _beside(file: WeightFile, component: str) -> str:
    """A remark on another component in the file, and why it cannot be used."""
    card = identify(file, component)
    reason = "" if card.sound else f", which cannot be used: {card.problem or card.faults()}"
    return f"holds a {component} too{reason}"


def _has_tokenizer(file: WeightFile, kind: str) -> bool:
    """Whether the file has a tokenizer: inside it for a GGUF text encoder, else in its folder."""
    if kind != "text_encoder":
        return False
    if "tokenizer.ggml.tokens" in file.metadata:
        return True
    folder = Path(file.path).parent
    return any(has_tokenizer(place) for place in (folder, folder / "tokenizer", folder.parent / "tokenizer"))


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


def _check_tokenizer(folder: Path) -> None:
    """Refuse the tokenizer of a folder as the first prompt of a run would.

    Raises:
        BadFile: It cannot be read.
        Unsupported: It is of another kind, or lacks the tokens of the template.
    """
    from zimage_core.text.prompt import check_template_tokens
    from zimage_core.text.tokenizer_json import read_folder

    vocabulary = read_folder(folder)
    vocabulary.checked()
    check_template_tokens(vocabulary.added)


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
    """A folder of any kind: what is in it, and whether `generate` would draw with it."""
    parts: list[Inspection] = []
    broken: list[str] = []
    for place in folders_below(path):
        try:
            if has_tokenizer(place):
                parts.append(_tokenizer(place))
        except ZImageError as error:
            broken.append(str(error))
    for model in loose_models(path):
        try:
            with open_model(model, mmap=False) as file:
                parts.append(_weights(identify_open(file), full))
        except ZImageError as error:
            broken.append(str(error))
    if not parts and broken:
        raise BadFile(path, f"a directory in which nothing can be read: {broken[0]}")
    if not parts:
        fault = f"a directory without model files{download.beside(path)}"
        raise BadFile(path, fault, "name a model file or its folder")
    needs, problem = _verdict(path, parts)
    whole = not needs and not problem
    return Inspection(
        path=fspath(path),
        container="folder",
        nbytes=sum(part.nbytes for part in parts),
        kind="pipeline" if whole else "collection",
        title="all parts of a Z-Image pipeline" if whole else f"a folder with {_listing(parts)}",
        usable=not problem and (whole or not broken),
        problem=problem or ("" if whole else "; ".join(broken)),
        needs=tuple(needs),
        notes=tuple(f"cannot be read and is left out: {fault}" for fault in broken) if whole else (),
        warnings=tuple(f"{Path(part.path).name}: {text}" for part in parts for text in part.warnings),
        parts=tuple(parts),
    )


def _verdict(path: Path, parts: list[Inspection]) -> tuple[list[str], str]:
    """Components that the folder lacks, and the reason why a run would refuse those that it has, or ""."""
    have = {kind for part in parts for kind in (part.kind, *part.also)}
    needs = [name for name in COMPONENTS if name not in have]
    if "tokenizer" not in have and all("tokenizer" in p.needs for p in parts if p.kind == "text_encoder"):
        needs.append("tokenizer")
    if needs:
        return needs, ""
    opened: dict[str, Opened] = {}
    try:
        check_pipeline_class(path)
        if (schedule := scheduler_values(path)) is not None:
            scheduler_shift(schedule)
        opened = open_parts(path, mmap=False)
        takes_images = getattr(opened["transformer"].card.config, "siglip_feat_dim", None) is not None
        if takes_images and (tower := open_optional(path, "siglip", mmap=False)) is not None:
            opened["siglip"] = tower
        open_pipeline(opened)
        if (place := tokenizer_of(path)) is not None:
            _check_tokenizer(place)
    except ZImageError as error:
        return [], str(error)
    finally:
        for part in opened.values():
            part.file.close()
    return [], ""


def _listing(parts: list[Inspection]) -> str:
    counts = Counter(part.kind.replace("_", " ") for part in parts)
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def dumps(inspections: list[Inspection], tensors: bool = False) -> str:
    """JSON text: one object for one file, a list for several; with the table of tensors if `tensors`."""
    data = [_pruned(item.to_json(), tensors) for item in inspections]
    return json.dumps(data[0] if len(data) == 1 else data, ensure_ascii=True, indent=2, default=str)


def _pruned(item: dict[str, Any], tensors: bool) -> dict[str, Any]:
    if not tensors:
        del item["tensors"]
    item["parts"] = [_pruned(part, tensors) for part in item["parts"]]
    return item
