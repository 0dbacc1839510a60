"""Where a component lies when a folder is named: diffusers' layout, or a folder of one component."""

from __future__ import annotations

import json
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from zimage_core.errors import BadFile

MAX_CONFIG_BYTES = 1 << 20


def locate(path: str | PathLike[str], component: str) -> tuple[str, dict[str, Any] | None, bool]:
    """What to open for a component, the config.json beside it, and whether that config is binding.

    Args:
        path: A weight file, a folder of one component, or a folder with `component` as a subfolder
            (diffusers' layout).
        component: "transformer", "text_encoder" or "vae".

    Returns:
        Path for open_weights; the parsed config.json or None; True where a folder was named, so that
        its config.json must agree with the tensors. Beside a single file it may belong to another one.

    Raises:
        BadFile: The config.json of a named folder cannot be read.
    """
    place = Path(fspath(path))
    try:
        if not place.is_dir():
            return fspath(path), _read_config(place.parent / "config.json", binding=False), False
        if (place / component).is_dir():
            place = place / component
        elif (place / "model_index.json").is_file():
            raise BadFile(
                fspath(path), f"a model folder without the part {component!r}", f"download {component}/ to it"
            )
    except (OSError, ValueError):
        return fspath(path), None, False  # open_weights says what is wrong with the path
    return str(place), _read_config(place / "config.json", binding=True), True


def _read_config(path: Path, binding: bool) -> dict[str, Any] | None:
    """The parsed file; None where there is none, or where it cannot be read and is not binding."""
    try:
        if not path.is_file():
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
