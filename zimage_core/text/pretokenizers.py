"""Table of pre-tokenizers: how a byte-level BPE splits text into words before merging.

A GGUF names a row of this table; a tokenizer.json holds patterns, which are compared with the table. No
pattern from a file is ever compiled. Several patterns are applied one after the other, each to the pieces
that the previous one produced.

Source: `llama-vocab.cpp` of llama.cpp for the names in `tokenizer.ggml.pre`; the models' own tokenizer.json
for the patterns.
"""

from __future__ import annotations

from dataclasses import dataclass

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's patterns for a file that names no pre-tokenizer
FALLBACK = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)


@dataclass(frozen=True)
class PreTokenizer:
    """One way to split text into words.

    Args:
        patterns: Regular expressions in Oniguruma's syntax, applied in order.
        nfc: Whether the text is converted to Unicode's composed form (NFC) first.
        ignore_merges: Whether a word that is itself in the vocabulary skips the merges.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "qwen2": PreTokenizer((QWEN2,), nfc=True),
    "qwen35": PreTokenizer((QWEN35,), nfc=True),
    "llama-bpe": PreTokenizer((LLAMA3,), ignore_merges=True),
    "llama3": PreTokenizer((LLAMA3,), ignore_merges=True),
    "llama-v3": PreTokenizer((LLAMA3,), ignore_merges=True),
    "smaug-bpe": PreTokenizer((LLAMA3,)),
    "smollm": PreTokenizer((DIGIT, GPT2)),
    "starcoder": PreTokenizer((DIGIT, GPT2)),
    "gpt-2": PreTokenizer((GPT2,)),
    "deepseek-r1-qwen": PreTokenizer((QWEN2,)),
    "default": PreTokenizer(FALLBACK),
}

KNOWN_PATTERNS = frozenset(row.patterns for row in PRE_TOKENIZERS.values())
