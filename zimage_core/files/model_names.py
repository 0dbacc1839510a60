"""Reads names of model files: stem, variant, number of a shard, and whether the file is an index of shards.

Names follow diffusers, transformers and llama.cpp: model.safetensors, model.fp16.safetensors,
model.fp16-00001-of-00002.safetensors, model-00001-of-00002.fp16.safetensors,
model.safetensors.index.fp16.json, z-00001-of-00002.gguf. A name chooses between files of a folder; what a
file is, its contents decide.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SUFFIXES = (".safetensors", ".sft", ".gguf")
"""Endings of model files, in any case."""

OWN_STEMS = ("diffusion_pytorch_model", "model")
"""Names under which diffusers and transformers save the weights of a component."""

_VARIANT = r"(?:\.(?P<{0}>[A-Za-z]\w{{0,31}}))?"
_BEFORE, _AFTER = _VARIANT.format("before"), _VARIANT.format("after")
_NAME = (
    rf"(?P<stem>.+?){_BEFORE}(?:-(?P<number>\d{{3,6}})-of-(?P<count>\d{{3,6}}))?{_AFTER}\.(?:safetensors|sft)"
)
_INDEX = rf"(?P<stem>.+?)\.(?:safetensors|sft){_BEFORE}\.index{_AFTER}\.json"
_GGUF = r"(?P<stem>.+?)(?:-(?P<number>\d{3,6})-of-(?P<count>\d{3,6}))?\.gguf"


@dataclass(frozen=True)
class ModelName:
    """The parts of a model file's name.

    Args:
        name: The whole name.
        stem: What the files of one model have in common.
        variant: diffusers' variant, such as "fp16"; "" if there is none, and for every GGUF.
        number: Number of the shard, from 1; 0 if the file is no shard.
        count: Number of shards; 1 if the file is no shard.
        index: Whether the file is an index of shards.
        gguf: Whether the ending is that of a GGUF.
    """

    name: str
    stem: str
    variant: str = ""
    number: int = 0
    count: int = 1
    index: bool = False
    gguf: bool = False


def parse(name: str) -> ModelName | None:
    """The parts of a file's name without folder; None if it is not that of a model file."""
    for pattern in (_INDEX, _NAME, _GGUF):
        if match := re.fullmatch(pattern, name, re.IGNORECASE):
            found = match.groupdict()
            count = int(found.get("count") or 1)
            return ModelName(
                name,
                found["stem"],
                found.get("before") or found.get("after") or "",
                int(found.get("number") or 0) if count > 1 else 0,
                count,
                pattern is _INDEX,
                pattern is _GGUF,
            )
    return None
