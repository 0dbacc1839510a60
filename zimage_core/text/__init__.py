"""Tokenizers, their files, and the prompt string."""
