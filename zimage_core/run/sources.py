"""Finds the files of a pipeline: in a diffusers folder, in a folder of single files, or in the package."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_core.assets import NANO
from zimage_core.config import COMPONENTS
from zimage_core.errors import BadArgument, BadFile, WrongModel, ZImageError, printable
from zimage_core.files import hub
from zimage_core.files.untrusted import read_json
from zimage_core.sampling.schedule import FlowMatchEulerScheduler
from zimage_core.text.tokenizer import Tokenizer
from zimage_core.weights.card import WANTED
from zimage_core.weights.identify import identify
from zimage_core.weights.opened import Opened, open_weights
from zimage_core.weights.safetensors import shard_names
from zimage_core.weights.source import WeightFile

NAMING = (
    "ZImagePipeline.from_files(transformer=, text_encoder=, vae=), "
    "or --transformer FILE --text-encoder FILE --vae FILE on the command line"
)
_DEPTH = 3
_MOST_FILES = 500


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
) -> Sources:
    """Sources of a folder, or of a repository "org/repo" or "org/repo:Q4_K_M" (see `hub`).

    A folder that exists is taken before a repository of the same name.

    Args:
        source: Folder or repository.
        given: Components that the caller has from elsewhere; they may be missing here.
        hub_options: Options for `hub.fetch`.
        mmap: Whether files that are opened hand out tensors as views of a map.

    Raises:
        BadFile: A component is missing, or there are several of one kind; the message names it.
        WrongModel: The folder holds another kind of pipeline.
    """
    path = Path(source)
    if os.fspath(source) and path.is_dir():  # "" would be the working folder
        return _in_folder(path, None, given, mmap)
    if os.fspath(source) and path.exists():
        raise BadFile(path, "is a file, not a folder", f"name all files instead: {NAMING}")
    tag = hub.REPO_ID.fullmatch(os.fspath(source))
    folder = hub.fetch(os.fspath(source), **(hub_options or {}))
    return _in_folder(folder, tag["tag"] if tag else None, given, mmap)


def _in_folder(folder: Path, tag: str | None, given: Collection[str], mmap: bool) -> Sources:
    if tag is None and (folder / "model_index.json").exists():
        return _diffusers(folder, given)
    return _loose(folder, tag, given, mmap)


def _diffusers(folder: Path, given: Collection[str]) -> Sources:
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    if not (isinstance(name, str) and name.startswith("ZImage")):
        raise WrongModel(
            folder,
            f"model_index.json names {printable(name, 60)}, ZImagePipeline is wanted",
            "get a Z-Image folder",
        )
    missing = [part for part in COMPONENTS if part not in given and not (folder / part).is_dir()]
    if missing:
        raise BadFile(folder, f"has no folder {' and '.join(missing)}", "download the whole repository")
    tokenizer = folder / "tokenizer"
    return Sources(
        {part: folder / part for part in COMPONENTS if part not in given},
        tokenizer if tokenizer.is_dir() else None,
        _scheduler(folder / "scheduler"),
    )


def _scheduler(folder: Path) -> FlowMatchEulerScheduler | None:
    path = folder / "scheduler_config.json"
    return FlowMatchEulerScheduler.from_json(read_json(path)) if path.is_file() else None


def _loose(folder: Path, tag: str | None, given: Collection[str], mmap: bool) -> Sources:
    """Choose among single files by their contents; files that are not chosen are closed again."""
    tokenizer = next((p for p in (folder, folder / "tokenizer") if _has_tokenizer(p)), None)
    scheduler = _scheduler(folder / "scheduler")
    wanted = [part for part in COMPONENTS if part not in given]
    opened: list[Opened] = []
    refused: list[str] = []
    chosen: dict[str, Opened] = {}
    try:
        for path in _candidates(folder):
            try:
                file = open_weights(path, mmap)
            except ZImageError as error:
                refused.append(str(error))
                continue
            each = Opened(file, identify(file))
            if each.card.kind in wanted:
                opened.append(each)
            else:
                file.close()
        chosen = _choose(folder, tag, wanted, opened, refused)
    finally:
        for each in opened:
            if each not in chosen.values():
                each.file.close()
    return Sources(dict(chosen), tokenizer, scheduler)


def _choose(
    folder: Path, tag: str | None, wanted: Sequence[str], opened: Sequence[Opened], refused: Sequence[str]
) -> dict[str, Opened]:
    """Choose a file for each component; names only decide between quantisations of one model."""
    chosen = {}
    for part in wanted:
        several = [o for o in opened if o.card.kind == part]
        several = [o for o in several if tag and hub.quant_tag(o.name) == tag.upper()] or several
        if len(several) > 1:
            names = ", ".join(printable(o.name, 60) for o in several[:6])
            fault = f"has {len(several)} files that are {WANTED[part][0]}: {names}"
            raise BadFile(folder, fault, _naming(part))
        if several:
            chosen[part] = several[0]
    if missing := [part for part in wanted if part not in chosen]:
        kinds = " and ".join(WANTED[part][0] for part in missing)
        also = f" (unreadable: {refused[0]})" if refused else ""
        raise BadFile(folder, f"has no file that is {kinds}{also}", _naming(missing[0]))
    return chosen


def _naming(part: str) -> str:
    return f"{WANTED[part][1]}, or name the files: {NAMING}"


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()


def _candidates(folder: Path) -> Iterator[Path]:
    """Weight files below the folder; shards are left out in favour of their index."""
    count = 0
    for root, folders, files in os.walk(folder):
        here = Path(root)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if len(here.relative_to(folder).parts) >= _DEPTH:
            folders.clear()
        indices = sorted(f for f in files if f.endswith(".safetensors.index.json"))
        sharded = {shard for index in indices for shard in shard_names(here / index)}
        for name in sorted(files):
            if name in indices or (name.endswith((".gguf", ".safetensors")) and name not in sharded):
                count += 1
                if count > _MOST_FILES:
                    raise BadFile(
                        folder,
                        f"has more than {_MOST_FILES} model files",
                        "name the files, or a smaller folder",
                    )
                yield here / name


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
    for place in (folder, folder.parent / "tokenizer"):
        if (place / "tokenizer.json").is_file() or (place / "vocab.json").is_file():
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
