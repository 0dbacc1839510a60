"""Finds the files of a pipeline: in a diffusers folder, in a folder of single files, or in the package."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_core.assets import embedded_files
from zimage_core.config import COMPONENTS
from zimage_core.errors import BadArgument, BadFile, printable
from zimage_core.run.checks import read_path
from zimage_core.run.components import SIGLIP
from zimage_core.run.locate import locate
from zimage_core.sampling.schedule import FlowMatchEulerScheduler
from zimage_core.text.tokenizer import Tokenizer
from zimage_core.weights.components import (
    check_pipeline_class,
    open_optional,
    open_parts,
    scheduler_values,
)
from zimage_core.weights.folder import has_tokenizer, tokenizer_of
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


def embedded(omni: bool = False) -> Sources:
    """Sources of the model inside the package, or of its Omni sibling."""
    paths = embedded_files(omni)
    for path in paths.values():
        if not path.is_file():
            fault = "the embedded model is not installed"
            raise BadFile(path, fault, "install zimage_core from its wheel again")
    return Sources({**paths})


def find(
    source: str | os.PathLike[str],
    given: Collection[str] = (),
    hub_options: Mapping[str, Any] | None = None,
    mmap: bool = True,
    variant: str | None = None,
) -> Sources:
    """Sources of a folder, a file with all components, "default" or a repository "org/repo[:Q4_K_M]".

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
    path, tag = locate(source, hub_options, variant)
    if path.is_dir() and tag is None:
        check_pipeline_class(path)
    beside = path if path.is_dir() else path.parent
    values = None if "scheduler" in given else scheduler_values(beside)
    try:
        scheduler = None if values is None else FlowMatchEulerScheduler.from_json(values)
    except BadArgument as error:  # the file is wrong, not the caller's argument
        config = beside / "scheduler" / "scheduler_config.json"
        raise BadFile(config, str(error).removeprefix(f"{config.name}: "), "correct or remove it") from None
    wanted = [part for part in COMPONENTS if part not in given]
    paths: dict[str, Path | Opened] = dict(open_parts(path, wanted, mmap, variant, tag))
    if SIGLIP not in given and (tower := open_optional(path, SIGLIP, mmap, variant)) is not None:
        paths[SIGLIP] = tower
    return Sources(paths, tokenizer_of(beside), scheduler)


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
