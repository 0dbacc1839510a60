"""What a transformer's file states beside its tensors and sizes: the image size and the schedule.

A GGUF holds them in keys `zimage.NAME`, a safetensors file in the same keys of its metadata, as text, and a
diffusers folder in the object `_zimage` of config.json. Diffusers neither warns of a key that begins with an
underscore nor loses it when it writes the config again. A config.json comes before the keys of its weights,
and a scheduler_config.json before both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zimage_core.errors import BadWeights, printable
from zimage_core.files.untrusted import read_json
from zimage_core.scheduler_config import DYNAMIC
from zimage_core.weights import infer
from zimage_core.weights.opened import Opened

PREFIX = "zimage."
FIELD = "_zimage"
"""Key of a config.json; the names inside it have no prefix."""
SIZE, SHIFT, SCHEDULER = "sample_size", "shift", "scheduler"
NAMES = (SIZE, SHIFT, SCHEDULER)
MAX_SIZE = 8192
_USUAL = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}


def facts(opened: Opened, folder: Path | None = None, beside: bool = True) -> dict[str, Any]:
    """What is stated of a transformer; what nothing states is left out.

    Args:
        opened: The transformer's file.
        folder: The folder that was named, if there is one: its scheduler counts.
        beside: Whether a scheduler_config.json is read at all.

    Returns:
        "sample_size": default height and width in pixels, int. "shift": of the noise levels, float.
        "scheduler": further fields of a scheduler_config.json, for a schedule that is not the usual one.

    Raises:
        BadFile: The scheduler_config.json beside the file cannot be read.
        BadWeights: A value is of the wrong kind or out of range.
    """
    path, metadata = printable(opened.file.path), opened.file.metadata
    config = (opened.stated or {}).get(FIELD) or {}
    if not isinstance(config, Mapping):
        raise BadWeights(f"{path}: {FIELD} of its config.json is {printable(config, 60)!r}, wanted an object")
    keys = {PREFIX + name: metadata[PREFIX + name] for name in NAMES if PREFIX + name in metadata}
    own = _checked(keys | {PREFIX + name: config[name] for name in NAMES if name in config}, path)
    if not beside:
        return own
    places = [*(() if folder is None else (folder,)), Path(opened.file.path).parent]
    places += [place.parent for place in places if (place.parent / "model_index.json").is_file()]
    schedule = next(filter(None, map(_schedule, places)), {})
    if schedule:  # of the two schedules only one counts, whole
        own = {name: value for name, value in own.items() if name == SIZE} | schedule
    return own


def _schedule(folder: Path) -> dict[str, Any]:
    """The schedule that `scheduler/scheduler_config.json` in a folder states, as facts; empty without it."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return {}
    fields = {name: value for name, value in read_json(path).items() if _USUAL.get(name) != value}
    shift = fields.pop(SHIFT, None)
    ignored = () if fields.get("use_dynamic_shifting") else DYNAMIC
    rest = {
        name: value
        for name, value in fields.items()
        if value and name not in ignored and (name in _USUAL or not name.startswith("_"))
    }
    found = {PREFIX + SHIFT: shift, PREFIX + SCHEDULER: rest or None}
    return _checked({name: value for name, value in found.items() if value is not None}, printable(path))


def _checked(stated: Mapping[str, Any], path: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = {
            SIZE: infer.read_int(stated, PREFIX + SIZE, MAX_SIZE),
            SHIFT: infer.read_float(stated, PREFIX + SHIFT, 1e-3, 1e3),
            SCHEDULER: _fields(stated.get(PREFIX + SCHEDULER)),
        }
        if (found[SIZE] or 0) % 16:
            raise BadWeights(f"metadata {PREFIX + SIZE!r} is {found[SIZE]}, wanted a multiple of 16")
    except BadWeights as error:
        raise BadWeights(f"{path}: {error}") from None
    return {name: value for name, value in found.items() if value is not None}


def _fields(value: Any) -> dict[str, Any] | None:
    """Fields of a scheduler_config.json, which keys hold as JSON text."""
    if isinstance(value, str) and len(value) <= 1 << 16:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = "no JSON"
    if value is None or isinstance(value, Mapping):
        return None if value is None else dict(value)
    raise BadWeights(f"metadata {PREFIX + SCHEDULER!r} does not hold the fields of a scheduler_config.json")
