"""Continues a text token by token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zimage_core.errors import BadArgument
from zimage_core.language.sampling import Chooser, Sampling, shown
from zimage_core.models.language_model import LanguageModel
from zimage_core.text.tokenizer import Tokenizer

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>", "</s>", "<|eot_id|>", "<|end_of_text|>")
"""Tokens at which an answer ends, of those that a tokenizer has: Qwen's, then llama's."""


class Writer:
    """One text that grows.

    The first tokens are computed in one call of the network, each further one alone, with the keys and values
    of those before it kept.

    Args:
        model: The language model.
        ids: The text so far, at least one token.
        sampling: How tokens are chosen.
        vocabulary: Number of tokens to choose from; None for all. Tables of embeddings have more rows than
            there are tokens.

    Raises:
        BadArgument: There is no token, or there are more than the model was made for.
    """

    def __init__(
        self, model: LanguageModel, ids: Sequence[int], sampling: Sampling, vocabulary: int | None = None
    ) -> None:
        if not ids:
            raise BadArgument("language model: there is nothing to continue; write a prompt")
        self.model, self._choose, self._cache = model, Chooser(sampling), model.new_cache()
        self._waiting, self._vocabulary = [*ids], vocabulary
        if self.room < 0:
            raise BadArgument(
                f"the prompt has {len(ids)} tokens with its instructions, this language model reads at most "
                f"{model.max_positions}; shorten it"
            )

    @property
    def room(self) -> int:
        """Tokens that may still be added."""
        return self.model.max_positions - self._cache.length - len(self._waiting)

    def add(self, ids: Sequence[int]) -> None:
        """Continue the text with tokens that are given."""
        self._waiting += ids

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Logits [vocab_size] float32 of the next token; every token added so far has been read."""
        found: Tensor = self.model(torch.tensor(self._waiting, dtype=torch.int64), self._cache)[0]
        self._waiting = []
        return found

    def next(self) -> int:
        """Choose the next token, which `add` makes a part of the text."""
        return self._choose(self.logits()[: self._vocabulary])


@dataclass(frozen=True)
class Generated:
    """What was written.

    Args:
        ids: The new tokens, without the one that ended the text.
        stopped: Whether a stop token ended it; else the limit did.
    """

    ids: tuple[int, ...]
    stopped: bool


def generate(
    model: LanguageModel,
    ids: Sequence[int],
    max_new_tokens: int = 256,
    sampling: Sampling = Sampling(),  # noqa: B008  it cannot change
    stop: Collection[int] = (),
    on_token: Callable[[int], object] | None = None,
    vocabulary: int | None = None,
) -> Generated:
    """Continue a text.

    Args:
        model: The language model.
        ids: Tokens of the text, at least one.
        max_new_tokens: Most tokens to write; the positions that the model was made for are a limit too.
        sampling: How tokens are chosen; default: the most likely one each time.
        stop: Tokens that end the text; see `stop_ids`.
        on_token: Called with each token that is written.
        vocabulary: Number of tokens to choose from, such as `len(tokenizer)`; None for all.

    Raises:
        BadArgument: A number is out of range, or there are too many tokens to begin with.
        NonFinite: The network gives NaN or infinity.
    """
    check_limit("max_new_tokens", max_new_tokens)
    writer = Writer(model, ids, sampling, vocabulary)
    written: list[int] = []
    while len(written) < max_new_tokens and writer.room > 0:
        token = writer.next()
        if token in stop:
            return Generated(tuple(written), True)
        writer.add([token])
        written.append(token)
        if on_token is not None:
            on_token(token)
    return Generated(tuple(written), False)


MOST_NEW_TOKENS = 1 << 16
"""Most tokens of one answer; a day of work for a small computer."""


def check_limit(name: str, value: Any, low: int = 1) -> int:
    """Return a number of tokens; one that no run would reach is refused.

    Raises:
        BadArgument: It is no whole number in its range.
    """
    if type(value) is not int or not low <= value <= MOST_NEW_TOKENS:
        raise BadArgument(f"{name}: got {shown(value)}, wanted an integer from {low} to {MOST_NEW_TOKENS}")
    return value


def stop_ids(tokenizer: Tokenizer, metadata: Mapping[str, Any] | None = None) -> frozenset[int]:
    """Tokens at which an answer ends.

    Args:
        tokenizer: The model's tokenizer.
        metadata: Keys of the model's GGUF, whose own end of a text counts too.
    """
    added = tokenizer.added_tokens
    found = {added[token] for token in STOP_TOKENS if token in added}
    own = (metadata or {}).get("tokenizer.ggml.eos_token_id")
    return frozenset({*found, own} if type(own) is int and own >= 0 else found)


class TextStream:
    """Tokens to text as they come; a character that is cut between tokens is held back until it is whole.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def add(self, token: int) -> str:
        """The text that is complete with this token and was not given before."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        whole = text.rstrip("\ufffd")
        found = self._new(whole)
        if whole == text:  # the next tokens need this one alone, so that a long text is not decoded each time
            self._ids = [token]
            self._shown = len(self._tokenizer.decode(self._ids))
        return found

    def end(self) -> str:
        """What is left: parts of characters that never became whole, as U+FFFD."""
        return self._new(self._tokenizer.decode(self._ids))

    def _new(self, text: str) -> str:
        found, self._shown = text[self._shown :], max(self._shown, len(text))
        return found
