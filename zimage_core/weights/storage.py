"""Scales beside weights, and schemes of quantisation that are refused by name.

Float8 weights in safetensors are read, plain or with a scale beside them (`X.scale_weight` in ComfyUI's older
files, `X.weight_scale` with `X.comfy_quant` in its newer ones and in those of compressed-tensors). In a GGUF,
`X.scale` multiplies `X.weight` of any format, as llama.cpp's converter writes for NVFP4. Other schemes need
arithmetic of their own and are refused; the sentence says what to get instead.
Source: ComfyUI's comfy/quant_ops.py and comfy/ops.py; llama.cpp's build_lora_mm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from zimage_core.errors import BadWeights, printable
from zimage_core.weights.packings import WHOLE_NUMBERS, style_of

if TYPE_CHECKING:
    from zimage_core.quant.tensor import QuantTensor
    from zimage_core.weights.source import TensorInfo, WeightFile

FP8 = ("F8_E4M3", "F8_E5M2")
PLAIN = ("F32", "F16", "BF16")
SCALED = (*FP8, *PLAIN)
"""Types of weights that may have a scale; some files have a scale beside every layer, whatever its type."""
COMFY_FORMATS = ("float8_e4m3fn", "float8_e5m2")

SCALE_SUFFIXES = (".scale_weight", ".weight_scale", ".scale")
"""Endings of scale tensors: the numbers of `X.weight` are multiplied by the tensor `X` + ending."""

BINDING_SUFFIXES = (*SCALE_SUFFIXES, ".comfy_quant")
"""Endings of the tensors that decide how `X.weight` is read."""

COMPANION_SUFFIXES = (*BINDING_SUFFIXES, ".scale_input", ".input_scale")
"""Endings of all tensors that describe a weight and are not weights themselves; input scales are not used."""

GLOBAL_MARKS = ("scaled_fp8",)

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
    if style := style_of(tensors) or _comfy_style(file, tensors):
        return f"its weights are quantised by {style}, which is not supported; {WAY_ROUND}"
    for name, info in tensors.items():
        if info.format.name in WHOLE_NUMBERS and name.endswith(".weight"):
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
    found = file.tensors[scale].shape
    if file.kind == "gguf" and math.prod(found) != 1:
        return f"has a scale of shape {found}, wanted one number"
    if file.kind != "gguf" and scale.endswith(".scale"):
        return "has numbers and a scale of SDNQ or another scheme beside it, which is not supported"
    if file.kind != "gguf" and fmt not in SCALED:
        return f"is {fmt} with a scale beside it, which only {', '.join(SCALED)} can have"
    if math.prod(found) != 1 and not (shape and math.prod(found) == shape[0] == found[0]):
        return f"has a scale of shape {found}, wanted one number or one a row"
    if file.tensors[scale].format.name not in PLAIN:
        return f"has a scale stored as {file.tensors[scale].format.name}, wanted {' or '.join(PLAIN)}"
    return ""


def _comfy_style(file: WeightFile, tensors: Collection[str]) -> str:
    """The scheme of a layer in ComfyUI's `_quantization_metadata` that is not supported; "" for none.

    Newer files have this one text in place of a comfy_quant beside each weight.
    """
    text = file.metadata.get("_quantization_metadata")
    try:
        layers = json.loads(text)["layers"] if isinstance(text, str) else {}
    except (ValueError, RecursionError, KeyError, TypeError):
        return ""
    for layer, stated in layers.items() if isinstance(layers, dict) else ():
        # the layers' names lack the prefix of the model in some files
        if any(name.endswith(f"{layer}.weight") for name in tensors) and (style := _foreign(stated)):
            return f"ComfyUI as {style}"
    return ""


def _foreign(stated: object) -> str:
    """The name of a scheme of ComfyUI that is not supported; "" if it is."""
    style = stated.get("format") if isinstance(stated, dict) else None
    if isinstance(stated, dict) and stated.get("convrot"):
        style = "convrot"
    return "" if style in COMFY_FORMATS else repr(printable(style, 60))


def _comfy_fault(file: WeightFile, name: str) -> str:
    """Why a layer's comfy_quant, a short JSON text, is not supported; "" if it is."""
    info = file.tensors[name]
    if info.nbytes > 4096:
        return f"has a comfy_quant of {info.nbytes} bytes, wanted a short JSON text"
    try:
        stated = json.loads(bytes(file.source_of(name).read_at(info.offset, info.nbytes)))
    except (ValueError, RecursionError):
        return "has a comfy_quant that is not JSON"
    style = _foreign(stated)
    return f"is quantised by ComfyUI as {style}, which is not supported" if style else ""
