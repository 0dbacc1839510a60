"""Encodes with the SentencePiece vocabularies of llama-type GGUF files.

The library `sentencepiece` does the work. It loads only its own file format, a protobuf of three messages and
a dozen fields. That protobuf is written by hand here, so that no protobuf package is needed.
Source: `sentencepiece_model.proto` of SentencePiece 0.2, for the field numbers.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from itertools import groupby

from zimage_core.errors import BadArgument, BadFile, printable
from zimage_core.text.gguf_vocabulary import BYTE, CONTROL, UNKNOWN, USER_DEFINED, Pieces

BPE_MODEL = 2  # TrainerSpec.ModelType.BPE: llama-type files merge by score


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, body: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(body)) + body


def model_proto(pieces: Pieces) -> bytes:
    """Serialise a vocabulary as a ModelProto: pieces (1), trainer_spec (2), normalizer_spec (3)."""
    out = [
        _message(1, _message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind))
        for text, score, kind in zip(pieces.texts, pieces.scores, pieces.types, strict=True)
    ]
    absent = (1 << 64) - 1  # -1 as a varint: no such token; control tokens are cut out of the text before
    trainer = (
        _number(3, BPE_MODEL)
        + _number(4, len(pieces.texts))
        + _number(35, int(BYTE in pieces.types))  # byte_fallback
        + _number(40, pieces.types.index(UNKNOWN))
        + b"".join(_number(field, absent) for field in (41, 42, 43))  # bos, eos, pad
    )
    normalizer = (
        _message(1, b"identity")
        + _number(3, int(pieces.add_space_prefix))
        + _number(4, int(pieces.remove_extra_whitespaces))
        + _number(5, 1)  # a space is written as U+2581
    )
    return b"".join(out) + _message(2, trainer) + _message(3, normalizer)


class SentencePieces:
    """Encoder and decoder of one SentencePiece vocabulary.

    Control tokens in a text are matched literally and become their ids, as in llama.cpp. The text between two
    control tokens is encoded on its own, with a leading space of its own if the vocabulary asks for one.

    Args:
        pieces: Vocabulary as read from a GGUF.

    Raises:
        BadFile: SentencePiece refuses the vocabulary.
    """

    def __init__(self, pieces: Pieces) -> None:
        from sentencepiece import SentencePieceProcessor

        proto = model_proto(pieces)
        self.vocab_size = len(pieces.texts)
        self.fingerprint = hashlib.sha256(proto).hexdigest()
        rows = enumerate(zip(pieces.texts, pieces.types, strict=True))
        self.added: Mapping[str, int] = {t: n for n, (t, kind) in rows if kind in (CONTROL, USER_DEFINED)}
        self._control = {t: n for t, n in self.added.items() if pieces.types[n] == CONTROL}
        self._text_of = {number: text for text, number in self._control.items()}
        longest_first = sorted(self._control, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(proto)
        except (RuntimeError, ValueError) as error:
            raise BadFile(pieces.path, f"SentencePiece refuses the vocabulary: {printable(error)}") from None

    def encode(self, text: str) -> list[int]:
        """Text -> ids."""
        ids: list[int] = []
        for part in self._cut.split(text) if self._cut else [text]:
            if part in self._control:
                ids.append(self._control[part])
            elif part:
                ids.extend(self._processor.EncodeAsIds(part))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text, with control tokens as they are written."""
        for number in ids:
            if not 0 <= number < self.vocab_size:
                raise BadArgument(f"token id {number} is not in the vocabulary of {self.vocab_size} tokens")
        out: list[str] = []
        for control, run in groupby(ids, key=self._text_of.__contains__):
            numbers = list(run)
            out += (
                [self._text_of[n] for n in numbers] if control else [str(self._processor.DecodeIds(numbers))]
            )
        return "".join(out)
