"""Lists the models of a folder by their names: single files, and shards with or without an index.

Two models that differ only in diffusers' variant ("model.safetensors", "model.fp16.safetensors") are one
model for the reader: without a wish the files without a variant count, as in diffusers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from zimage_core.config import COMPONENTS, OPTIONAL_COMPONENTS
from zimage_core.errors import BadFile, printable
from zimage_core.files.model_names import OWN_STEMS, ModelName, parse
from zimage_core.weights.safetensors import shard_names

MOST_FILES = 500
DEPTH = 3
"""Levels of subfolders that are searched for loose files."""


@dataclass(frozen=True)
class Model:
    """A model in a folder.

    Args:
        path: Its file, its index of shards, or the first of its shards.
        stem: Name without variant, number and ending.
        variant: diffusers' variant, such as "fp16"; "" if there is none.
        shards: Paths of all shards, if there is no index that lists them.
        missing: Names of shards that are not in the folder.
    """

    path: str
    stem: str
    variant: str = ""
    shards: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return Path(self.path).name


def models_in(folder: str | os.PathLike[str]) -> list[Model]:
    """The models that lie directly in a folder, in the order of their names.

    Raises:
        BadFile: The folder cannot be read, or holds too many model files.
    """
    try:
        inside = sorted(
            entry.name
            for entry in Path(folder).iterdir()
            if not entry.name.startswith(".") and not entry.is_dir()
        )
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise BadFile(folder, f"a directory that cannot be read: {reason}") from None
    names = [parsed for parsed in map(parse, inside) if parsed is not None]
    if len(names) > MOST_FILES:
        _refuse_many(folder)
    base = Path(folder)
    found: list[Model] = []
    covered: set[str] = set()
    indexed: set[tuple[str, str]] = set()
    for each in names:
        if each.index:
            found.append(Model(str(base / each.name), each.stem, each.variant))
            indexed.add((each.stem, each.variant))
            covered |= shard_names(base / each.name)
    shards: dict[tuple[str, str, int, bool], list[ModelName]] = {}
    for each in names:
        if each.index or each.name in covered:
            continue
        if each.number == 0:
            found.append(Model(str(base / each.name), each.stem, each.variant))
        elif (each.stem, each.variant) not in indexed:  # else a shard that a damaged index fails to list
            shards.setdefault((each.stem, each.variant, each.count, each.gguf), []).append(each)
    found += [_shard_set(base, sorted(have, key=lambda shard: shard.number)) for have in shards.values()]
    return sorted(found, key=lambda model: model.name)


def _shard_set(base: Path, have: list[ModelName]) -> Model:
    first = have[0]
    if first.gguf:  # a split GGUF is opened by its first file
        return Model(str(base / first.name), first.stem)
    there = {shard.number for shard in have}
    *_, number, tail = re.split(r"(?<=-)(\d+)(?=-of-)", first.name)
    prefix = first.name.removesuffix(number + tail)
    missing = [n for n in range(1, min(first.count, MOST_FILES) + 1) if n not in there]
    return Model(
        str(base / first.name),
        first.stem,
        first.variant,
        tuple(str(base / shard.name) for shard in have),
        tuple(f"{prefix}{n:0{len(number)}}{tail}" for n in missing),
    )


def chosen(models: Sequence[Model], variant: str | None = None, component: bool = False) -> list[Model]:
    """The models that count: of those with one stem, those of the wished variant, else those without one.

    Args:
        models: The models of one folder.
        variant: The wished variant; None for the files without one.
        component: True for a component's folder, where diffusers' and transformers' own names come first.
    """
    stems: dict[str, list[Model]] = {}
    for model in models:
        stems.setdefault(model.stem, []).append(model)
    found = []
    for stem, group in stems.items():
        wished = (
            [m for m in group if m.variant == (variant or "")] or [m for m in group if not m.variant] or group
        )
        if component and len(wished) > 1:
            # diffusers prefers shards to a whole file, transformers the whole file
            whole = [m for m in wished if not m.shards and not m.name.lower().endswith(".json")]
            wished = (whole if stem == "model" else [m for m in wished if m not in whole]) or wished
        found += wished
    if component:
        found = [m for m in found if m.stem in OWN_STEMS and not m.name.lower().endswith(".gguf")] or found
    return found


def folders_below(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """The folder and its subfolders up to `DEPTH` levels down, in order; hidden ones are left out.

    Raises:
        BadFile: There are too many folders.
    """
    for count, (root, inside, _) in enumerate(os.walk(folder, followlinks=True)):
        if count >= MOST_FILES:
            raise BadFile(
                folder, f"has more than {MOST_FILES} subfolders", "name the files, or a smaller folder"
            )
        here = Path(root)
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        if len(here.relative_to(folder).parts) >= DEPTH:
            inside.clear()
        yield here


def loose_models(folder: str | os.PathLike[str], variant: str | None = None) -> list[Model]:
    """The models of a folder and its subfolders.

    Raises:
        BadFile: A folder cannot be read, or there are too many model files.
    """
    found: list[Model] = []
    for place in folders_below(folder):
        found += chosen(
            models_in(place), variant, component=place.name in (*COMPONENTS, *OPTIONAL_COMPONENTS)
        )
        if len(found) > MOST_FILES:
            _refuse_many(folder)
    return found


def component_folder(folder: Path, component: str) -> Path | None:
    """The subfolder of a component in diffusers' layout, if it holds a model."""
    place = folder / component
    try:
        return place if component and place.is_dir() and models_in(place) else None
    except (OSError, ValueError):
        return None


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has a tokenizer's file; reading it says what is missing, as a link's target."""
    return any(os.path.lexists(Path(folder, name)) for name in ("tokenizer.json", "vocab.json"))


def tokenizer_of(folder: Path) -> Path | None:
    """Where the tokenizer of a folder of parts lies, or None."""
    return next((place for place in (folder / "tokenizer", folder) if has_tokenizer(place)), None)


def listed(models: Sequence[Model]) -> str:
    """Names of models for a message, the first four."""
    return ", ".join([*(printable(model.name, 60) for model in models[:4]), *(["..."] if models[4:] else [])])


def _refuse_many(folder: str | os.PathLike[str]) -> None:
    raise BadFile(folder, f"has more than {MOST_FILES} model files", "name the files, or a smaller folder")
