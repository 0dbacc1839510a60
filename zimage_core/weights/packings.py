"""Recognises weights that other programs have packed, so that the refusal can name the program.

Three things tell it: names of tensors, types of weights, and what is stated beside them, in config.json, in
a file of its own or in the metadata of a safetensors file. What is stated alone refuses nothing, because it
may be left over from other weights; it names what the tensors show.
Source: the tensor names and configs of published files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zimage_core.errors import ZImageError, printable
from zimage_core.files.untrusted import read_json

STYLES = (
    (".quant_state.bitsandbytes__", "bitsandbytes 4-bit"),
    (".absmax\n", "bitsandbytes 4-bit"),
    (".SCB\n", "bitsandbytes 8-bit"),
    (".wscales\n", "Nunchaku (SVDQuant)"),
    (".smooth_factor\n", "Nunchaku (SVDQuant)"),
    (".weight_scale_2\n", "nvfp4"),
    (".weight_scale_inv\n", "fp8 with a scale per 128 x 128 block"),
    ("_weight_qdata\n", "torchao"),
    (":_data\n", "torchao"),
    (":qdata\n", "torchao"),
    (".weight.tensor_impl.", "torchao"),
    (".weight._data", "quanto"),
    (".weight._scale\n", "quanto"),
    (".W_q\n", "HQQ"),
    (".encoded_exponent\n", "DFloat11"),
    (".sign_mantissa\n", "DFloat11"),
    (".svd_up\n", "SDNQ"),
    ("_quantizer._amax\n", "NVIDIA modelopt"),
    ("_quantizer._scale\n", "NVIDIA modelopt"),
    (".weight_packed\n", "compressed-tensors (packed integers)"),
    (".weight_zero_point\n", "compressed-tensors (integers with zero points)"),
    (".trellis\n", "EXL3"),
    (".q_weight\n", "EXL2"),
    (".codebooks\n", "AQLM"),
    (".Qidxs\n", "QuIP#"),
    (".g_idx\n", "GPTQ"),
    (".qzeros\n", "GPTQ or AWQ"),
    (".qweight\n", "GPTQ, AWQ or Nunchaku"),
    (".biases\n", "MLX"),
    (".zero_point\n", "integers with zero points (SDNQ or another scheme)"),
)
"""(Part of a tensor name, scheme whose files have it), the more specific first; a newline ends a name."""

WHOLE_NUMBERS = {
    "U8": "packed bytes (nvfp4 or another scheme)",
    "I16": "integers",
    "I32": "packed 32-bit integers",
    "I64": "integers",
    "U16": "integers",
    "U32": "packed 32-bit integers (MLX or another scheme)",
    "U64": "integers",
    "BOOL": "truth values",
}
"""Type of a weight -> the unsupported scheme that stores weights in that type."""

_METHOD_KEYS = ("quant_method", "quant_algo", "quantization_method", "method", "quant_type", "name")
_ABOUT = re.compile(r"quant|compress|dfloat|hqq|gptq|awq|bnb", re.IGNORECASE)
_MAX_FILES = 4


def style_of(names: Iterable[str]) -> str:
    """The scheme that the names of a part's tensors show; "" for none."""
    joined = "\n" + "\n".join(names) + "\n"
    return next((style for mark, style in STYLES if mark in joined), "")


def stated_packing(
    config: Mapping[str, Any] | None, folder: Path, metadata: Mapping[str, Any]
) -> tuple[str, str]:
    """The method of quantisation that is stated beside weights, and where; two empty texts for none.

    Args:
        config: Parsed config.json of the weights.
        folder: The folder of the weights, for files such as quantization_config.json.
        metadata: Metadata of the safetensors file.
    """
    if method := _stated(config or {}):
        return method, "config.json"
    try:
        places = sorted(p for p in folder.glob("*quant*.json") if not p.name.endswith(".index.json"))
    except OSError:
        places = []
    for place in places[:_MAX_FILES]:
        try:
            return _method(read_json(place)) or place.stem, printable(place.name, 60)
        except ZImageError:
            continue
    if any(isinstance(value, str) and '"_type"' in value[:200] for value in metadata.values()):
        return "torchao", "its metadata"
    return _stated(metadata), "its metadata"


def _stated(data: Mapping[str, Any]) -> str:
    """The method that a key about quantisation names, or the key itself."""
    for key, value in data.items():
        if not _ABOUT.search(key) or key.startswith("zimage."):
            continue
        if isinstance(value, str) and value.lstrip().startswith("{"):  # metadata holds JSON as text
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                continue
        if isinstance(value, Mapping) and value:
            return _method(value) or printable(key, 60)
        if isinstance(value, str) and value:
            return printable(value, 60)
    return ""


def _method(data: Mapping[str, Any]) -> str:
    """The name of the method in a table of settings, or in a table inside it."""
    if any(data.get(key) is True for key in ("load_in_4bit", "load_in_8bit")):
        return "bitsandbytes"
    for key in _METHOD_KEYS:
        if isinstance(data.get(key), str):
            return printable(data[key], 60)
    inner = (value for value in data.values() if isinstance(value, Mapping))
    return next(filter(None, (_method(value) for value in inner)), "")
