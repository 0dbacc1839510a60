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

from zimage_core.config import COMPONENTS
from zimage_core.errors import BadFile, printable
from zimage_core.weights.safetensors import shard_names

SUFFIXES = (".safetensors", ".sft", ".gguf")
"""Endings of model files, in any case; they decide which files of a folder are opened, not what they are."""

MOST_FILES = 500
DEPTH = 3
"""Levels of subfolders that are searched for loose files."""

OWN_STEMS = ("diffusion_pytorch_model", "model")
"""Names under which diffusers and transformers save the weights of a component."""

_VARIANT = r"(?:\.(?P<{0}>[A-Za-z]\w{{0,31}}))?"
_INDEX = re.compile(
    r"(?P<stem>.+?)\.(?:safetensors|sft)"
    + _VARIANT.format("v1")
    + r"\.index"
    + _VARIANT.format("v2")
    + r"\.json",
    re.IGNORECASE,
)
_SHARD = re.compile(
    r"(?P<stem>.+?)"
    + _VARIANT.format("v1")
    + r"-(?P<number>\d{3,6})-of-(?P<count>\d{3,6})"
    + _VARIANT.format("v2")
)
_PLAIN = re.compile(r"(?P<stem>.+?)" + _VARIANT.format("v1"))


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


def is_model_file(name: str) -> bool:
    """Whether a file is opened when a folder is searched for models."""
    return name.lower().endswith(SUFFIXES) or _INDEX.fullmatch(name) is not None


def models_in(folder: str | os.PathLike[str]) -> list[Model]:
    """The models that lie directly in a folder, in the order of their names.

    Raises:
        BadFile: The folder cannot be read, or holds too many model files.
    """
    try:
        names = sorted(
            entry.name
            for entry in Path(folder).iterdir()
            if not entry.name.startswith(".") and is_model_file(entry.name) and not entry.is_dir()
        )
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise BadFile(folder, f"a directory that cannot be read: {reason}") from None
    if len(names) > MOST_FILES:
        _refuse_many(folder)
    base = Path(folder)
    found: list[Model] = []
    covered: set[str] = set()
    indexed: set[tuple[str, str]] = set()
    for name in names:
        if match := _INDEX.fullmatch(name):
            model = Model(str(base / name), match["stem"], match["v1"] or match["v2"] or "")
            found.append(model)
            indexed.add((model.stem, model.variant))
            covered |= shard_names(model.path)
    sets: dict[tuple[str, str, int], dict[int, str]] = {}
    for name in names:
        if name in covered or _INDEX.fullmatch(name):
            continue
        stem, _, suffix = name.rpartition(".")
        gguf = suffix.lower() == "gguf"
        if (match := _SHARD.fullmatch(stem)) and int(match["count"]) > 1:
            key = (match["stem"], match["v1"] or match["v2"] or "")
            if gguf:  # the first file of a split GGUF stands for all
                if key not in indexed:
                    found.append(Model(str(base / name), stem))
                indexed.add(key)
            elif key not in indexed:  # else these are shards that a damaged index fails to list
                sets.setdefault((*key, int(match["count"])), {})[int(match["number"])] = name
            continue
        plain = None if gguf else _PLAIN.fullmatch(stem)
        found.append(
            Model(str(base / name), plain["stem"] if plain else stem, plain["v1"] or "" if plain else "")
        )
    found += [_shard_set(base, stem, variant, count, have) for (stem, variant, count), have in sets.items()]
    return sorted(found, key=lambda model: model.name)


def _shard_set(base: Path, stem: str, variant: str, count: int, have: dict[int, str]) -> Model:
    pattern = next(iter(have.values()))
    width = len(re.findall(r"-(\d+)-of-", pattern)[-1])
    head, tail = re.split(r"-\d+-of-", pattern)[0], re.split(r"-\d+(?=-of-)", pattern)[-1]
    missing = tuple(
        f"{head}-{n:0{width}}{tail}" for n in range(1, min(count, MOST_FILES) + 1) if n not in have
    )
    shards = tuple(str(base / have[number]) for number in sorted(have))
    return Model(shards[0], stem, variant, shards, missing)


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
        found += chosen(models_in(place), variant, component=place.name in COMPONENTS)
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
    """Whether a folder has a tokenizer's file; reading it names a merges.txt that is missing."""
    return any(Path(folder, name).is_file() for name in ("tokenizer.json", "vocab.json"))


def listed(models: Sequence[Model]) -> str:
    """Names of models for a message, the first four."""
    return ", ".join([*(printable(model.name, 60) for model in models[:4]), *(["..."] if models[4:] else [])])


def _refuse_many(folder: str | os.PathLike[str]) -> None:
    raise BadFile(folder, f"has more than {MOST_FILES} model files", "name the files, or a smaller folder")
