"""The columns of a table: arguments of the pipeline's call, and what a cell of each holds."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from zimage_core.assets import embedded_part
from zimage_core.errors import BadArgument, printable
from zimage_core.run.adapted import MAX_WEIGHT
from zimage_core.run.checks import real, shown
from zimage_core.run.request import Request

NOT_COLUMNS = {
    "num_images_per_prompt", "generator", "latents", "prompt_embeds", "negative_prompt_embeds", "output_type",
    "joint_attention_kwargs", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "debug",
}  # fmt: skip
"""Arguments of a call that no cell of a table can hold, or that mean nothing for one image."""
IMAGES = ("image", "mask_image")
LISTS_OF_IMAGES = ("control_image", "reference_images")
LORA = "lora"
ALIASES = {
    "negative": "negative_prompt", "steps": "num_inference_steps", "guidance": "guidance_scale",
    "max_length": "max_sequence_length", "mask": "mask_image", "control": "control_image",
    "control_scale": "controlnet_conditioning_scale", "control_start": "control_guidance_start",
    "control_end": "control_guidance_end", "reference": "reference_images",
}  # fmt: skip
"""Names of the options of `zimage generate`, where they differ from those of the call."""
WHOLE, REAL, WHOLES, REALS, TRUTH, TEXT, FILE, FILES = range(8)


def _kind(name: str, annotation: str) -> int:
    """What a cell holds, by the type of the argument."""
    if name in (*IMAGES, *LISTS_OF_IMAGES):
        return FILE if name in IMAGES else FILES
    for word, kind in (
        ("str", TEXT), ("Sequence[int]", WHOLES), ("Sequence[float]", REALS), ("int", WHOLE), ("float", REAL),
    ):  # fmt: skip
        if word in annotation:
            return kind
    return TRUTH


KINDS = {
    field.name: _kind(field.name, str(field.type))
    for field in fields(Request)
    if field.name not in NOT_COLUMNS
}
"""Column -> what its cells hold; beside them there is "lora"."""


def argument(name: str) -> str:
    """The argument that a column is for.

    Raises:
        BadArgument: There is none; the message names the nearest.
    """
    plain = name.replace("-", "_")
    found = ALIASES.get(plain, plain)
    if found in KINDS or found == LORA:
        return found
    known = (*KINDS, *ALIASES, LORA)
    near = get_close_matches(name.lower(), known, 1)
    short = {target: alias for alias, target in ALIASES.items()}
    names = ", ".join(short.get(each, each) for each in (*KINDS, LORA))
    hint = f"did you mean {near[0]}?" if near else f"known are {names}"
    raise BadArgument(
        f"column {printable(name, 60)!r} is no argument of a call; {hint} "
        "(--keep, in Python keep=, names columns that only go into the index)"
    )


def arguments(names: Collection[str], keep: Collection[str]) -> dict[str, str]:
    """Column -> argument, for columns that are not kept.

    Raises:
        BadArgument: A column is none, or two columns are one argument.
    """
    found: dict[str, str] = {}
    for name in names:
        if name in keep:
            continue
        target = argument(name)
        if target in found.values():
            other = next(key for key, value in found.items() if value == target)
            raise BadArgument(f"columns {other!r} and {name!r} are one argument; leave one out")
        found[name] = target
    return found


def read_cell(name: str, value: Any, text: bool, folder: Path) -> Any:
    """The value of a cell as the call takes it.

    Args:
        name: The argument.
        value: What the table holds.
        text: Whether the table holds text alone, as CSV does.
        folder: What paths are relative to.

    Raises:
        BadArgument: The cell holds something else; ranges are checked later.
    """
    if name == LORA:
        return _loras(value, text, folder)
    kind = KINDS[name]
    if kind == TEXT:
        if not isinstance(value, str):
            raise BadArgument(f"{name}: got {shown(value)}, wanted text")
        return value
    if kind in (FILE, FILES):
        return _files(name, value, kind == FILES, text, folder)
    if kind == TRUTH:
        return _truth(name, value, text)
    if kind in (WHOLE, REAL):
        return _number(name, value, kind == WHOLE, text)
    given = value.split(",") if text and isinstance(value, str) else value
    if kind == REALS and not isinstance(given, (list, tuple)):
        return _number(name, given, False, text)
    if not isinstance(given, (list, tuple)):
        raise BadArgument(f"{name}: got {shown(value)}, wanted a list of numbers")
    numbers = [_number(name, each, kind == WHOLES, text) for each in given]
    return numbers[0] if kind == REALS and len(numbers) == 1 and name != "sigmas" else numbers


def _number(name: str, value: Any, whole: bool, text: bool) -> Any:
    """A number; spreadsheets write 5.0 for 5 in a column that has empty cells."""
    if text and isinstance(value, str):
        digits = value.strip()
        if whole and re.fullmatch("[+-]?[0-9]{1,40}", digits):
            return int(digits)
        try:
            value = float(digits) if "_" not in digits else value
        except ValueError:
            return value  # refused with its range
    if whole and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if not whole:
        return real(name, value, -math.inf, math.inf)
    return value


def _truth(name: str, value: Any, text: bool) -> bool:
    if text and isinstance(value, str):
        value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(
            value.strip().lower(), value
        )
    if not isinstance(value, bool):
        raise BadArgument(f"{name}: got {shown(value)}, wanted true or false")
    return value


def _files(name: str, value: Any, several: bool, text: bool, folder: Path) -> Any:
    if not several:
        return _path(name, value, folder)
    given = value.split(";") if text and isinstance(value, str) else value
    given = list(given) if isinstance(given, (list, tuple)) else [given]
    if not given:
        raise BadArgument(f"{name}: the list is empty")
    return [_path(name, each, folder) for each in given]


def _path(name: str, value: Any, folder: Path) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise BadArgument(f"{name}: got {shown(value)}, wanted the path of a file")
    return str(folder / value.strip())


def _loras(value: Any, text: bool, folder: Path) -> tuple[tuple[str, float], ...]:
    """Files and weights of a cell: "FILE:WEIGHT", several of them, or pairs."""
    given = value.split(";") if text and isinstance(value, str) else value
    if isinstance(given, (str, os.PathLike)) or _is_pair(given):
        given = [given]
    if not isinstance(given, (list, tuple)):
        raise BadArgument(f"lora: got {shown(value)}, wanted FILE or FILE:WEIGHT, or a list of these")
    return tuple(_lora(each, folder) for each in given)


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and isinstance(value[0], (str, os.PathLike))
        and not isinstance(value[1], (str, os.PathLike, Mapping, list, tuple))
    )


def _lora(value: Any, folder: Path) -> tuple[str, float]:
    if _is_pair(value):
        name, weight = os.fspath(value[0]), real("lora", value[1], -MAX_WEIGHT, MAX_WEIGHT)
        return _lora_file(name, folder), weight
    name = _path("lora", value, Path())
    if (whole := _lora_file(name, folder, missing="")) or ":" not in name:
        return whole or _lora_file(name, folder), 1.0
    stem, _, number = name.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        return _lora_file(name, folder), 1.0  # refused: there is no such file
    return _lora_file(stem, folder), real("lora", weight, -MAX_WEIGHT, MAX_WEIGHT)


def _lora_file(name: str, folder: Path, missing: str | None = None) -> str:
    """The path of an adapter, or the name of one that the package has; `missing` where there is none."""
    path = folder / name
    try:
        if path.exists():
            return str(path)
    except (OSError, ValueError):
        pass
    if (own := embedded_part(name)) is not None:
        return str(own)
    if missing is None:
        raise BadArgument(f"lora {printable(name)}: there is no such file")
    return missing
