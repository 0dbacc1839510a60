"""What a rank was called with, in a few bytes, which ranks compare before they make an image together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from os import PathLike, fspath
from typing import Any

import torch

from zimage_core.run.loras import settings_of_adapters
from zimage_core.run.request import Request

OWN = {"callback_on_step_end", "callback_on_step_end_tensor_inputs"}
"""Arguments in which ranks may differ: one of them shows progress."""


def marks_of(request: Request, pipe: Any, networks: Mapping[str, Any]) -> dict[str, str]:
    """A hash of each argument of a call, and of what the pipeline computes with, by name.

    Args:
        request: The arguments.
        pipe: The pipeline.
        networks: Its networks by name.
    """
    found = {each.name: getattr(request, each.name) for each in fields(request) if each.name not in OWN}
    found["model"] = {name: file.identity() for name, file in pipe.files().items()}
    found["adapters"] = settings_of_adapters(networks)
    found["ControlNets"] = sorted(pipe.controlnets)
    found["scheduler"] = pipe.scheduler.shift
    found["dtype"], found["compute"] = str(pipe.dtype), pipe.compute
    return {name: mark(value) for name, value in found.items()}


def mark(value: Any) -> str:
    """The first digits of the SHA-256 of a value."""
    digest = hashlib.sha256()
    _add(digest, value)
    return digest.hexdigest()[:12]


def _add(digest: Any, value: Any) -> None:
    """Add a value to a hash, each kind with its name before it."""
    kind = str if isinstance(value, str) else type(value)  # a prompt that was written is a text with more
    digest.update(kind.__name__.encode() + b":")
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, torch.Generator):
        _add(digest, value.get_state())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            _add(digest, str(key))
            _add(digest, value[key])
    elif isinstance(value, (str, PathLike)):
        digest.update(str(fspath(value)).encode("utf-8", "surrogatepass"))
    elif isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        for member in value:
            _add(digest, member)
    elif hasattr(value, "tobytes"):  # an array, or an image of Pillow
        digest.update(f"{getattr(value, 'size', '')}{getattr(value, 'shape', '')}".encode())
        digest.update(value.tobytes())
    elif value is None or isinstance(value, (bool, int, float, bytes)):
        digest.update(repr(value).encode())
    digest.update(b";")
