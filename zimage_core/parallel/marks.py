"""What a rank was called with, in a few bytes, which ranks compare before they make an image together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch

from zimage_core.run.loras import settings_of_adapters
from zimage_core.run.request import Request
from zimage_core.weights.load import opened_file

OWN = {"callback_on_step_end", "callback_on_step_end_tensor_inputs"}
"""Arguments in which ranks may differ: one of them shows progress."""
IMAGES = ("image", "mask_image", "control_image", "reference_images")
"""Arguments that may be names of files."""
MOST = 2**26
"""Bytes of such a file that are compared."""


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
    nets = {name: opened_file(net) for name, net in pipe.controlnets.items()}
    found["ControlNets"] = {name: each and each.file.identity() for name, each in nets.items()}
    # the same name may be another file on another machine
    found["image files"] = [_bytes(found[name]) for name in IMAGES]
    found["scheduler"] = pipe.scheduler.shift
    found["dtype"], found["compute"] = str(pipe.dtype), pipe.compute
    return {name: mark(value) for name, value in found.items()}


def _bytes(value: Any) -> Any:
    """The contents of the files that an argument names."""
    if isinstance(value, (list, tuple)):
        return [_bytes(each) for each in value]
    if not isinstance(value, (str, PathLike)):
        return None
    try:
        with Path(value).open("rb") as file:
            return file.read(MOST)
    except (OSError, ValueError):  # an error of the run
        return None


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
