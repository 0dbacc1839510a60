"""The prompt string of Z-Image's text encoder and its token ids.

The string is Qwen3's chat template with one user message and the beginning of the answer, written out here.
No template language is evaluated, and no template is read from a file.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection

from zimage_core.config import TransformerConfig
from zimage_core.errors import BadArgument, Unsupported, printable
from zimage_core.text.tokenizer import Tokenizer, check_text

TEMPLATE = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
NO_THINKING = "<think>\n\n</think>\n\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""The same string in Jinja, for other programs that read a saved tokenizer; it is never evaluated here."""
TEMPLATE_TOKENS = ("<|im_start|>", "<|im_end|>")

MAX_PROMPT_BYTES = 16 * 1024
DEFAULT_LENGTH = 512
MAX_LENGTH = TransformerConfig().max_caption
"""Most tokens of a prompt, template included: 1504."""


def render(prompt: str, enable_thinking: bool = True, template: str | None = None) -> str:
    """Insert a prompt into the template; the result is the string that is tokenised.

    The prompt is not changed: it is not stripped, and `<think>...</think>` and control tokens in it stay.

    Args:
        prompt: The user's text; may be empty.
        enable_thinking: False appends an empty `<think>` block; the model was trained with True.
        template: Text that contains `{prompt}` exactly once; `enable_thinking` then has no effect. "{prompt}"
            gives the bare prompt. None is Qwen3's template.

    Raises:
        BadArgument: The template does not contain `{prompt}` exactly once.
    """
    if template is None:
        template = TEMPLATE if enable_thinking else TEMPLATE + NO_THINKING
    check_text(template, "template")
    if template.count("{prompt}") != 1:
        raise BadArgument(f"template holds {{prompt}} {template.count('{prompt}')} times, once was expected")
    return template.replace("{prompt}", prompt)


def check_prompt(prompt: str, max_bytes: int = MAX_PROMPT_BYTES, name: str = "prompt") -> None:
    """Refuse a prompt that must be a mistake, before any work is done with it.

    Args:
        prompt: The text.
        max_bytes: Most bytes of it in UTF-8.
        name: What the message calls it.

    Raises:
        BadArgument: The prompt is not a string, has more than `max_bytes` in UTF-8, or holds a NUL character
            or a lone surrogate.
    """
    check_text(prompt, name)
    size = len(prompt.encode())
    if size > max_bytes:
        raise BadArgument(f"the {name} has {size} bytes in UTF-8, the limit is {max_bytes}; shorten it")
    if "\0" in prompt:
        raise BadArgument(f"the {name} holds a NUL character at {prompt.index(chr(0))}; remove it")


def prompt_ids(
    tokenizer: Tokenizer,
    prompt: str,
    max_sequence_length: int = DEFAULT_LENGTH,
    enable_thinking: bool = True,
    template: str | None = None,
    max_prompt_bytes: int = MAX_PROMPT_BYTES,
) -> list[int]:
    """Token ids of a prompt in its template, tokenised as one string and cut on the right.

    As in diffusers, a prompt over the limit loses its own end and the end of the template. A UserWarning
    shows the text that is lost.

    Args:
        tokenizer: Tokenizer of the text encoder.
        prompt: The user's text; at most `max_prompt_bytes` in UTF-8.
        max_sequence_length: Most ids to return, template included; 1 to 1504.
        enable_thinking: False appends an empty `<think>` block, as in `render`.
        template: Text around `{prompt}`, as in `render`.
        max_prompt_bytes: Limit that guards against a file given as a prompt by mistake.

    Returns:
        At most max_sequence_length ids; empty only for an empty prompt in a bare template.

    Raises:
        BadArgument: The prompt, the template or the limit is out of range.
        Unsupported: The tokenizer lacks the tokens of Qwen3's template.
    """
    if type(max_sequence_length) is not int or not 1 <= max_sequence_length <= MAX_LENGTH:
        raise BadArgument(
            f"max_sequence_length is {printable(max_sequence_length, 40)}, a whole number in 1..{MAX_LENGTH}"
            " was expected"
        )
    check_prompt(prompt, max_prompt_bytes)
    if template is None:
        check_template_tokens(tokenizer.added_tokens)
    text = render(prompt, enable_thinking, template)
    ids = tokenizer.encode(text)
    if len(ids) > max_sequence_length:
        tail = render("", enable_thinking, template)[len(_head(template)) :]
        lost = tokenizer.decode(ids[max_sequence_length:])
        _warn_of_loss(lost, tail, len(ids), max_sequence_length)
    return ids[:max_sequence_length]


def check_template_tokens(added: Collection[str]) -> None:
    """Refuse a tokenizer that lacks the tokens of Qwen3's template.

    Raises:
        Unsupported: A token is not among the added ones.
    """
    for token in TEMPLATE_TOKENS:
        if token not in added:
            raise Unsupported(
                f"the tokenizer has no token {token}, which Z-Image's prompt template needs; use the"
                " tokenizer of the Qwen3 text encoder (a vocab.json with merges.txt needs its"
                " tokenizer_config.json or added_tokens.json beside it), or give template="
            )


def _head(template: str | None) -> str:
    return (TEMPLATE if template is None else template).partition("{prompt}")[0]


def _warn_of_loss(lost: str, tail: str, found: int, limit: int) -> None:
    if len(lost) > len(tail):
        what = f"this text of it is lost: '{printable(lost.removesuffix(tail), MAX_PROMPT_BYTES)}'"
    else:
        what = "the end of the template is lost"
    warnings.warn(
        f"the prompt has {found} tokens with its template, the limit is {limit}, and {what}; shorten the"
        f" prompt or raise max_sequence_length (up to {MAX_LENGTH})",
        UserWarning,
        stacklevel=3,
    )
