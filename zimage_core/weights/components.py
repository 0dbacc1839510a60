"""Finds, opens and identifies the components of a pipeline in files and in folders of any layout.

docs/guides/files.md states the rules for users.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from zimage_core.config import COMPONENTS
from zimage_core.errors import BadFile, WrongModel, ZImageError, printable
from zimage_core.files.hub import quant_tag
from zimage_core.files.untrusted import read_json
from zimage_core.scheduler_config import EULER
from zimage_core.weights import download
from zimage_core.weights.card import WANTED, ModelCard, check_compatible, require
from zimage_core.weights.folder import (
    chosen,
    component_folder,
    folders_below,
    loose_models,
    models_in,
)
from zimage_core.weights.identify import identify, name_packing
from zimage_core.weights.opened import Opened, is_folder, only_model, open_model, open_weights
from zimage_core.weights.packings import stated_packing
from zimage_core.weights.source import WeightFile, path_text
from zimage_core.weights.storage import WAY_ROUND

NAMING = "transformer=, text_encoder= and vae="
MAX_CONFIG_BYTES = 1 << 20


class Absent(BadFile):
    """A folder has no file for a component, and none that could not be read."""


def open_component(
    path: str | PathLike[str] | Opened, component: str = "", mmap: bool = True, variant: str | None = None
) -> Opened:
    """Open the file of a component and identify it; headers only.

    Args:
        path: A GGUF or safetensors file, an index of shards, or a folder: of the component, of a pipeline in
            diffusers' layout, or of loose files. An `Opened` of the component is used as it is.
        component: "transformer", "text_encoder", "vae" or "siglip"; "" accepts any model, and of a folder
            with several the transformer.
        mmap: Hand out tensors as views of the file.
        variant: In a folder, the variant of the files, such as "fp16"; None for those without one.

    Returns:
        The open file with its card, which may be another model's; `require` refuses that.

    Raises:
        BadFile: The path holds no model file that can be opened, or several that could be meant.
    """
    if isinstance(path, Opened):
        if not component or component == path.card.kind:
            return path
        return _with_config(path.file, component, None, _config_beside(path.file.path), binding=False)
    path = path_text(path)
    if not is_folder(path):
        file = open_weights(path, mmap)
        return _with_config(file, component, None, _config_beside(path), binding=False)
    folder = Path(path)
    if component:
        return open_parts(folder, (component,), mmap, variant)[component]
    parts = [name for name in COMPONENTS if component_folder(folder, name)]
    if parts[:1] == list(COMPONENTS[:1]):
        return open_component(folder, parts[0], mmap, variant)
    if not parts and _holds_one_model(folder, variant):
        return _in_component_folder(folder, "", mmap, variant)
    survey = _Survey(folder, mmap, variant)
    try:
        kinds = [name for name in COMPONENTS if survey.candidates(name)]
        if parts and kinds[:1] != list(COMPONENTS[:1]):  # no loose transformer beside the subfolders
            return open_component(folder, parts[0], mmap, variant)
        return survey.choose(kinds[:1] or COMPONENTS[:1], None)[(kinds or COMPONENTS)[0]]
    finally:
        survey.close_others()


def open_parts(
    folder: str | PathLike[str],
    wanted: Sequence[str] = COMPONENTS,
    mmap: bool = True,
    variant: str | None = None,
    tag: str | None = None,
) -> dict[str, Opened]:
    """Open the components in a folder, or in one file that holds them: the one rule of what a path means.

    The subfolder of a component (diffusers' layout) is taken first. Other components are looked for among all
    model files of the folder, by their contents; a file that holds several serves each of them.

    Args:
        folder: The folder, of a pipeline or of one component; or the file.
        wanted: The components to open.
        mmap: Hand out tensors as views of the files.
        variant: The variant of the files, such as "fp16"; None for those without one.
        tag: A quantisation, such as "Q4_K_M": among several files of a component the one of that name.

    Returns:
        Component -> open file; the caller closes them.

    Raises:
        BadFile: A component is missing, cannot be opened, or there are several of one kind.
    """
    folder = Path(path_text(folder))
    if not is_folder(str(folder)):
        return _in_file(folder, wanted, mmap)
    found = {} if tag else {part: component_folder(folder, part) for part in wanted}
    places = {part: place for part, place in found.items() if place is not None}
    varied = {part for part, place in places.items() if variant in {m.variant for m in models_in(place)}}
    opened: dict[str, Opened] = {}
    try:
        for part, place in places.items():
            # as in diffusers, components without files of the variant give their plain ones
            wish = variant if part in varied or not varied else None
            opened[part] = _in_component_folder(place, part, mmap, wish)
        rest = [part for part in wanted if part not in opened]
        if len(wanted) == len(rest) == 1 and _holds_one_model(folder, variant):
            return {rest[0]: _in_component_folder(folder, rest[0], mmap, variant)}
        if rest:
            survey = _Survey(folder, mmap, variant)
            try:
                opened |= survey.choose(rest, tag)
            finally:
                survey.close_others()
    except BaseException:
        for each in opened.values():
            each.file.close()
        raise
    return opened


def open_optional(
    folder: str | PathLike[str], component: str, mmap: bool = True, variant: str | None = None
) -> Opened | None:
    """Open a component that a pipeline may have, such as Omni's vision tower.

    Args:
        folder: The folder of a pipeline.
        component: One of `config.OPTIONAL_COMPONENTS`, whose subfolder is looked at.
        mmap: Hand out tensors as views of the file.
        variant: The variant of the files, such as "fp16", where the subfolder has it.

    Returns:
        The open file with its card, which may be another model's; None where there is no such subfolder.

    Raises:
        BadFile: The subfolder's file cannot be opened, or there are several.
    """
    place = component_folder(Path(path_text(folder)), component)
    if place is None:
        return None
    has = variant in {model.variant for model in models_in(place)}
    return _in_component_folder(place, component, mmap, variant if has else None)


def _in_file(path: Path, wanted: Sequence[str], mmap: bool) -> dict[str, Opened]:
    """The components in one file that holds all that are wanted."""
    advice = f"name all files instead: {NAMING}"
    try:
        opened = open_component(path, mmap=mmap)
    except BadFile as error:
        if not path.is_file():
            raise
        raise BadFile(path, f"is no folder: {error.fault}", advice) from None
    held = (opened.card.kind, *opened.card.also)
    if missing := [part.replace("_", " ") for part in wanted if part not in held]:
        opened.file.close()
        raise BadFile(path, f"is {opened.card.title} without {' and '.join(missing)}, and no folder", advice)
    return {part: open_component(opened, part) for part in wanted}


def _holds_one_model(folder: Path, variant: str | None) -> bool:
    """Whether a folder is that of one component: one model in it, and none below."""
    here = chosen(models_in(folder), variant, component=True)
    return len(here) == 1 and not any(models_in(place) for place in folders_below(folder) if place != folder)


def check_pipeline_class(folder: Path) -> None:
    """Refuse a folder whose model_index.json names another pipeline.

    Raises:
        BadFile: The file cannot be read.
        WrongModel: The message names the pipeline.
    """
    index = folder / "model_index.json"
    if os.path.lexists(index):
        name = read_json(index).get("_class_name")
        if not (isinstance(name, str) and name.startswith("ZImage")):
            fault = f"_class_name in model_index.json is {printable(name, 60)}, ZImagePipeline is wanted"
            raise WrongModel(folder, fault, "get a Z-Image folder")


def scheduler_values(folder: Path) -> dict[str, Any] | None:
    """The parsed scheduler_config.json of a model folder, with the class that its model_index.json names.

    Returns:
        None if the folder states no schedule.

    Raises:
        BadFile: A file cannot be read.
    """
    path, index = folder / "scheduler" / "scheduler_config.json", folder / "model_index.json"
    if not os.path.lexists(path):
        return None
    values = read_json(path)
    named = read_json(index).get("scheduler") if index.is_file() else None
    if isinstance(named, list) and len(named) == 2 and named[1] not in (None, EULER):
        values["_class_name"] = named[1]  # diffusers builds the class that model_index.json names
    return values


def _in_component_folder(folder: Path, component: str, mmap: bool, variant: str | None) -> Opened:
    """Open the model in the folder of one component; the config.json in it must agree with the tensors."""
    models = chosen(models_in(folder), variant, component=True)
    if variant and not any(model.variant == variant for model in models):
        found = sorted({model.variant for model in models_in(folder)})
        names = ", ".join(printable(name, 40) or "one without a variant" for name in found)
        raise BadFile(folder, f"has no files of the variant {printable(variant, 40)!r}; it has {names}")
    if len(models) > 1 and component:
        survey = _Survey(folder, mmap, variant)
        try:
            return survey.choose((component,), None)[component]
        finally:
            survey.close_others()
    file = open_model(only_model(str(folder), variant), mmap)
    try:
        return _with_config(file, component, None, _read_config(folder / "config.json", binding=True), True)
    except BaseException:
        file.close()
        raise


class _Survey:
    """All model files of a folder, open and identified, of which some are chosen and the others closed."""

    def __init__(self, folder: Path, mmap: bool, variant: str | None) -> None:
        self.folder = folder
        self.opened: list[Opened] = []
        self.refused: list[str] = []
        self._kept: set[int] = set()
        try:
            for model in loose_models(folder, variant):
                try:
                    file = open_model(model, mmap)
                except ZImageError as error:
                    self.refused.append(str(error))
                    continue
                self.opened.append(Opened(file, identify(file)))
        except BaseException:
            self.close_others()
            raise

    def candidates(self, part: str) -> list[Opened]:
        """The files that are the component, else those that hold it beside another one; sound ones first."""
        found = [each for each in self.opened if each.card.kind == part] or [
            Opened(each.file, identify(each.file, part)) for each in self.opened if part in each.card.also
        ]
        return [each for each in found if each.card.sound] or found

    def choose(self, parts: Sequence[str], tag: str | None) -> dict[str, Opened]:
        """Choose a file for each component; names only decide between quantisations of one model.

        Raises:
            BadFile: There is no file for a component, or more than one.
        """
        found: dict[str, Opened] = {}
        for part in parts:
            several = self.candidates(part)
            several = [each for each in several if tag and quant_tag(each.name) == tag.upper()] or several
            if len(several) > 1:
                names = ", ".join(printable(each.name, 60) for each in several[:6])
                fault = f"has {len(several)} files that are {WANTED[part][0]}: {names}"
                raise BadFile(self.folder, fault, _naming(part))
            for each in several:
                stated = _config_beside(each.file.path)
                found[part] = _with_config(each.file, part, each.card, stated, binding=False)
        if missing := [part for part in parts if part not in found]:
            kinds = " and ".join(WANTED[part][0] for part in missing)
            unknown = [identify_open(each.file) for each in self.opened if each.card.kind == "unknown"]
            packed = [each for each in unknown if each.card.problem.endswith(WAY_ROUND)]
            self.refused += [f"{printable(each.name, 60)} is {each.card.title}" for each in packed]
            also = f" (unreadable: {self.refused[0]})" if self.refused else download.beside(self.folder)
            kind = BadFile if self.refused else Absent
            if (self.folder / "model_index.json").is_file():
                hollow = next((self.folder / part for part in missing if (self.folder / part).is_dir()), None)
                fault = f"has no folder {' and '.join(missing)}{also}"
                if hollow is not None:
                    fault = f"its folder {hollow.name} holds no model file{download.beside(hollow)}"
                raise kind(self.folder, fault, "download the whole repository")
            raise kind(self.folder, f"has no file that is {kinds}{also}", _naming(missing[0]))
        self._kept |= {id(each.file) for each in found.values()}
        return found

    def close_others(self) -> None:
        """Close the files that were not chosen."""
        for each in self.opened:
            if id(each.file) not in self._kept:
                each.file.close()


def _naming(part: str) -> str:
    return f"{WANTED[part][1]}, or name the files: {NAMING}"


def identify_open(file: WeightFile) -> Opened:
    """Identify an open file as any model; a config.json beside it is used if it agrees with the tensors."""
    return _with_config(file, "", None, _config_beside(file.path), binding=False)


def open_pipeline(paths: Mapping[str, str | PathLike[str] | Opened], mmap: bool = True) -> dict[str, Opened]:
    """Open the files of a pipeline and check by their headers that each is sound and that they fit together.

    Args:
        paths: "transformer", "text_encoder", "vae" and, for Omni, "siglip" -> file or folder, as for
            `open_component`. Without a transformer each file is checked alone.
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
    """Identify a file together with what is stated beside it: its config.json, the packing of its weights."""
    opened = _agreed(file, component, card, stated, binding)
    if file.kind != "safetensors":
        return opened
    folder = Path(file.path)
    packing, where = stated_packing(stated, folder if folder.is_dir() else folder.parent, file.metadata)
    return replace(opened, card=name_packing(opened.card, file, packing, where)) if packing else opened


def _agreed(
    file: WeightFile,
    component: str,
    card: ModelCard | None,
    stated: Mapping[str, Any] | None,
    binding: bool,
) -> Opened:
    """Identify a file together with its config.json, if that is binding or agrees with the tensors."""
    if not component:
        card = identify(file) if card is None else card
        component, stated = card.kind, stated if card.kind in WANTED else None
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


def _config_beside(path: str) -> dict[str, Any] | None:
    """The config.json beside a file, which may belong to another model."""
    return _read_config(Path(path).parent / "config.json", binding=False)


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
