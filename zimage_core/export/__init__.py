"""Writes checkpoints: quantised GGUF files, and conversions between the common layouts."""
