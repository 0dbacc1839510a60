"""Encoders: float weights to the bytes of every block format, and importance matrices."""
