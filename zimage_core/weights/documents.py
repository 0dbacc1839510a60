"""Recognises what lies beside models: importance matrices, recipes, configs and reports."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from zimage_core.errors import ZImageError
from zimage_core.files import json_kinds, untrusted
from zimage_core.weights.card import ModelCard
from zimage_core.weights.infer import Shape
from zimage_core.weights.source import Source

MAX_TEXT = 1 << 20  # a recipe has at most that many bytes
IMATRIX = "an importance matrix"
FOR_QUANTIZE = "for `zimage quantize --imatrix`"
_SUMS = ".in_sum2"
_RULE = re.compile(r"\S+(?:\s+\[[^\]]*\])?\s*=\s*[A-Za-z]\w*")
_MOST_FACTS = 16


def identify_imatrix(shapes: Mapping[str, Shape], metadata: Mapping[str, Any]) -> ModelCard | None:
    """Card of an importance matrix in GGUF; None for any other file."""
    count = sum(name.endswith(_SUMS) for name in shapes)
    if metadata.get("general.type") != "imatrix" and not 2 * count >= len(shapes) > 0:
        return None
    return ModelCard("imatrix", "imatrix", f"{IMATRIX} of {count} weight matrices", notes=(FOR_QUANTIZE,))


def legacy_imatrix(head: bytes) -> int:
    """Number of matrices in llama.cpp's old format of importance matrices; 0 for any other file.

    Args:
        head: At least the first 12 bytes of the file, and the first name.
    """
    count, length = (int.from_bytes(head[at : at + 4], "little") for at in (0, 4))
    name = head[8 : 8 + length]
    plain = 0 < count <= 65_536 and 0 < length == len(name) and name.isascii() and name.decode().isprintable()
    return count if plain and b"." in name else 0


def describe(source: Source, head: bytes) -> tuple[str, str, dict[str, Any]] | None:
    """Kind, title and facts of a document; None for models, tokenizers and everything unknown.

    Args:
        source: The open file.
        head: Its first bytes.
    """
    if count := legacy_imatrix(head):
        return "imatrix", f"{IMATRIX} of {count} weight matrices, {FOR_QUANTIZE}", {}
    try:
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            data = untrusted.read_json(source.path)
            name = json_kinds.name_of(data)
            return ("document", name, _facts(data) if "config" in name else {}) if name else None
        if source.size > MAX_TEXT or b"\0" in head:
            return None
        text = untrusted.read_text(source.path)
    except ZImageError:
        return None
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    rules = [line for line in lines if line]
    if rules and all(_RULE.fullmatch(rule) for rule in rules):
        return "document", f"a recipe of {len(rules)} rules, for `zimage quantize --recipe`", {}
    if text.startswith("#version"):
        return "document", "a merges.txt, part of a tokenizer", {}
    return None


def _facts(data: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config that are short."""
    plain = {key: value for key, value in data.items() if isinstance(value, (str, int, float, bool))}
    return {key: value for key, value in list(plain.items())[:_MOST_FACTS] if len(json.dumps(value)) < 60}
