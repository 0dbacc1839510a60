"""`zimage enhance PROMPT`: a prompt written anew by the language model that the text encoder is."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from time import perf_counter
from typing import TYPE_CHECKING, Any

from zimage_core.cli.hardware import device_options
from zimage_core.cli.messages import say
from zimage_core.cli.model_options import add_model, given, read_prompt
from zimage_core.cli.writing import add_writing, read_writing
from zimage_core.errors import BadArgument

if TYPE_CHECKING:
    from zimage_core.pipeline import ZImagePipeline

_EPILOG = """\
Only the text encoder is loaded: --text-encoder FILE, or that of --model. It must be a whole language model
with its last layer, such as Qwen3-4B-Q4_K_M.gguf.
The new prompt alone goes to standard output: zimage enhance "a cat" --text-encoder F | zimage generate -
"""


def add_parser(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "enhance",
        parents=[common],
        help="write a prompt anew with the text encoder",
        description="Write a prompt anew with the text encoder, which is a language model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("text", metavar="PROMPT", help="what to draw; - reads it from standard input")
    add_model(parser, without=("transformer", "vae"))
    parser.add_argument("--seed", type=int, metavar="N", help="0 to 2^64-1 (default: drawn, and printed)")
    add_writing(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--verbose", action="store_true", help="show on stderr what is written, as it comes")
    output.add_argument("--json", action="store_true", help="print prompt, thought and settings as JSON")
    output.add_argument("--quiet", action="store_true", help="show neither seed nor speed")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check, load, write, print."""
    from zimage_core.language.enhance import Wish

    prompt = read_prompt(args.text)
    if args.seed is None:
        args.seed = secrets.randbelow(2**32)
    call = {**read_writing(args), "seed": args.seed}
    Wish.of(prompt, **call)
    pipeline = _load(args)
    start = perf_counter()
    found = pipeline.enhance_prompt(prompt, **call, on_text=_show if args.verbose else None)
    seconds = perf_counter() - start
    if args.json:
        record = {
            "prompt": str(found), **found.settings, "thought": found.thought, "answer": found.answer,
            "tokens": found.tokens, "seconds": seconds,
        }  # fmt: skip
        sys.stdout.write(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        return 0
    sys.stdout.write(_plain(found) + "\n")
    if not args.quiet:
        sys.stdout.flush()
        say(f"seed {args.seed}: {found.tokens} tokens in {seconds:.1f} s")
    return 0


def _load(args: argparse.Namespace) -> ZImagePipeline:
    """A pipeline with no more than text encoder and tokenizer, or all of it where memory is limited."""
    from zimage_core.pipeline import ZImagePipeline

    options = {**device_options(args, fit=False), "compute": args.compute}
    if args.dtype != "auto":
        options["dtype"] = args.dtype
    limited = args.vram is not None or args.ram is not None
    parts = given(args, ("text_encoder", "tokenizer"))
    if args.model is not None:
        without: dict[str, Any] = {} if limited else {"transformer": None, "vae": None}
        return ZImagePipeline.from_pretrained(args.model, **without, **parts, **options, variant=args.variant)
    if args.text_encoder is None:
        return ZImagePipeline.from_default(**options)
    if limited:
        raise BadArgument("--vram and --ram plan for all networks of a pipeline: give --model FOLDER too")
    return ZImagePipeline.from_text_encoder(**parts, **options)


def _show(text: str, _is_thought: bool) -> None:
    sys.stderr.write(_plain(text))
    sys.stderr.flush()


def _plain(text: str) -> str:
    """Text of the model that is safe to show, on as many lines as it has."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
