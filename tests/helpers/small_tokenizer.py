"""A tokenizer.json small enough to read: all 256 bytes, three merges, one added token."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from tests.helpers.qwen_vocabulary import QWEN2_REGEX
from zimage_core.text.byte_pairs import byte_alphabet
from zimage_core.text.tokenizer import Tokenizer

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPLIT = {"type": "Split", "pattern": {"Regex": QWEN2_REGEX}, "behavior": "Isolated", "invert": False}
PRE = {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL]}
VOCAB = {char: number for number, char in enumerate(byte_alphabet())} | {"ab": 256, "Ġa": 257, "abab": 258}
ADDED = {
    "id": 260,
    "content": "<s>",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
}
DOCUMENT: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [ADDED | {"special": True}],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": PRE,
    "post_processor": None,
    "decoder": BYTE_LEVEL,
    "model": {"type": "BPE", "vocab": VOCAB, "merges": [["a", "b"], ["Ġ", "a"], ["ab", "ab"]]},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The document with one field set; `path` has dots."""
    document = copy.deepcopy(DOCUMENT)
    *folders, name = path.split(".")
    place = document
    for folder in folders:
        place = place[folder]
    place[name] = value
    return document


def load(folder: Path, document: Any) -> Tokenizer:
    path = folder / "tokenizer.json"
    path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    return Tokenizer.from_json(path)
