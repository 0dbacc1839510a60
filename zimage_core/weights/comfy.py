"""What ComfyUI states of a quantised layer X: a short JSON text.

    {"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}

It is the bytes of a tensor `X.comfy_quant`, or stands for all layers in the metadata of the file, under
`_quantization_metadata`. ComfyUI-INT8-Fast writes it without a format.
Source: ComfyUI's comfy/ops.py (_load_quantized_module) and comfy/utils.py (convert_old_quants).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from zimage_core.errors import printable

if TYPE_CHECKING:
    from zimage_core.weights.source import WeightFile

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
INT8 = "int8_tensorwise"
"""ComfyUI's name of int8 weights, whether they have one scale or one for each row."""
SUFFIX = ".comfy_quant"
GROUPS = (4, 16, 64, 256)
"""Blocks of the Hadamard rotation that are read: powers of four."""

_METADATA_KEY = "_quantization_metadata"
_MAX_TEXT = 4096
_USED = ("format", "convrot", "convrot_groupsize", "params")
_IDLE = ("full_precision_matrix_mult", "per_row", "orig_dtype", "orig_shape", "weight_rotated")
"""Keys that do not change what the numbers mean."""


@dataclass(frozen=True)
class Stated:
    """How a layer is stored, by its JSON text.

    Args:
        format: "int8_tensorwise" or one of FLOAT8; "" if it cannot be read.
        rotation: Block of the Hadamard rotation along K; 0 for none.
        style: Name of a scheme that is not supported, or "".
        fault: What is wrong with the text, or "".
    """

    format: str = ""
    rotation: int = 0
    style: str = ""
    fault: str = ""


def group_for(width: int) -> int:
    """The largest block that divides rows of `width` numbers; 0 if none does."""
    return next((group for group in reversed(GROUPS) if width % group == 0), 0)


def layer_text(rotation: int) -> bytes:
    """The content of `X.comfy_quant` for int8 weights, byte for byte as ComfyUI writes it.

    Args:
        rotation: Block of the rotation; 0 for none.
    """
    rotated = {"convrot": True, "convrot_groupsize": rotation} if rotation else {}
    return json.dumps({"format": INT8, **rotated}).encode()


def stated(file: WeightFile, stem: str) -> Stated | None:
    """What a file states of the layer `stem`; None if it states nothing."""
    info = file.tensors.get(stem + SUFFIX)
    if info is None:
        text = file.metadata.get(_METADATA_KEY)
        said = _of_layer(_layers(text), stem) if isinstance(text, str) else None
        return None if said is None else _read(said)
    if info.nbytes > _MAX_TEXT:
        return Stated(fault=f"has a comfy_quant of {info.nbytes} bytes, wanted a short JSON text")
    try:
        return _read(json.loads(bytes(file.source_of(info.name).read_at(info.offset, info.nbytes))))
    except (ValueError, RecursionError):
        return Stated(fault="has a comfy_quant that is not JSON")


@lru_cache(maxsize=1)
def _layers(text: str) -> Mapping[str, Any]:
    """Layer -> what the metadata of a file state of it; every tensor asks, so the last answer is kept."""
    try:
        found = json.loads(text)["layers"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _of_layer(layers: Mapping[str, Any], stem: str) -> Any:
    """What is stated of a layer; in some files the names there lack the prefix of the model."""
    while layers and stem:
        if stem in layers:
            return layers[stem]
        stem = stem.partition(".")[2]
    return None


def _read(data: object) -> Stated:
    """The meaning of one JSON text."""
    if not isinstance(data, dict):
        return Stated(style=repr("None"))
    style = data.get("format")
    if style in FLOAT8 and not data.get("convrot"):
        return Stated(style)
    if style is None and isinstance(data.get("convrot"), bool):  # ComfyUI-INT8-Fast
        style = INT8
    if style != INT8:
        return Stated(style=repr("convrot" if data.get("convrot") else printable(style, 60)))
    params = data.get("params")
    data = {**(params if isinstance(params, dict) else {}), **data}
    for key, value in data.items():
        if key not in (*_USED, *_IDLE) and value not in (None, False):
            return Stated(
                fault=f"is stated to have {printable(key, 60)!r}, which is not known of int8 weights"
            )
    convrot, group = data.get("convrot", False), data.get("convrot_groupsize", GROUPS[-1])
    if not isinstance(convrot, bool):
        return Stated(fault=f"is stated to have convrot {printable(convrot, 40)}, wanted true or false")
    if not convrot:
        return Stated(INT8)
    if type(group) is not int or group not in GROUPS:
        wanted = ", ".join(map(str, GROUPS[:-1]))
        return Stated(
            fault=f"is rotated by blocks of {printable(group, 40)}, wanted {wanted} or {GROUPS[-1]}"
        )
    return Stated(INT8, group)
