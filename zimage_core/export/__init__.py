"""Checkpoints written: quantised GGUF files, and conversions between the layouts people have."""
