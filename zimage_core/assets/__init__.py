"""The embedded nano model, as data files."""

from __future__ import annotations

import os
from pathlib import Path

NANO = Path(__file__).parent / "nano"
"""The folder of the embedded model."""

OMNI = Path(__file__).parent / "omni"
"""The folder of its Omni sibling, a transformer and a vision tower; the other networks are NANO's."""


def embedded_files(omni: bool = False) -> dict[str, Path]:
    """Component -> file of the embedded model, or of its Omni sibling."""
    files = {"transformer": (OMNI if omni else NANO) / "transformer.gguf"}
    files |= {"text_encoder": NANO / "text_encoder.gguf", "vae": NANO / "vae.safetensors"}
    return {**files, "siglip": OMNI / "siglip.gguf"} if omni else files


DEFAULT = "default"
"""The name of the embedded model, wherever a folder is wanted; a file or folder of this name comes first."""


def named(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The folder of the embedded model for its name, and any other path as it is."""
    return NANO if os.fspath(path) == DEFAULT and not os.path.lexists(path) else path


PARTS = {"outline": NANO / "outline.safetensors", "edges": NANO / "edges.gguf"}
"""Name -> file of what was trained for the embedded model: a LoRA and a ControlNet."""


def embedded_part(name: str | os.PathLike[str]) -> Path | None:
    """The file of the embedded model's LoRA or ControlNet of that name; None for any other name.

    A file or folder of this name comes first, as for DEFAULT.
    """
    found = PARTS.get(os.fspath(name))
    return None if found is None or os.path.lexists(name) else found
