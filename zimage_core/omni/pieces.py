"""The pieces of an Omni prompt: text around the places of the images, each encoded alone.

The strings are those of diffusers' ZImageOmniPipeline. Image j of n references lies between the pieces j and
j + 1, the image that is made between the last two.
"""

from __future__ import annotations

from zimage_core.errors import Unsupported
from zimage_core.text.prompt import NO_THINKING, TEMPLATE, check_template_tokens, prompt_ids, render
from zimage_core.text.tokenizer import Tokenizer

START, END = "<|vision_start|>", "<|vision_end|>"
FIRST = "<|im_start|>user\n" + START
BETWEEN = END + START
LAST = END + "<|im_end|>"
"""Pieces without the prompt: before the first reference, between two of them, after the image."""
_HEAD = END + "{prompt}<|im_end|>\n<|im_start|>assistant\n"


def template(references: int, enable_thinking: bool = True) -> str:
    """The piece that holds the prompt, with `{prompt}` in its place."""
    if not references:
        return TEMPLATE if enable_thinking else TEMPLATE + NO_THINKING
    return (_HEAD if enable_thinking else _HEAD + NO_THINKING) + START


def pieces(prompt: str, references: int, enable_thinking: bool = True) -> tuple[str, ...]:
    """The pieces of a prompt: 1 without references, else references + 2.

    Args:
        prompt: The user's text, which is not changed.
        references: Number of reference images.
        enable_thinking: False appends an empty `<think>` block, as in `text.prompt.render`.
    """
    text = render(prompt, template=template(references, enable_thinking))
    if not references:
        return (text,)
    return (FIRST, *[BETWEEN] * (references - 1), text, LAST)


def piece_ids(
    tokenizer: Tokenizer,
    prompt: str,
    references: int,
    max_sequence_length: int,
    enable_thinking: bool = True,
) -> dict[str, list[int]]:
    """Each different piece of a prompt with its token ids.

    Args:
        tokenizer: Tokenizer of the text encoder.
        prompt: The user's text.
        references: Number of reference images.
        max_sequence_length: Most ids of each piece; it is cut on the right, as in diffusers, and a warning
            shows what the prompt loses.
        enable_thinking: As for `pieces`.

    Raises:
        BadArgument: The prompt or the limit is out of range.
        Unsupported: The tokenizer lacks the tokens that stand around an image.
    """
    check_template_tokens(tokenizer.added_tokens)
    for token in (START, END) if references else ():
        if token not in tokenizer.added_tokens:
            raise Unsupported(
                f"reference_images: the tokenizer has no token {token}, which stands beside each image; use "
                "the tokenizer of the Qwen3 text encoder"
            )
    own = template(references, enable_thinking)
    found = {}
    for piece in pieces(prompt, references, enable_thinking):
        if piece in (FIRST, BETWEEN, LAST):
            found[piece] = tokenizer.encode(piece)[:max_sequence_length]
        else:
            found[piece] = prompt_ids(tokenizer, prompt, max_sequence_length, enable_thinking, own)
    return found
