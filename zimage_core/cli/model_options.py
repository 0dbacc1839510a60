"""What the verbs that load a pipeline have in common: options that name a model, and prompts from a file."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from zimage_core.config import COMPONENTS
from zimage_core.errors import BadArgument, BadFile, printable

if TYPE_CHECKING:
    import torch

    from zimage_core.pipeline import ZImagePipeline

DTYPES = ("auto", "float32", "float16", "bfloat16")
MAX_PROMPT_FILE = 16 << 20
MAX_WARNING = 100_000
"""Characters of a warning: one on a cut prompt shows all that is lost before it says what to do."""


def add_model(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> argparse._ArgumentGroup:
    """Options that name a model and where it computes.

    Args:
        parser: The verb's parser.
        without: Parts that the verb names itself.
    """
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="DIR", help="model folder, or a repository org/repo[:Q4_K_M]")
    files = {"transformer": "GGUF or safetensors", "text_encoder": "GGUF or safetensors"}
    for part, text in {**files, "vae": "safetensors or GGUF"}.items():
        if part not in without:
            model.add_argument(option(part), metavar="FILE", help=text)
    model.add_argument(
        "--tokenizer", metavar="FILE", help="file or folder, where the text encoder brings none"
    )
    model.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="arithmetic of the networks (default: auto)"
    )
    model.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cpu)")
    model.add_argument(
        "--vram", metavar="BYTES", help="limit of GPU memory: 6GiB, auto, least; see `zimage plan`"
    )
    model.add_argument("--ram", metavar="BYTES", help="limit of host memory, such as 4GiB")
    return model


def add_image(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Options of size, steps and guidance."""
    image = parser.add_argument_group("image")
    for letter, side in (("-W", "width"), ("-H", "height")):
        text = "pixels (default: the model's own size)"
        image.add_argument(letter, f"--{side}", type=int, metavar="N", help=text)
    image.add_argument(
        "--steps", type=int, metavar="N", help="denoising steps (default: the model's own, Turbo 8)"
    )
    scale = image.add_mutually_exclusive_group()
    scale.add_argument(
        "--guidance", type=float, metavar="X", help="guidance scale, 0 is none (default: the model's)"
    )
    scale.add_argument(
        "--cfg", type=float, metavar="X", help="the same counted from 1, as in ComfyUI: guidance + 1"
    )
    image.add_argument("--negative", metavar="TEXT", help="what not to draw; only with guidance")
    image.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="prompt tokens that are read, template included, up to 1504 (default: 512)",
    )
    return image


def add_study(parser: argparse.ArgumentParser, output: str) -> argparse._ArgumentGroup:
    """Options of a verb that watches images of many prompts being drawn and writes one file.

    Args:
        parser: The verb's parser.
        output: Name of the file, where none is given.

    Returns:
        The group of the output's options.
    """
    parser.add_argument(
        "--prompts", required=True, metavar="FILE", help="a prompt a line, UTF-8; - is standard input"
    )
    add_model(parser)
    image = add_image(parser)
    image.add_argument("--seed", type=int, default=0, metavar="N", help="of the first image (default: 0)")
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", default=output, metavar="FILE", help=f"default: {output}")
    group.add_argument("--partial", action="store_true", help="write the file as it grows")
    group.add_argument("--force", action="store_true", help="replace a file that exists")
    group.add_argument("--quiet", action="store_true", help="show no progress")
    return group


def image_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline's call that `add_image` has values for."""
    options = {
        "height": args.height,
        "width": args.width,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "cfg": args.cfg,
        "negative_prompt": args.negative,
        "max_sequence_length": args.max_length,
    }
    return {name: value for name, value in options.items() if value is not None}


def check_model(args: argparse.Namespace) -> None:
    """Refuse some networks without the others, before anything is loaded."""
    given = [name for name in COMPONENTS if getattr(args, name) is not None]
    if args.model is None and 0 < len(given) < len(COMPONENTS):
        missing = [name for name in COMPONENTS if name not in given]
        raise BadArgument(
            f"{' and '.join(map(option, given))} alone cannot draw: "
            f"give {' and '.join(map(option, missing))} too, or --model FOLDER"
        )
    if args.tokenizer is not None and args.model is None and not given:
        raise BadArgument("--tokenizer goes with --model or with the files of the three networks")


def option(name: str) -> str:
    """The option of a part."""
    return "--" + name.replace("_", "-")


def load_pipeline(args: argparse.Namespace) -> ZImagePipeline:
    """The pipeline that the options of `add_model` name; without any the embedded model."""
    from zimage_core.pipeline import ZImagePipeline

    options: dict[str, Any] = {}
    if args.dtype != "auto":
        options["torch_dtype"] = _dtype(args.dtype)
    if args.device is not None:
        options["device"] = args.device
    for name in ("vram", "ram"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    parts = {
        name: getattr(args, name) for name in (*COMPONENTS, "tokenizer") if getattr(args, name) is not None
    }
    if args.model is not None:
        return ZImagePipeline.from_pretrained(args.model, **parts, **options)
    if not parts:
        return ZImagePipeline.from_default(**options)
    return ZImagePipeline.from_files(**parts, **options)


def _dtype(name: str) -> torch.dtype:
    import torch

    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def read_prompts(name: str) -> list[str]:
    """Prompts of a file, one a line; empty lines are passed over."""
    prompts = [line.strip() for line in read_text(name).splitlines() if line.strip()]
    if not prompts:
        raise BadArgument(f"--prompts {printable(name)}: no prompt in it; one a line was expected")
    return prompts


def read_text(name: str) -> str:
    """Text of a file, or of standard input for "-", in UTF-8."""
    if name == "-":
        data = sys.stdin.buffer.read(MAX_PROMPT_FILE + 1)
        name = "standard input"
    else:
        from zimage_core.files.untrusted import read_file

        data = read_file(name)
    if len(data) > MAX_PROMPT_FILE:
        raise BadFile(name, f"holds more than {MAX_PROMPT_FILE >> 20} MiB of prompts")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadFile(name, f"is not text in UTF-8: byte {error.start} is invalid") from None


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Warnings of the library appear as one line each on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # whatever PYTHONWARNINGS says: a warning is a line, not an error
        warnings.showwarning = _show_warning
        yield


def _show_warning(message: Warning | str, category: type[Warning], *rest: object, **named: object) -> None:
    """A warning of the library as one line; those of other packages are for developers."""
    if issubclass(category, UserWarning):
        sys.stderr.write(f"warning: {printable(message, MAX_WARNING)}\n")
