"""Reads the vocabulary of the tokenizer inside a GGUF file, from its keys `tokenizer.ggml.*`.

The metadata may be any mapping; its arrays may be lists or lazy sequences. Types and lengths are checked
here, because the reader of the file has only checked that the bytes exist.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zimage_core.errors import BadFile, Unsupported, printable
from zimage_core.text.pretokenizers import PRE_TOKENIZERS, QWEN2, PreTokenizer
from zimage_core.text.vocabulary import Vocabulary, check_unicode, split_merges

FLOAT32_MAX = (2 - 2**-23) * 2.0**127

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Values of `tokenizer.ggml.token_type`, the same as SentencePiece's ModelProto.SentencePiece.Type."""


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece vocabulary; item i of each list describes the piece with id i."""

    path: str
    texts: list[str]
    scores: list[float]
    types: list[int]
    add_space_prefix: bool
    remove_extra_whitespaces: bool


def read_gguf(metadata: Mapping[str, Any], path: str) -> Vocabulary | Pieces:
    """The vocabulary of a GGUF file.

    Args:
        metadata: Keys and values of the file.
        path: The file, for messages.

    Raises:
        BadFile: The file has no tokenizer, or its arrays do not fit together.
        Unsupported: The tokenizer is of another kind; the message names it and the supported ones.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        raise BadFile(
            path,
            "no tokenizer in this file (key tokenizer.ggml.model is missing)",
            "use a text-encoder GGUF, or give the tokenizer folder",
        )
    if model == "llama" and _is_byte_level(metadata, path):
        _warn(path, "tokenizer.ggml.model is 'llama', the tokens and merges are those of a byte-level BPE")
        model = "gpt2"
    if model == "gpt2":
        return _byte_pairs(metadata, path)
    if model == "llama":
        return _pieces(metadata, path)
    raise Unsupported(
        f"{printable(path)}: tokenizer.ggml.model is '{printable(model, 60)}'; known are 'gpt2' (byte-level"
        " BPE) and 'llama' (SentencePiece)"
    )


def _warn(path: str, text: str) -> None:
    warnings.warn(f"{printable(path)}: {text}", UserWarning, stacklevel=4)


def _is_byte_level(metadata: Mapping[str, Any], path: str) -> bool:
    """Whether there are merges, and spaces are those of byte-level BPE and not those of SentencePiece."""
    if "tokenizer.ggml.merges" not in metadata or "tokenizer.ggml.tokens" not in metadata:
        return False
    first = {text[:1] for text in _array(metadata, "tokenizer.ggml.tokens", str, path)}
    return "\u0120" in first and "\u2581" not in first


def _byte_pairs(metadata: Mapping[str, Any], path: str) -> Vocabulary:
    texts, types = _tokens(metadata, path)
    if "tokenizer.ggml.merges" not in metadata:
        raise BadFile(path, "tokenizer.ggml.merges is missing; a byte-level BPE has merges")
    merges = _array(metadata, "tokenizer.ggml.merges", str, path)
    tokens: dict[str, int] = {}
    added: dict[str, int] = {}
    for number, (text, kind) in enumerate(zip(texts, types, strict=True)):
        if kind == UNUSED:
            continue  # unused rows, which only pad the embedding table
        table = tokens if kind in (NORMAL, BYTE) else added
        if text in tokens or text in added:
            raise BadFile(path, f"duplicate token '{printable(text, 60)}' with id {number}")
        table[text] = number
    for flag in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        if metadata.get(f"tokenizer.ggml.{flag}") is True and _is_qwen(metadata):
            _warn(path, f"tokenizer.ggml.{flag} is true and not followed, as Qwen's tokenizer adds nothing")
    return Vocabulary(path, tokens, split_merges(merges, path), added, _pre(metadata, path))


def _pre(metadata: Mapping[str, Any], path: str) -> PreTokenizer:
    name, qwen = metadata.get("tokenizer.ggml.pre"), _is_qwen(metadata)
    if name is None:
        # old files lack the key: Qwen had only one pre-tokenizer then, and llama.cpp also uses the default
        # here
        name = "qwen2" if qwen else "default"
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise Unsupported(
            f"{printable(path)}: tokenizer.ggml.pre is '{printable(name, 60)}'; known are"
            f" {', '.join(PRE_TOKENIZERS)}"
        )
    if qwen and name == "default":  # of a converter that did not know the vocabulary
        _warn(path, "tokenizer.ggml.pre is 'default'; the architecture is Qwen, so 'qwen2' is used")
        name = "qwen2"
    elif qwen and PRE_TOKENIZERS[name].patterns != (QWEN2,):
        _warn(path, f"tokenizer.ggml.pre is '{name}', which cuts words otherwise than Qwen3's 'qwen2'")
    return PRE_TOKENIZERS[name]


def _is_qwen(metadata: Mapping[str, Any]) -> bool:
    return str(metadata.get("general.architecture")).startswith("qwen")


def _pieces(metadata: Mapping[str, Any], path: str) -> Pieces:
    if "tokenizer.ggml.precompiled_charsmap" in metadata:
        raise Unsupported(f"{printable(path)}: tokenizer.ggml.precompiled_charsmap is not supported")
    texts, types = _tokens(metadata, path)
    scores = _array(metadata, "tokenizer.ggml.scores", float, path)
    if len(scores) != len(texts):
        raise BadFile(path, f"tokenizer.ggml.scores has {len(scores)} values for {len(texts)} tokens")
    if not all(abs(score) <= FLOAT32_MAX for score in scores):  # false for NaN, too
        raise BadFile(path, "tokenizer.ggml.scores holds a value that is not finite")
    if not all(texts):
        raise BadFile(path, f"token {texts.index('')} is empty")
    if len(set(texts)) != len(texts):
        raise BadFile(path, "duplicate token in tokenizer.ggml.tokens")
    check_unicode(texts, path)
    if types.count(UNKNOWN) != 1:
        raise BadFile(path, f"{types.count(UNKNOWN)} tokens of type 'unknown', SentencePiece has exactly one")
    found = {text for text, kind in zip(texts, types, strict=True) if kind == BYTE}
    if found not in (set(), {f"<0x{byte:02X}>" for byte in range(256)}):
        raise BadFile(path, f"{len(found)} byte tokens, all 256 from <0x00> to <0xFF> or none were expected")
    return Pieces(
        path=path,
        texts=texts,
        scores=scores,
        types=types,
        add_space_prefix=_flag(metadata, "tokenizer.ggml.add_space_prefix", True, path),
        remove_extra_whitespaces=_flag(metadata, "tokenizer.ggml.remove_extra_whitespaces", False, path),
    )


def _tokens(metadata: Mapping[str, Any], path: str) -> tuple[list[str], list[int]]:
    texts: list[str] = _array(metadata, "tokenizer.ggml.tokens", str, path)
    if not texts:
        raise BadFile(path, "tokenizer.ggml.tokens is empty")
    if "tokenizer.ggml.token_type" not in metadata:
        return texts, [NORMAL] * len(texts)
    types: list[int] = _array(metadata, "tokenizer.ggml.token_type", int, path)
    if len(types) != len(texts):
        raise BadFile(path, f"tokenizer.ggml.token_type has {len(types)} values for {len(texts)} tokens")
    if not set(types) <= set(range(NORMAL, BYTE + 1)):
        strange = next(kind for kind in types if not NORMAL <= kind <= BYTE)
        raise BadFile(path, f"token type {strange} is unknown, {NORMAL}..{BYTE} are defined")
    return texts, types


def _array(metadata: Mapping[str, Any], key: str, kind: type, path: str) -> list[Any]:
    value = metadata.get(key)
    if value is None or isinstance(value, (str, bytes, int, float)):
        raise BadFile(path, f"{key} is {'missing' if value is None else 'not an array'}")
    items = value.tolist() if hasattr(value, "tolist") else list(value)
    if not set(map(type, items)) <= {kind}:
        raise BadFile(path, f"{key} holds values that are not of type {kind.__name__}")
    return items


def _flag(metadata: Mapping[str, Any], key: str, default: bool, path: str) -> bool:
    value = metadata.get(key, default)
    if not isinstance(value, bool):
        raise BadFile(path, f"{key} is not a truth value")
    return value
