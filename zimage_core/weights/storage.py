"""How safetensors files store quantised weights: what is read, and what is refused by name.

Read: float8 weights, plain or with a scale beside them (`X.scale_weight` of ComfyUI's older files,
`X.weight_scale` with `X.comfy_quant` of its newer ones and of compressed-tensors). Everything else that
appears in the wild keeps codes in ways that need its own arithmetic, and is refused with the way round.
Source: ComfyUI's comfy/quant_ops.py and comfy/ops.py; the files' own tensor names.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from zimage_core.errors import BadWeights, Unsupported, printable

if TYPE_CHECKING:
    from zimage_core.quant_tensor import QuantTensor
    from zimage_core.weights.source import TensorInfo, WeightFile

FP8 = ("F8_E4M3", "F8_E5M2")

SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
"""Beside `X.weight`: what its numbers are to be multiplied by."""

COMPANION_SUFFIXES = (*SCALE_SUFFIXES, ".scale_input", ".input_scale", ".comfy_quant")
"""Tensors that belong to the storage of a weight and are no weights; input scales are not needed."""

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
"""Piece of a tensor name -> quantisation that this library does not read."""

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
"""Type of a weight matrix that needs a scheme's own arithmetic -> the scheme."""

WAY_ROUND = "get the same model as GGUF, or as bf16 or fp8 safetensors"


def storage_problem(tensors: Mapping[str, TensorInfo]) -> str:
    """Why the weights cannot be read, naming the style and the way round; "" where they can."""
    joined = "\n" + "\n".join(tensors) + "\n"
    for mark, style in FOREIGN_STYLES:
        if mark in joined:
            return f"its weights are quantised by {style}, which is not supported; {WAY_ROUND}"
    for name, info in tensors.items():
        if info.format.name in WHOLE_NUMBERS and name.endswith(".weight") and len(info.shape) == 2:
            style = WHOLE_NUMBERS[info.format.name]
            return f"its weights are quantised to {style}, which is not supported; {WAY_ROUND}"
    return ""


def storage_notes(tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """What is worth saying about the way the weights are stored."""
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
    """The tensor `name`, with the scale that lies beside it in the file.

    Raises:
        Unsupported: The scale has another shape than one number, or one a row; or the weight's
            comfy_quant asks for another arithmetic than a product with it.
        BadWeights: The scale is NaN or infinite, or the comfy_quant is not what it should be.
    """
    from dataclasses import replace

    tensor = file.tensor(name)
    stem = name.removesuffix(".weight")
    beside = [stem + suffix for suffix in SCALE_SUFFIXES if stem + suffix in file.tensors]
    if stem == name or not (beside or stem + ".comfy_quant" in file.tensors):
        return tensor
    where = f"{printable(file.path)}: {printable(name, 120)}"
    if stem + ".comfy_quant" in file.tensors:
        _check_comfy_quant(file, stem + ".comfy_quant", where)
    if not beside:
        return tensor
    if tensor.format.name not in FP8:
        raise Unsupported(
            f"{where} is {tensor.format.name} with a scale beside it, only fp8 has one; {WAY_ROUND}"
        )
    scale = _scale(file, beside[0], tensor.shape[0], where)
    return replace(tensor, scale=scale)


def _scale(file: WeightFile, name: str, rows: int, where: str) -> Any:
    """float32, scalar or [rows]."""
    import torch

    shape = file.tensors[name].shape
    count = 1
    for size in shape:
        count *= size
    if count not in (1, rows) or (count == rows and count != 1 and shape[0] != rows):
        raise Unsupported(
            f"{where} has a scale of shape {shape}, wanted one number or one a row; {WAY_ROUND}"
        )
    scale = file.tensor(name).dequantize(torch.float32).reshape(() if count == 1 else (rows,))
    if not bool(torch.isfinite(scale).all()):
        raise BadWeights(f"{where} has a scale that is NaN or infinite; download the file again")
    return scale


COMFY_FORMATS = ("float8_e4m3fn", "float8_e5m2")


def _check_comfy_quant(file: WeightFile, name: str, where: str) -> None:
    info = file.tensors[name]
    if info.nbytes > 4096:
        raise BadWeights(f"{where} has a comfy_quant of {info.nbytes} bytes, wanted a short JSON text")
    try:
        stated = json.loads(bytes(file.tensor(name).packed.flatten().tolist()))
    except (ValueError, RecursionError) as error:
        raise BadWeights(f"{where} has a comfy_quant that is not JSON; download the file again") from error
    style = stated.get("format") if isinstance(stated, dict) else None
    if style not in COMFY_FORMATS or stated.get("convrot"):
        shown = printable("convrot" if isinstance(stated, dict) and stated.get("convrot") else style, 60)
        raise Unsupported(
            f"{where} is quantised by ComfyUI as {shown!r}, which is not supported; {WAY_ROUND}"
        )
