"""Finds the files of a pipeline: in a diffusers folder, in a folder of single files, or in the package."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from zimage_core.assets import NANO, named
from zimage_core.config import COMPONENTS
from zimage_core.errors import BadArgument, BadFile, ZImageError, printable
from zimage_core.files import hub
from zimage_core.run.checks import read_path
from zimage_core.sampling.schedule import FlowMatchEulerScheduler
from zimage_core.text.tokenizer import Tokenizer
from zimage_core.weights.components import (
    NAMING,
    check_pipeline_class,
    open_component,
    open_parts,
    scheduler_values,
)
from zimage_core.weights.folder import has_tokenizer
from zimage_core.weights.opened import Opened, open_weights
from zimage_core.weights.source import WeightFile


@dataclass(frozen=True)
class Sources:
    """Locations of the components of a pipeline.

    Args:
        paths: Component -> file or folder of shards; or the open file, if it had to be opened to identify it.
        tokenizer: File or folder; None to use the text encoder's file.
        scheduler: The schedule that the folder states; None if it states none.
    """

    paths: dict[str, Path | Opened]
    tokenizer: Path | None = None
    scheduler: FlowMatchEulerScheduler | None = None


def embedded() -> Sources:
    """Sources of the model inside the package."""
    names = {"transformer": "transformer.gguf", "text_encoder": "text_encoder.gguf", "vae": "vae.safetensors"}
    for name in names.values():
        if not (NANO / name).is_file():
            fault = "the embedded model is not installed"
            raise BadFile(NANO / name, fault, "install zimage_core from its wheel again")
    return Sources({component: NANO / name for component, name in names.items()})


def find(
    source: str | os.PathLike[str],
    given: Collection[str] = (),
    hub_options: Mapping[str, Any] | None = None,
    mmap: bool = True,
    variant: str | None = None,
) -> Sources:
    """Sources of a folder, a file with all components, "default" or a repository "org/repo[:Q4_K_M]".

    A folder that exists comes before the embedded model and before a repository of its name (see `hub`). A
    path below a folder that exists is never looked for on the Hub.

    Args:
        source: Folder, file or repository.
        given: Components that the caller has from elsewhere, "scheduler" among them; they may be missing
            here, and are not read.
        hub_options: Options for `hub.fetch`.
        mmap: Whether files that are opened hand out tensors as views of a map.
        variant: The variant of the files, such as "fp16"; a component without it gives its plain files.

    Raises:
        BadFile: A component is missing, or there are several of one kind; the message names it.
        WrongModel: The folder holds another kind of pipeline.
    """
    path = Path(named(source))
    if os.fspath(source) and path.is_dir():  # "" would be the working folder
        return _in_folder(path, None, given, mmap, variant)
    if os.fspath(source) and path.exists():
        return _in_file(path, given, mmap)
    tag = hub.REPO_ID.fullmatch(os.fspath(source))
    parent = os.fspath(source).partition("/")[0]
    alike = _alike(Path(tag["repo"]) if tag else path)
    if tag is None and alike:
        raise BadFile(path, "there is no such folder or file", alike)
    if tag is not None and Path(parent).is_dir():
        fault = (
            "there is no such folder or file, and no repository of the Hub is meant, "
            f"since {printable(parent)} is a folder here"
        )
        raise BadFile(path, fault, alike or "check the path")
    folder = hub.fetch(os.fspath(source), **(hub_options or {}), variant=variant)
    return _in_folder(folder, tag["tag"] if tag else None, given, mmap, variant)


def _alike(path: Path) -> str:
    """The name beside a path that does not exist which is most like its own; "" if there is none."""
    names: list[str] = []
    with suppress(OSError):  # a parent that is not there, or is not ours to read
        names = [each.name for each in islice(path.parent.iterdir(), 1000)]
    return "".join(
        f"did you mean {printable(path.with_name(name))}?" for name in get_close_matches(path.name, names, 1)
    )


def _in_file(path: Path, given: Collection[str], mmap: bool) -> Sources:
    """Sources of one file that holds all components; tokenizer and scheduler may lie beside it."""
    wanted = [part for part in COMPONENTS if part not in given]
    scheduler = _scheduler(path.parent, given)
    opened = None
    try:
        opened = open_component(path, mmap=mmap)
        held = (opened.card.kind, *opened.card.also)
        missing = [part.replace("_", " ") for part in wanted if part not in held]
        fault = f"is {opened.card.title} without {' and '.join(missing)}, and no folder" if missing else ""
    except ZImageError:
        fault = "is a file, not a folder"
    if fault or opened is None:
        if opened is not None:
            opened.file.close()
        raise BadFile(path, fault, f"name all files instead: {NAMING}")
    return Sources({part: open_component(opened, part) for part in wanted}, None, scheduler)


def _in_folder(
    folder: Path, tag: str | None, given: Collection[str], mmap: bool, variant: str | None
) -> Sources:
    if tag is None:
        check_pipeline_class(folder)
    scheduler = _scheduler(folder, given)
    return Sources(
        dict(open_parts(folder, [part for part in COMPONENTS if part not in given], mmap, variant, tag)),
        next((place for place in (folder / "tokenizer", folder) if has_tokenizer(place)), None),
        scheduler,
    )


def _scheduler(folder: Path, given: Collection[str]) -> FlowMatchEulerScheduler | None:
    """The schedule that a folder states; None if it states none, or if the caller has one."""
    values = None if "scheduler" in given else scheduler_values(folder)
    return None if values is None else FlowMatchEulerScheduler.from_json(values)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer from a tokenizer.json, a folder with one or with vocab.json and merges.txt, or a GGUF.

    Raises:
        BadArgument: The path is no path.
        BadFile: There is no tokenizer, or a damaged one.
        Unsupported: It is of a kind that is not supported.
    """
    return find_tokenizer(read_path("path", path), None)


def find_tokenizer(given: str | os.PathLike[str] | Tokenizer | None, encoder: WeightFile | None) -> Tokenizer:
    """Find the tokenizer: the one given, else the text encoder's own, else one beside its file.

    Raises:
        BadFile: There is none, or it is damaged.
    """
    if isinstance(given, (str, os.PathLike)):
        path = Path(given)
        pair = {path.parent / "vocab.json", path.parent / "merges.txt"}
        if path in pair and all(p.is_file() for p in pair):
            path = path.parent
        if path.is_dir():
            return Tokenizer.from_folder(path)
        if not _is_gguf(path):
            return Tokenizer.from_json(path)  # its errors also cover a path that does not exist
        with open_weights(path) as weights:
            return Tokenizer.from_gguf(weights)
    if given is not None:
        if not hasattr(given, "encode") or not hasattr(given, "vocab_size"):
            kind = printable(type(given).__name__, 40)
            raise BadArgument(f"tokenizer: got {kind}, wanted a path or a zimage_core tokenizer")
        return given
    if encoder is None:
        raise BadArgument("tokenizer: give one, the text encoder was not read from a file")
    if "tokenizer.ggml.tokens" in encoder.metadata:
        return Tokenizer.from_gguf(encoder)
    folder = Path(encoder.path).parent
    for place in (folder, folder / "tokenizer", folder.parent / "tokenizer"):
        if has_tokenizer(place):
            return Tokenizer.from_folder(place)
    raise BadFile(
        encoder.path,
        "this text encoder has no tokenizer in it or beside it",
        "pass tokenizer= (tokenizer.json, a tokenizer folder, or a GGUF of Qwen3-4B)",
    )


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"
