"""A prompt written anew by a language model.

The model gets instructions and the prompt, thinks or not, and its answer is the new prompt.
Sources: the model card of Qwen3-4B for the sampling (its section on best practices) and for thinking that is
ended by a limit of tokens; the official Space of Z-Image for `revised_prompt` in a block of JSON.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from zimage_core.errors import BadArgument, Unsupported
from zimage_core.language.chat import END_THINK, THINK, Message, chat_ids
from zimage_core.language.generate import TextStream, Writer, check_limit
from zimage_core.language.instructions import name_of, own
from zimage_core.language.sampling import Sampling
from zimage_core.models.language_model import LanguageModel
from zimage_core.text.prompt import check_prompt
from zimage_core.text.tokenizer import Tokenizer

THINKING = Sampling(temperature=0.6, top_p=0.95, top_k=20)
DIRECT = Sampling(temperature=0.7, top_p=0.8, top_k=20)
"""What Qwen3's model card recommends with thinking and without; greedy choices repeat themselves."""
RESERVE = 320
"""Tokens that are kept for the answer while the model thinks; at most half of all."""
CLOSED = f"\n{END_THINK}\n\n"
"""What ends a thought that does not end by itself."""
REVISED = "revised_prompt"
"""Key of the prompt in an answer of JSON, if the instructions name it."""

OnText = Callable[[str, bool], object]
"""(piece of text, whether it is thought), as it is written."""


class Enhanced(str):
    """The new prompt: a str, with how it came about.

    Args:
        text: The new prompt.
        original: The prompt that it was made of.
        thought: What the model thought first; "" if nothing.
        answer: All that the model answered.
        tokens: Number of tokens that were written, thought included.
        settings: What made it, for an image's settings.
    """

    original: str
    thought: str
    answer: str
    tokens: int
    settings: Mapping[str, Any]

    def __new__(
        cls, text: str, original: str = "", thought: str = "", answer: str = "", tokens: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> Enhanced:  # fmt: skip
        """Make the str."""
        self = super().__new__(cls, text)
        self.original, self.thought, self.answer, self.tokens = original, thought, answer, tokens
        self.settings = dict(settings or {})
        return self


@dataclass(frozen=True)
class Wish:
    """How a prompt is to be written anew, checked.

    Args:
        prompt: The prompt.
        instructions: What the model is told; None for our own in the language of the prompt.
        think: Whether it thinks first.
        max_new_tokens: Most tokens to write, thought included.
        sampling: How tokens are chosen.
        keep_thought: Whether the thought becomes a part of the new prompt.

    Raises:
        BadArgument: A value is out of range.
    """

    prompt: str
    instructions: str | None = None
    think: bool = True
    max_new_tokens: int = 1024
    sampling: Sampling = THINKING
    keep_thought: bool = False

    def __post_init__(self) -> None:
        """Check everything that can be checked without a model."""
        check_prompt(self.prompt)
        if not self.prompt.strip():
            raise BadArgument("prompt: it is empty; write what is to be drawn")
        if self.instructions is not None:
            check_prompt(self.instructions, name="text of the instructions")
            if not self.instructions.strip():
                raise BadArgument("instructions: they are empty; leave them out for the usual ones")
        check_limit("max_new_tokens", self.max_new_tokens, 2)
        if self.keep_thought and not self.think:
            raise BadArgument("keep_thought: without thinking there is no thought to keep")

    @classmethod
    def of(
        cls,
        prompt: str,
        instructions: str | None = None,
        think: bool = True,
        max_new_tokens: int = 1024,
        keep_thought: bool = False,
        **sampling: Any,
    ) -> Wish:
        """A wish whose sampling is the model card's, but for the numbers that are given."""
        own_values = {name: value for name, value in sampling.items() if value is not None}
        chosen = replace(THINKING if think else DIRECT, **own_values)
        return cls(prompt, instructions, bool(think), max_new_tokens, chosen, bool(keep_thought))

    @property
    def told(self) -> str:
        """The instructions."""
        return own(self.prompt) if self.instructions is None else self.instructions

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """The conversation up to where the answer begins.

        Raises:
            Unsupported: The tokenizer lacks tokens of Qwen3's template.
        """
        messages = (Message("system", self.told), Message("user", self.prompt))
        return chat_ids(tokenizer, messages, self.think)

    def settings(self) -> dict[str, Any]:
        """What makes the new prompt, but for the model."""
        own_values = {"think": self.think, "max_new_tokens": self.max_new_tokens}
        if self.keep_thought:
            own_values["keep_thought"] = True
        sampling = self.sampling
        numbers = {name: getattr(sampling, name) for name in ("seed", "temperature", "top_p", "top_k")}
        if sampling.min_p:
            numbers["min_p"] = sampling.min_p
        return {**numbers, **own_values, "instructions": name_of(self.told)}


def enhance(
    model: LanguageModel,
    tokenizer: Tokenizer,
    wish: Wish,
    stop: Collection[int],
    on_text: OnText | None = None,
) -> Enhanced:
    """Write a prompt anew.

    Args:
        model: The language model.
        tokenizer: Its tokenizer.
        wish: What is wanted.
        stop: Tokens that end the answer; see `generate.stop_ids`.
        on_text: Called with each piece of text that is written, and with a line break at the end.

    Raises:
        BadArgument: Instructions and prompt are longer than the model was made for.
        Unsupported: The tokenizer lacks tokens of Qwen3's template, or the model wrote no answer.
        NonFinite: The network gives NaN or infinity.
    """
    draft = _Draft(model, tokenizer, wish, stop, on_text)
    draft.write()
    thought, answer = draft.thought.text, draft.answer.text
    text = revised(answer, wish.told)
    if not text:
        raise Unsupported(
            "enhance: the language model wrote no prompt; take another seed, more max_new_tokens or"
            " think=False"
        )
    for remark in draft.remarks:
        warnings.warn(remark, UserWarning, stacklevel=5)
    if wish.keep_thought:
        text = with_thought(thought, text)
    settings = {"original_prompt": wish.prompt, "enhanced": wish.settings()}
    return Enhanced(text, wish.prompt, thought, answer, draft.count, settings)


def with_thought(thought: str, prompt: str) -> str:
    """A prompt with a thought before it, as Qwen3 writes the two; docs/guides/enhance.md says why."""
    return f"{THINK}\n{thought}\n{END_THINK}\n\n{prompt}"


def revised(answer: str, instructions: str) -> str:
    """The prompt in an answer.

    Args:
        answer: The answer without the thought.
        instructions: What was asked for. If they name `revised_prompt`, the first JSON object of the answer
            that has it counts; else, or if there is none, the whole answer.
    """
    if REVISED in instructions:
        decoder, start = json.JSONDecoder(), answer.find("{")
        while start >= 0:
            try:
                found, _ = decoder.raw_decode(answer, start)
            except (ValueError, RecursionError):
                found = None
            if isinstance(found, dict) and isinstance(found.get(REVISED), str):
                return str(found[REVISED]).replace("\0", "").strip()
            start = answer.find("{", start + 1)
    return answer.replace("\0", "").strip()


class _Piece:
    """The text of the thought, or of the answer; tokens that are no text are left out of it."""

    def __init__(self, tokenizer: Tokenizer, control: Collection[int]) -> None:
        self._stream, self._control = TextStream(tokenizer), control
        self.text = ""

    def add(self, token: int) -> str:
        """The text that is complete with this token."""
        new = "" if token in self._control else self._stream.add(token)
        self.text += new
        return new

    def end(self) -> str:
        """Complete the text, without white space around it; what was not given before."""
        new = self._stream.end()
        self.text = (self.text + new).strip()
        return new


class _Draft:
    """One answer as it is written."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        wish: Wish,
        stop: Collection[int],
        on_text: OnText | None,
    ) -> None:
        self._wish, self._stop, self._on_text = wish, stop, on_text
        added = tokenizer.added_tokens
        self._open, self._close = added.get(THINK, -1), added.get(END_THINK, -1)
        self._ending = tokenizer.encode(CLOSED) if wish.think else []
        self._piece = partial(_Piece, tokenizer, frozenset(added.values()))
        self.thought, self.answer = self._piece(), self._piece()
        self.count, self.remarks = 0, list[str]()
        self._writer = Writer(model, wish.ids(tokenizer), wish.sampling, tokenizer.vocab_size)
        self._room = min(wish.max_new_tokens, self._writer.room - len(self._ending))
        if self._room < 1:
            raise BadArgument(
                f"prompt and instructions leave no room for an answer in the {model.max_positions} tokens "
                "that this language model reads; shorten them"
            )

    def write(self) -> None:
        """Write thought and answer, within their limits."""
        if self._wish.think:
            self._think()
        while self.count < self._room:
            token = self._next()
            if token in self._stop:
                break
            if token == self._close:  # the thought of a model that does not write where it begins
                self.thought, self.answer = self.answer, self._piece()
            self._take(self.answer, token)
        else:
            self.remarks.append(f"the new prompt was cut after {self.count} tokens; {self._advice()}")
        self._show(self.thought.end(), True)
        self._show(self.answer.end() + "\n", False)

    def _think(self) -> None:
        """Write the thought, if the model begins with one, and close it where it does not end."""
        limit = self._room - min(RESERVE, self._room // 2)
        while self.count < limit:
            token = self._next()
            if token == self._close:
                self._writer.add([token])
                return
            if token in self._stop:
                break
            if self.count == 1 and token != self._open:  # a model that does not think
                self._take(self.answer, token)
                return
            self._take(self.thought, token)
        else:
            self.remarks.append(
                f"the thought was ended after {self.count} tokens, to leave some for the prompt; for a "
                f"longer one {self._advice()}"
            )
        self._writer.add(self._ending)

    def _advice(self) -> str:
        """How to get a longer text."""
        if self._room < self._wish.max_new_tokens:
            return "shorten prompt and instructions, which leave the language model no more"
        return f"give more than max_new_tokens={self._wish.max_new_tokens}"

    def _next(self) -> int:
        self.count += 1
        return self._writer.next()

    def _take(self, piece: _Piece, token: int) -> None:
        self._writer.add([token])
        self._show(piece.add(token), piece is self.thought)

    def _show(self, text: str, is_thought: bool) -> None:
        if text and self._on_text is not None:
            self._on_text(text, is_thought)
