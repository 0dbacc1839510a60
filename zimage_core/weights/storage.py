"""Scales beside weights, and schemes of quantisation that are refused by name.

Float8 weights in safetensors are read, plain or with a scale beside them (`X.scale_weight` in ComfyUI's
older files, `X.weight_scale` with `X.comfy_quant` in its newer ones and in those of compressed-tensors). So
are int8 weights with a scale, which ComfyUI may have rotated (ConvRot). In a GGUF, `X.scale` multiplies
`X.weight` of any format, as llama.cpp's converter writes for NVFP4. Other schemes need arithmetic of their
own and are refused; the sentence says what to get instead.
Source: ComfyUI's comfy/quant_ops.py and comfy/ops.py; llama.cpp's build_lora_mm.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from zimage_core.errors import BadWeights, printable
from zimage_core.weights import comfy
from zimage_core.weights.packings import WHOLE_NUMBERS, style_of

if TYPE_CHECKING:
    from zimage_core.quant.tensor import QuantTensor
    from zimage_core.weights.source import TensorInfo, WeightFile

FP8 = ("F8_E4M3", "F8_E5M2")
PLAIN = ("F32", "F16", "BF16")
INT8 = "I8"
PACKED = (*FP8, INT8)
"""Quantised types of safetensors that are read."""
SCALED = (*PACKED, *PLAIN)
"""Types of weights that may have a scale; some files have a scale beside every layer, whatever its type."""

SCALE_SUFFIXES = (".scale_weight", ".weight_scale", ".scale")
"""Endings of scale tensors: the numbers of `X.weight` are multiplied by the tensor `X` + ending."""

COMPANION_SUFFIXES = (*SCALE_SUFFIXES, comfy.SUFFIX, ".scale_input", ".input_scale")
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
    if style := style_of(tensors):
        return f"its weights are quantised by {style}, which is not supported; {WAY_ROUND}"
    described: dict[bool, str] = {}  # whether ComfyUI states something of it -> an int8 weight
    for name, info in tensors.items():
        if not name.endswith(".weight"):
            continue
        stem = name.removesuffix(".weight")
        stated = comfy.stated(file, stem) or comfy.Stated()
        if stated.style:
            return (
                f"its weights are quantised by ComfyUI as {stated.style}, which is not supported; {WAY_ROUND}"
            )
        if style := WHOLE_NUMBERS.get(info.format.name, ""):
            return f"its weights are quantised to {style}, which is not supported; {WAY_ROUND}"
        if fault := stated.fault or _int8_fault(info, stated) or _scale_fault(file, stem):
            return f"its tensor {printable(name, 120)} {fault}; {WAY_ROUND}"
        if info.format.name == INT8:
            described.setdefault(bool(stated.format), name)
    if len(described) == 2:  # nobody can tell whether it is rotated
        without, other = printable(described[False], 120), printable(described[True], 120)
        return f"its tensor {without} is int8 without a comfy_quant, which {other} has; {WAY_ROUND}"
    return ""


def storage_notes(file: WeightFile, tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Remarks for the user on how the weights of a part are stored."""
    notes = []
    if any(info.format.name in FP8 for info in tensors.values()):
        scaled = any(name.endswith(SCALE_SUFFIXES) for name in tensors)
        notes.append("fp8 weights with scales" if scaled else "fp8 weights without scales")
    groups: dict[int, list[TensorInfo]] = {}
    for name, info in tensors.items():
        if info.format.name == INT8 and name.endswith(".weight"):
            stated = comfy.stated(file, name.removesuffix(".weight"))
            groups.setdefault(0 if stated is None else stated.rotation, []).append(info)
    for group, found in groups.items():
        kind = f"rotated by blocks of {group}" if group else "not rotated"
        held = sum(_bytes_with_scale(file, info) for info in found)
        bits = 8 * held / max(1, sum(info.nbytes for info in found))
        noun = "matrix" if len(found) == 1 else "matrices"
        notes.append(f"INT8, {kind}: {len(found)} {noun}, {bits:.2f} bits a weight")
    return tuple(notes)


def _bytes_with_scale(file: WeightFile, info: TensorInfo) -> int:
    """Bytes of a weight and of the scale beside it."""
    beside = _scale_name(file, info.name.removesuffix(".weight"))
    return info.nbytes + (0 if beside is None else file.tensors[beside].nbytes)


def is_companion(name: str, names: Collection[str]) -> bool:
    """True for a tensor that describes how another one is stored."""
    if name in GLOBAL_MARKS:
        return True
    return any(name.endswith(s) and name.removesuffix(s) + ".weight" in names for s in COMPANION_SUFFIXES)


def scaled_tensor(file: WeightFile, name: str) -> QuantTensor:
    """The tensor `name` with its scale and rotation; the file must have no `storage_problem`.

    Int8 weights have one scale for each row, also where the file has one for all.

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
    if tensor.format.name == INT8 and tensor.shape:
        stated = comfy.stated(file, stem)
        rows = scale.expand(tensor.shape[0]).contiguous()
        return replace(tensor, scale=rows, rotation=0 if stated is None else stated.rotation)
    return replace(tensor, scale=scale.reshape(()) if len(scale) == 1 else scale)


def _scale_name(file: WeightFile, stem: str) -> str | None:
    return next((stem + suffix for suffix in SCALE_SUFFIXES if stem + suffix in file.tensors), None)


def _int8_fault(info: TensorInfo, stated: comfy.Stated) -> str:
    """Why what ComfyUI states of a weight does not fit it; "" if it does."""
    is_int8 = info.format.name == INT8
    if stated.format == comfy.INT8 and not is_int8:
        return f"is {info.format.name}, and ComfyUI states that it is {comfy.INT8}"
    if stated.format in comfy.FLOAT8 and is_int8:
        return f"is I8, and ComfyUI states that it is {stated.format}"
    group = stated.rotation
    if group and (len(info.shape) != 2 or info.shape[1] % group):
        return f"is rotated by blocks of {group}, which do not divide rows of its shape {info.shape}"
    return ""


def _scale_fault(file: WeightFile, stem: str) -> str:
    """Why `{stem}.weight` cannot be multiplied by the scale beside it; "" if it can."""
    fmt, shape = file.tensors[stem + ".weight"].format.name, file.tensors[stem + ".weight"].shape
    scale = _scale_name(file, stem)
    if scale is None:
        return f"is int8 without a scale, {printable(stem, 120)}.weight_scale" if fmt == INT8 else ""
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
