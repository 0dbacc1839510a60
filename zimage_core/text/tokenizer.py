"""The tokenizer: text to token ids and back, with a vocabulary from any supported file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Protocol

from zimage_core.errors import BadArgument, Unsupported, printable
from zimage_core.text.byte_pairs import BytePairs
from zimage_core.text.gguf_vocabulary import Pieces, read_gguf
from zimage_core.text.sentence_pieces import SentencePieces
from zimage_core.text.tokenizer_json import read_folder, read_tokenizer_json, read_vocab_merges
from zimage_core.text.vocabulary import Vocabulary


class HasMetadata(Protocol):
    """The part of an open GGUF file that a tokenizer needs."""

    @property
    def path(self) -> str | PathLike[str]:
        """Path of the file, for messages."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Key -> value, or array as a sequence."""


class Tokenizer:
    """Converts text to ids, without a template and without tokens for beginning and end.

    Added tokens such as `<|im_end|>` and `<think>` are matched literally anywhere in the text and become
    their own ids, also inside a user's prompt. Calls from several threads are safe.

    Args:
        source: Vocabulary as read from a file; the `from_` constructors read one.
    """

    def __init__(self, source: Vocabulary | Pieces) -> None:
        self._model = BytePairs(source) if isinstance(source, Vocabulary) else SentencePieces(source)

    @classmethod
    def from_gguf(cls, file: HasMetadata) -> Tokenizer:
        """Tokenizer of an open GGUF file, from its keys `tokenizer.ggml.*`.

        Raises:
            BadFile: The file has no tokenizer, or a damaged one.
            Unsupported: The kind of tokenizer or its pre-tokenizer is not supported.
        """
        return cls.from_metadata(file.metadata, file.path)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], path: str | PathLike[str] = "metadata") -> Tokenizer:
        """Tokenizer of a GGUF file's metadata, with the errors of `from_gguf`; `path` is for messages."""
        return cls(read_gguf(metadata, str(path)))

    @classmethod
    def from_json(cls, path: str | PathLike[str]) -> Tokenizer:
        """Tokenizer of a tokenizer.json.

        Raises:
            BadFile: The file is damaged or contradicts itself.
            Unsupported: The file needs something that a byte-level BPE does not do; the message names it.
        """
        return cls(read_tokenizer_json(path))

    @classmethod
    def from_vocab_merges(
        cls,
        vocab: str | PathLike[str],
        merges: str | PathLike[str],
        config: str | PathLike[str] | None = None,
    ) -> Tokenizer:
        """Tokenizer of vocab.json and merges.txt, with the added tokens of tokenizer_config.json (`config`).

        Raises:
            BadFile: A file is damaged, or they contradict each other.
        """
        return cls(read_vocab_merges(vocab, merges, config))

    @classmethod
    def from_folder(cls, folder: str | PathLike[str]) -> Tokenizer:
        """Tokenizer of a `tokenizer/` folder as diffusers writes it, or of the model folder around one.

        Raises:
            BadFile: There is no tokenizer, or a damaged one.
            Unsupported: A file needs something that a byte-level BPE does not do; the message names it.
        """
        return cls(read_folder(folder))

    def encode(self, text: str) -> list[int]:
        """Text -> ids; nothing is added, stripped or cut.

        Raises:
            BadArgument: `text` is not a string, or holds a lone surrogate.
        """
        check_text(text, "text")
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text, added tokens included.

        Raises:
            BadArgument: An id is not in the vocabulary.
        """
        return self._model.decode([int(number) for number in ids])

    def to_json(self) -> str:
        """The content of a tokenizer.json that gives the same ids, for this library and for transformers.

        Raises:
            Unsupported: The vocabulary is SentencePiece's.
        """
        if isinstance(self._model, SentencePieces):
            raise Unsupported("a SentencePiece vocabulary is not written as tokenizer.json; keep its GGUF")
        return self._model.to_json()

    @property
    def vocab_size(self) -> int:
        """The highest id that `encode` can return, plus one; the embedding table needs this many rows."""
        return self._model.vocab_size

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """Added token -> id."""
        return self._model.added

    @property
    def fingerprint(self) -> str:
        """SHA-256 of vocabulary, merges, added tokens and pre-tokenizer, for an image's metadata."""
        return self._model.fingerprint

    def __len__(self) -> int:
        return self.vocab_size


def check_text(text: object, name: str) -> None:
    """Refuse text that UTF-8 cannot encode; `name` is the argument's name, for the message.

    Raises:
        BadArgument: `text` is not a string, or holds a lone surrogate.
    """
    if not isinstance(text, str):
        raise BadArgument(f"{name} is a {type(text).__name__}, a string was expected")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = printable(text[error.start])
        raise BadArgument(
            f"{name}: character {error.start} is {bad}, a lone surrogate, not Unicode text"
        ) from None
