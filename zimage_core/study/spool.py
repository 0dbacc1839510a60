"""Tensors set aside on disk, by name, as long as a comparison runs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from zimage_core.errors import BadFile

Key = tuple[object, ...]


class Spool:
    """A temporary folder with a file a tensor; a context manager that removes it.

    The folder is where the system has its temporary files (TMPDIR).
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="zimage-")
        self._known: dict[Key, tuple[Path, torch.dtype, tuple[int, ...]]] = {}

    def put(self, key: Key, tensor: Tensor) -> None:
        """Write a tensor.

        Raises:
            BadFile: The disk is full or cannot be written.
        """
        path = Path(self._folder.name) / str(len(self._known))
        data = tensor.detach().cpu().contiguous()
        try:
            path.write_bytes(data.flatten().view(torch.uint8).numpy().data)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            hint = "free some space, set TMPDIR to another folder, or compare fewer steps of blocks"
            raise BadFile(path, f"blocks could not be set aside ({reason})", hint) from None
        self._known[key] = (path, data.dtype, tuple(data.shape))

    def get(self, key: Key) -> Tensor:
        """The tensor back, on the CPU."""
        path, dtype, shape = self._known[key]
        data = bytearray(path.read_bytes())
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(shape)

    def __contains__(self, key: Key) -> bool:
        return key in self._known

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder and what is in it."""
        self._folder.cleanup()
