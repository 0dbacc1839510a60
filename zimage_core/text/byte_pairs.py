"""Byte-level byte-pair encoding, as in GPT-2 and Qwen.

Text -> added tokens cut out literally -> NFC -> words -> bytes as printable characters -> merges.
The library `tokenizers` does the work, with a pipeline that is built here and never read from a file.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from zimage_core.errors import BadArgument
from zimage_core.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    import tokenizers


def byte_alphabet() -> dict[str, int]:
    """Character -> byte: printable bytes stand for themselves, the others are counted up from U+0100.

    Source: `bytes_to_unicode` in GPT-2's encoder.py.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(moved)}


BYTE_OF = byte_alphabet()


class BytePairs:
    """Encoder and decoder of one vocabulary; it holds no reference to the file.

    Args:
        vocabulary: Vocabulary as read from a file; it is checked here.

    Raises:
        BadFile: The vocabulary contradicts itself; `Vocabulary.checked` lists how.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        tokens = vocabulary.checked()
        self.added: Mapping[str, int] = dict(vocabulary.added)
        self.vocab_size = 1 + max(tokens.values())
        self.fingerprint = vocabulary.fingerprint()
        self._added_ids = frozenset(self.added.values())
        self._missing_bytes = any(char not in tokens for char in BYTE_OF)
        self._rust = _build(vocabulary, tokens)

    def encode(self, text: str) -> list[int]:
        """Text -> ids; warns of characters that the vocabulary lacks (a real one has all 256 bytes)."""
        ids = self._rust.encode(text, add_special_tokens=False).ids
        if self._missing_bytes and self._rust.normalizer is not None:
            text = self._rust.normalizer.normalize_str(text)
        if self._missing_bytes and self.decode(ids) != text:
            warnings.warn(
                "characters that the vocabulary lacks were left out of the text", UserWarning, stacklevel=3
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text; an incomplete character becomes U+FFFD."""
        data = bytearray()
        for number in ids:
            token = self._rust.id_to_token(number) if 0 <= number < self.vocab_size else None
            if token is None:
                raise BadArgument(f"token id {number} is not in the vocabulary of {self.vocab_size} tokens")
            if number in self._added_ids:
                data += token.encode()
            else:
                for char in token:
                    byte = BYTE_OF.get(char)
                    data += char.encode() if byte is None else bytes((byte,))
        return data.decode("utf-8", "replace")

    def to_json(self) -> str:
        """The content of a tokenizer.json with the same ids; what it lacks of Qwen's is added."""
        import json

        document = json.loads(self._rust.to_str())
        to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        document |= {"decoder": to_bytes, "post_processor": to_bytes}
        return json.dumps(document, ensure_ascii=False)


def _build(vocabulary: Vocabulary, tokens: dict[str, int]) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    pre = vocabulary.pre
    model = models.BPE(
        vocab=tokens,
        merges=list(vocabulary.merges),
        unk_token=vocabulary.unknown,
        ignore_merges=pre.ignore_merges,
    )
    rust = Tokenizer(model)
    if pre.nfc:
        rust.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    # the vocabulary contains the added tokens and gives their ids; normalized=False matches literally
    rust.add_tokens([AddedToken(content, normalized=False) for content in vocabulary.added])
    return rust
