"""Options of how a prompt is written anew, which `zimage enhance` and `generate --enhance` share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zimage_core.cli.model_options import given, read_text
from zimage_core.errors import BadArgument

NUMBERS = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens")


def add_writing(parser: argparse.ArgumentParser) -> None:
    """Add the options; one that is not given is None, or False."""
    writing = parser.add_argument_group(
        "writing", "How a prompt is written anew; docs/guides/enhance.md has more."
    )
    writing.add_argument(
        "--temperature", type=float, metavar="X",
        help="0 takes the most likely token each time (default: 0.6, without thinking 0.7)",
    )  # fmt: skip
    writing.add_argument(
        "--top-p", type=float, metavar="X",
        help="share of the probability to choose from (default: 0.95, without thinking 0.8)",
    )  # fmt: skip
    writing.add_argument("--top-k", type=int, metavar="N", help="tokens to choose from (default: 20)")
    writing.add_argument("--min-p", type=float, metavar="X", help="least probability, by the most likely one")
    writing.add_argument(
        "--max-new-tokens", type=int, metavar="N",
        help="most tokens to write, thought included (default: 1024)",
    )  # fmt: skip
    writing.add_argument("--no-think", action="store_true", help="answer without a thought")
    writing.add_argument("--keep-thought", action="store_true", help="put the thought before the prompt")
    writing.add_argument(
        "--instructions", metavar="TEXT", help="what to do with the prompt, or a file that says it"
    )


def read_writing(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `enhance_prompt` that the options give, but for the seed.

    Raises:
        BadArgument, BadFile: The file of --instructions cannot be read.
    """
    call = {**given(args, NUMBERS), "think": not args.no_think, "keep_thought": args.keep_thought}
    return {**call, "instructions": _instructions(args.instructions)}


def refuse_writing(args: argparse.Namespace) -> None:
    """Refuse options of writing where no prompt is written.

    Raises:
        BadArgument: One was given; the message names it.
    """
    for name in (*NUMBERS, "no_think", "keep_thought", "instructions"):
        if getattr(args, name) not in (None, False):
            raise BadArgument(f"--{name.replace('_', '-')}: it says how --enhance writes a prompt; give both")


def _instructions(given_text: str | None) -> str | None:
    """The text of --instructions, or that of the file that it names."""
    if given_text is None:
        return None
    try:
        exists = Path(given_text).exists()
    except (OSError, ValueError):  # a text that no file can be named
        exists = False
    named = given_text.lower().endswith((".txt", ".md")) and len(given_text.split()) == 1  # and misspelt
    return read_text(given_text) if given_text and (exists or named) else given_text
