"""Quantised weights in safetensors files: schemes that are read, and schemes that are refused by name.

Float8 weights are read, plain or with a scale beside them (`X.scale_weight` in ComfyUI's older files,
`X.weight_scale` with `X.comfy_quant` in its newer ones and in those of compressed-tensors). Other schemes
need arithmetic of their own and are refused; the sentence says what to get instead.
Source: ComfyUI's comfy/quant_ops.py and comfy/ops.py; the tensor names of published files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from zimage_core.errors import BadWeights, printable

if TYPE_CHECKING:
    from zimage_core.quant.tensor import QuantTensor
    from zimage_core.weights.source import TensorInfo, WeightFile

FP8 = ("F8_E4M3", "F8_E5M2")
PLAIN = ("F32", "F16", "BF16")
SCALED = (*FP8, *PLAIN)
"""Types of weights that may have a scale; some files have a scale beside every layer, whatever its type."""
COMFY_FORMATS = ("float8_e4m3fn", "float8_e5m2")

SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
"""Endings of scale tensors: the numbers of `X.weight` are multiplied by the tensor `X` + ending."""

BINDING_SUFFIXES = (*SCALE_SUFFIXES, ".comfy_quant")
"""Endings of the tensors that decide how `X.weight` is read."""

COMPANION_SUFFIXES = (*BINDING_SUFFIXES, ".scale_input", ".input_scale")
"""Endings of all tensors that describe a weight and are not weights themselves; input scales are not used."""

GLOBAL_MARKS = ("scaled_fp8",)

FOREIGN_STYLES = (
    (".quant_state.bitsandbytes__", "bitsandbytes 4-bit"),
    (".absmax\n", "bitsandbytes 4-bit"),
    (".SCB\n", "bitsandbytes 8-bit"),
    (".wscales\n", "Nunchaku (SVDQuant)"),
    (".smooth_factor\n", "Nunchaku (SVDQuant)"),
    (".weight_scale_2\n", "nvfp4"),
    (".weight_scale_inv\n", "fp8 with a scale per 128 x 128 block"),
    (".qzeros\n", "GPTQ or AWQ"),
    (".qweight\n", "GPTQ, AWQ or Nunchaku"),
    (".biases\n", "MLX"),
)
"""(Part of a tensor name, unsupported scheme whose files have it); a newline marks the end of a name."""

WHOLE_NUMBERS = {
    "I8": "int8 (int8_tensorwise, convrot or another scheme)",
    "U8": "packed bytes (nvfp4 or another scheme)",
    "I16": "integers",
    "I32": "packed 32-bit integers",
    "I64": "integers",
    "U16": "integers",
    "U32": "packed 32-bit integers (MLX or another scheme)",
    "U64": "integers",
    "BOOL": "truth values",
}
"""Type of a weight matrix -> the unsupported scheme that stores weights in that type."""

WAY_ROUND = "get the same model as GGUF, or as bf16 or fp8 safetensors"


def own_tensors(file: WeightFile, prefix: str, elsewhere: tuple[str, ...] = ()) -> dict[str, TensorInfo]:
    """The tensors of one part of a file: those under its prefix, without those of parts nested in it.

    Args:
        file: An open file.
        prefix: Prefix of the part's tensor names.
        elsewhere: Prefixes of the other parts.
    """
    inner = tuple(other for other in elsewhere if other.startswith(prefix) and other != prefix)
    return {
        name: info
        for name, info in file.tensors.items()
        if name.startswith(prefix) and not name.startswith(inner)
    }


def storage_problem(file: WeightFile, prefix: str = "", elsewhere: tuple[str, ...] = ()) -> str:
    """Why the weights of one part of a file cannot be read and what to get instead; "" if they can be read.

    Arguments are those of `own_tensors`.
    """
    tensors = own_tensors(file, prefix, elsewhere)
    joined = "\n" + "\n".join(tensors) + "\n"
    for mark, style in FOREIGN_STYLES:
        if mark in joined:
            return f"its weights are quantised by {style}, which is not supported; {WAY_ROUND}"
    for name, info in tensors.items():
        if info.format.name in WHOLE_NUMBERS and name.endswith(".weight") and len(info.shape) == 2:
            style = WHOLE_NUMBERS[info.format.name]
            return f"its weights are quantised to {style}, which is not supported; {WAY_ROUND}"
    for name in tensors:
        stem = name.removesuffix(next((s for s in BINDING_SUFFIXES if name.endswith(s)), "\0"))
        if stem != name and stem + ".weight" in tensors and (fault := _fault(file, stem)):
            return f"its tensor {printable(stem, 120)}.weight {fault}; {WAY_ROUND}"
    return ""


def storage_notes(tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Remarks for the user on how the weights of a part are stored."""
    if not any(info.format.name in FP8 for info in tensors.values()):
        return ()
    scaled = any(name.endswith(SCALE_SUFFIXES) for name in tensors)
    return ("fp8 weights with scales" if scaled else "fp8 weights without scales",)


def is_companion(name: str, names: Collection[str]) -> bool:
    """True for a tensor that describes how another one is stored."""
    if name in GLOBAL_MARKS:
        return True
    return any(name.endswith(s) and name.removesuffix(s) + ".weight" in names for s in COMPANION_SUFFIXES)


def scaled_tensor(file: WeightFile, name: str) -> QuantTensor:
    """The tensor `name` with its scale, if it has one; the file must have no `storage_problem`.

    Raises:
        BadWeights: The scale holds NaN or infinity.
    """
    from dataclasses import replace

    import torch

    tensor = file.tensor(name)
    stem = name.removesuffix(".weight")
    beside = None if stem == name else _scale_name(file, stem)
    if beside is None:
        return tensor
    scale = file.tensor(beside).dequantize(torch.float32).flatten()
    if not bool(torch.isfinite(scale).all()):
        where = f"{printable(file.path)}: {printable(name, 120)}"
        raise BadWeights(f"{where} has a scale that is NaN or infinite; download the file again")
    return replace(tensor, scale=scale.reshape(()) if len(scale) == 1 else scale)


def _scale_name(file: WeightFile, stem: str) -> str | None:
    return next((stem + suffix for suffix in SCALE_SUFFIXES if stem + suffix in file.tensors), None)


def _fault(file: WeightFile, stem: str) -> str:
    """Why `{stem}.weight` cannot be read with its companion tensors; "" if it can."""
    if stem + ".comfy_quant" in file.tensors and (fault := _comfy_fault(file, stem + ".comfy_quant")):
        return fault
    scale = _scale_name(file, stem)
    if scale is None:
        return ""
    fmt, shape = file.tensors[stem + ".weight"].format.name, file.tensors[stem + ".weight"].shape
    if fmt not in SCALED:
        return f"is {fmt} with a scale beside it, which only {', '.join(SCALED)} can have"
    found = file.tensors[scale].shape
    if math.prod(found) != 1 and not (shape and math.prod(found) == shape[0] == found[0]):
        return f"has a scale of shape {found}, wanted one number or one a row"
    if file.tensors[scale].format.name not in PLAIN:
        return f"has a scale stored as {file.tensors[scale].format.name}, wanted {' or '.join(PLAIN)}"
    return ""


def _comfy_fault(file: WeightFile, name: str) -> str:
    """Why a layer's comfy_quant, a short JSON text, is not supported; "" if it is."""
    info = file.tensors[name]
    if info.nbytes > 4096:
        return f"has a comfy_quant of {info.nbytes} bytes, wanted a short JSON text"
    try:
        stated = json.loads(bytes(file.source_of(name).read_at(info.offset, info.nbytes)))
    except (ValueError, RecursionError):
        return "has a comfy_quant that is not JSON"
    style = stated.get("format") if isinstance(stated, dict) else None
    if style not in COMFY_FORMATS or stated.get("convrot"):
        shown = printable("convrot" if isinstance(stated, dict) and stated.get("convrot") else style, 60)
        return f"is quantised by ComfyUI as {shown!r}, which is not supported"
    return ""
