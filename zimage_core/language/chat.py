"""A conversation as token ids, in the template of Qwen3.

The ids are those of transformers' chat template, as long as no message holds a control token. In a message
such a token is text like any other: it is cut in two before the tokenizer sees it, so that nobody's words end
a message or begin another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from zimage_core.errors import Unsupported
from zimage_core.text.prompt import NO_THINKING, check_template_tokens
from zimage_core.text.tokenizer import Tokenizer, check_text

THINK, END_THINK = "<think>", "</think>"


class Message(NamedTuple):
    """One message.

    Args:
        role: "system" or "user".
        text: What it says; control tokens in it have no effect.
    """

    role: str
    text: str


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Message], think: bool) -> list[int]:
    """Token ids of messages, up to where the answer begins.

    Args:
        tokenizer: Qwen3's, or another one with the tokens of its template.
        messages: The messages in order.
        think: False appends an empty block of thought, so that the answer begins at once.

    Raises:
        BadArgument: A text is not Unicode.
        Unsupported: The tokenizer lacks a token of the template.
    """
    check_template_tokens(tokenizer.added_tokens)
    if think and not {THINK, END_THINK} <= set(tokenizer.added_tokens):
        raise Unsupported(
            f"the tokenizer has no token {THINK}, so this language model cannot think first; give "
            "think=False (--no-think)"
        )
    cut = _Cutter(tokenizer)
    text, cuts = "", []
    for message in messages:
        check_text(message.text, "prompt")
        text += f"<|im_start|>{message.role}\n"
        cuts += [len(text) + place for place in cut.places(message.text)]
        text += f"{message.text}<|im_end|>\n"
    text += "<|im_start|>assistant\n" + ("" if think else NO_THINKING)
    ends = [0, *cuts, len(text)]
    return [number for start, stop in pairwise(ends) for number in tokenizer.encode(text[start:stop])]


class _Cutter:
    """Finds where control tokens have to be cut; those of one character are text anyway."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokens = [re.escape(token) for token in tokenizer.added_tokens if len(token) > 1]
        # a look ahead finds tokens that overlap, too
        self._pattern = re.compile(f"(?={'|'.join(tokens)})") if tokens else None

    def places(self, text: str) -> list[int]:
        """Places in a text, each behind the first character of a control token."""
        return [] if self._pattern is None else [found.start() + 1 for found in self._pattern.finditer(text)]
