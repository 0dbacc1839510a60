"""Z-Image inference from GGUF files, written from scratch."""

__version__ = "0.1.0"
