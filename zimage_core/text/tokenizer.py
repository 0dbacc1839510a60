"""Text to token ids and back, from any of the files a text encoder comes with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Protocol

from zimage_core.errors import BadArgument, printable
from zimage_core.text.byte_pairs import BytePairs
from zimage_core.text.gguf_vocabulary import Pieces, read_gguf
from zimage_core.text.sentence_pieces import SentencePieces
from zimage_core.text.tokenizer_json import read_folder, read_tokenizer_json, read_vocab_merges
from zimage_core.text.vocabulary import Vocabulary


class HasMetadata(Protocol):
    """What is needed of an open GGUF file."""

    @property
    def path(self) -> str | PathLike[str]:
        """Where the file lies, for messages."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Key -> value or array."""


class Tokenizer:
    """Text -> ids without template, beginning or end tokens.

    Added tokens such as `<|im_end|>` and `<think>` are matched literally wherever they stand in the text and
    become their own ids, also inside a user's prompt. Calls from several threads are safe.

    Args:
        source: A vocabulary as read; use one of the `from_` constructors.
    """

    def __init__(self, source: Vocabulary | Pieces) -> None:
        self._model = BytePairs(source) if isinstance(source, Vocabulary) else SentencePieces(source)

    @classmethod
    def from_gguf(cls, file: HasMetadata) -> Tokenizer:
        """From the keys `tokenizer.ggml.*` of an open GGUF file.

        Raises:
            BadFile: No tokenizer in the file, or a damaged one.
            Unsupported: A kind of tokenizer, or a pre-tokenizer name, that is not known here.
        """
        return cls.from_metadata(file.metadata, file.path)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], path: str | PathLike[str] = "metadata") -> Tokenizer:
        """Like `from_gguf`, from the key-values alone; `path` is only for messages."""
        return cls(read_gguf(metadata, str(path)))

    @classmethod
    def from_json(cls, path: str | PathLike[str]) -> Tokenizer:
        """From a tokenizer.json.

        Raises:
            BadFile: Damaged or contradictory.
            Unsupported: It asks for something other than a byte-level BPE; the message names it.
        """
        return cls(read_tokenizer_json(path))

    @classmethod
    def from_vocab_merges(
        cls,
        vocab: str | PathLike[str],
        merges: str | PathLike[str],
        config: str | PathLike[str] | None = None,
    ) -> Tokenizer:
        """From vocab.json and merges.txt; the added tokens come from tokenizer_config.json (`config`).

        Raises:
            BadFile: Damaged or contradictory.
        """
        return cls(read_vocab_merges(vocab, merges, config))

    @classmethod
    def from_folder(cls, folder: str | PathLike[str]) -> Tokenizer:
        """From a diffusers `tokenizer/` folder, or the model folder around it.

        Raises:
            BadFile: No tokenizer there, or a damaged one.
            Unsupported: See `from_json`.
        """
        return cls(read_folder(folder))

    def encode(self, text: str) -> list[int]:
        """Text -> ids; nothing is added, stripped or cut.

        Raises:
            BadArgument: Not a string, or a string with lone surrogates.
        """
        check_text(text, "text")
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text, added tokens included.

        Raises:
            BadArgument: An id that is not in the vocabulary.
        """
        return self._model.decode([int(number) for number in ids])

    @property
    def vocab_size(self) -> int:
        """One more than the highest id that `encode` can return; the embedding table needs as many rows."""
        return self._model.vocab_size

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """Added token -> id."""
        return self._model.added

    @property
    def fingerprint(self) -> str:
        """SHA-256 of vocabulary, merges, added tokens and word cutting, for an image's metadata."""
        return self._model.fingerprint

    def __len__(self) -> int:
        return self.vocab_size


def check_text(text: object, name: str) -> None:
    """Refuse what cannot be written in UTF-8.

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
