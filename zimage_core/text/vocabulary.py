"""Vocabulary, merges and added tokens from any kind of file, and the check of them.

The library that merges is written in Rust and aborts on some bad input, so only checked input reaches it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zimage_core.errors import BadFile, printable
from zimage_core.text.pretokenizers import PreTokenizer

MAX_ID = (1 << 24) - 1  # sixteen million rows are far beyond any embedding table
MAX_TOKEN_CHARS = 1 << 16


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE as read from a file, not yet checked.

    Args:
        path: The file, for messages.
        tokens: Token -> id, in the byte-level alphabet ("Ġ" is a space); may hold the added tokens.
        merges: Pairs of tokens, the first merge first.
        added: Added token -> id, in plain text; added tokens are matched literally anywhere in a text.
        pre: How text is split into words.
        unknown: The token for a byte that the vocabulary lacks, if there is one.
    """

    path: str
    tokens: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    added: Mapping[str, int]
    pre: PreTokenizer
    unknown: str | None = None

    def checked(self) -> dict[str, int]:
        """Check everything and return token -> id, including the added tokens.

        Raises:
            BadFile: An id is out of range or used twice, a token is empty or holds a lone surrogate, a part
                or the result of a merge is not in the vocabulary, or an added token contradicts it.
        """
        if not self.tokens:
            raise BadFile(self.path, "the vocabulary is empty")
        tokens = dict(self.tokens)
        for content, number in self.added.items():
            if not content:
                raise BadFile(self.path, f"the added token with id {number} is empty")
            if tokens.setdefault(content, number) != number:
                raise BadFile(
                    self.path,
                    f"the added token {_show(content)} has id {number}, in the vocabulary {tokens[content]}",
                )
        self._check_tokens(tokens)
        self._check_merges(tokens)
        if self.unknown is not None and self.unknown not in tokens:
            raise BadFile(self.path, f"unk_token {_show(self.unknown)} is not in the vocabulary")
        return tokens

    def _check_tokens(self, tokens: Mapping[str, int]) -> None:
        owner: dict[int, str] = {}
        for token, number in tokens.items():
            if type(number) is not int or not 0 <= number <= MAX_ID:
                raise BadFile(
                    self.path, f"vocabulary id {printable(number, 40)} of {_show(token)} is out of range"
                )
            if owner.setdefault(number, token) != token:
                raise BadFile(
                    self.path, f"duplicate vocabulary id {number}: {_show(owner[number])} and {_show(token)}"
                )
            if len(token) > MAX_TOKEN_CHARS:
                raise BadFile(self.path, f"token {number} is {len(token)} characters long")
        check_unicode(tokens, self.path)

    def _check_merges(self, tokens: Mapping[str, int]) -> None:
        for index, (left, right) in enumerate(self.merges):
            if left not in tokens or right not in tokens or left + right not in tokens:
                part = next(p for p in (left, right, left + right) if p not in tokens)
                raise BadFile(
                    self.path,
                    f"merge {index}, {_show(left)} + {_show(right)}: {_show(part)} is not in the vocabulary",
                )

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the ids; it does not depend on the file format."""
        digest = hashlib.sha256(repr((self.pre, self.unknown)).encode())
        everything = {**self.tokens, **self.added}
        by_id = sorted(everything.items(), key=lambda item: item[1])
        digest.update("\n".join([f"{number}\t{token}" for token, number in by_id]).encode())
        digest.update("\n".join([f"{left}\t{right}" for left, right in self.merges]).encode())
        digest.update(repr(sorted(self.added.values())).encode())
        return digest.hexdigest()


def check_unicode(tokens: Iterable[str], path: str) -> None:
    """Raise BadFile for lone surrogates, which JSON can write and UTF-8 cannot."""
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError:
        raise BadFile(path, "a token holds a lone surrogate, which is not Unicode text") from None


def split_merges(lines: Iterable[Any], path: str) -> list[tuple[str, str]]:
    """Pairs of merges that are written as "left right" or as [left, right].

    Raises:
        BadFile: A merge does not have two parts.
    """
    pairs: list[tuple[str, str]] = []
    for line in lines:
        parts = line.split(" ") if isinstance(line, str) else line
        if (
            not isinstance(parts, list)
            or len(parts) != 2
            or not (isinstance(parts[0], str) and isinstance(parts[1], str))
            or not (parts[0] and parts[1])
        ):
            raise BadFile(path, f"merge {len(pairs)} is {_show(line)}, two tokens were expected")
        pairs.append((parts[0], parts[1]))
    return pairs


def _show(value: object) -> str:
    return f"'{printable(value, 60)}'"
