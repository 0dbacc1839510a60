"""Options of the verbs that load a pipeline: the model, the image and the prompts, and what they become."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from zimage_core.cli.hardware import device_options, settle_threads
from zimage_core.cli.messages import say
from zimage_core.config import COMPONENTS
from zimage_core.errors import BadArgument, BadFile, printable
from zimage_core.sampling.samplers import SAMPLERS, SCHEDULES

if TYPE_CHECKING:
    from zimage_core.pipeline import ZImagePipeline

DTYPES = ("auto", "float32", "float16", "bfloat16")
COMPUTE = ("exact", "bfloat16", "int8", "auto")
"""`quant.arithmetic.MODES`, which a parser does not import."""
MAX_PROMPT_FILE = 16 << 20


def add_model(
    parser: argparse.ArgumentParser, without: tuple[str, ...] = (), compute: str = "auto"
) -> argparse._ArgumentGroup:
    """Options that name a model and where it computes.

    Args:
        parser: The verb's parser.
        without: Parts that the verb names itself.
        compute: Default of --compute: "exact" for verbs that judge weights.
    """
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="DIR",
        help="folder, repository org/repo[:Q4_K_M], or default, the model inside the package",
    )
    model.add_argument("--variant", metavar="NAME", help="of the files in DIR, such as fp16 (default: none)")
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
    add_compute(model, compute)
    model.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 ... (default: auto)"
    )
    model.add_argument(
        "--vram", metavar="BYTES", help="limit of GPU memory: 6GiB, auto, least; see `zimage plan`"
    )
    model.add_argument("--ram", metavar="BYTES", help="limit of host memory, such as 4GiB")
    return model


def add_compute(group: argparse._ActionsContainer, default: str = "auto") -> None:
    """The option --compute."""
    group.add_argument(
        "--compute",
        choices=COMPUTE,
        default=default,
        help="how the blocks multiply: exact, by the weights as the file has them; bfloat16 or int8, faster, "
        "by rounded weights and activations; auto, int8 for a large transformer with packed weights "
        f"if the device gains over 1.5 times, else exact (default: {default})",
    )


def add_image(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Options of size, steps and guidance, each stored under the name that the pipeline's call gives it."""
    image = parser.add_argument_group("image")
    for letter, side in (("-W", "width"), ("-H", "height")):
        text = "pixels (default: the model's own size)"
        image.add_argument(letter, f"--{side}", type=int, metavar="N", help=text)
    image.add_argument(
        "--steps",
        dest="num_inference_steps",
        type=int,
        metavar="N",
        help="denoising steps (default: the model's own, Turbo 8)",
    )
    scale = image.add_mutually_exclusive_group()
    scale.add_argument(
        "--guidance",
        dest="guidance_scale",
        type=float,
        metavar="X",
        help="guidance scale, 0 is none (default: the model's)",
    )
    scale.add_argument(
        "--cfg", type=float, metavar="X", help="the same counted from 1, as in ComfyUI: guidance + 1"
    )
    image.add_argument(
        "--shift",
        type=float,
        metavar="X",
        help="shift of the noise levels: 3 for Turbo, 6 for the base model, whose loose files do not say so "
        "(default: the model's, else 3)",
    )
    image.add_argument(
        "--sampler",
        choices=tuple(SAMPLERS),
        help="method of the steps (default: euler); heun runs twice a step",
    )
    image.add_argument("--schedule", choices=SCHEDULES, help="grid of the noise levels (default: linear)")
    image.add_argument(
        "--variety", type=float, metavar="X", help="let images of one prompt differ more; 0.1 is usual"
    )
    image.add_argument(
        "--negative", dest="negative_prompt", metavar="TEXT", help="what not to draw; only with guidance"
    )
    image.add_argument(
        "--max-length",
        dest="max_sequence_length",
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
    add_model(parser, compute="exact")
    image = add_image(parser)
    image.add_argument("--seed", type=int, default=0, metavar="N", help="of the first image (default: 0)")
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", default=output, metavar="FILE", help=f"default: {output}")
    group.add_argument("--partial", action="store_true", help="write the file as it grows")
    group.add_argument("--force", action="store_true", help="replace a file that exists")
    group.add_argument("--quiet", action="store_true", help="show no progress")
    return group


def given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The options among `names` that have a value, with their values."""
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def call_arguments(args: argparse.Namespace, prompts: Sequence[str]) -> dict[str, Any]:
    """The arguments of the pipeline's call, but for the prompt: each one that an option has a value for.

    Args:
        args: The options; those of the call have its argument names.
        prompts: The prompts, one of them for each call.

    Raises:
        BadArgument: The call would refuse an argument, after the model is loaded.
    """
    # these import torch, which a parser does not wait for
    from zimage_core.run import checks
    from zimage_core.run.beforehand import check_numbers
    from zimage_core.run.request import Request

    call = given(args, (field.name for field in fields(Request)))
    check_numbers(call)
    for prompt in (*prompts, call.get("negative_prompt", "")):
        checks.prompts("prompt", prompt)
    return call


def check_model(args: argparse.Namespace) -> None:
    """Refuse some networks without the others, before anything is loaded."""
    parts = given(args, COMPONENTS)
    if args.model is None and 0 < len(parts) < len(COMPONENTS):
        missing = [name for name in COMPONENTS if name not in parts]
        raise BadArgument(
            f"{' and '.join(map(option, parts))} alone cannot draw: "
            f"give {' and '.join(map(option, missing))} too, or --model FOLDER"
        )
    if args.variant is not None and args.model is None:
        raise BadArgument("--variant goes with --model: it chooses among the files of a folder")
    if args.tokenizer is not None and args.model is None and not parts:
        raise BadArgument("--tokenizer goes with --model or with the files of the three networks")


def option(name: str) -> str:
    """The option that names the file of a part: --text-encoder."""
    return "--" + name.replace("_", "-")


def load_pipeline(args: argparse.Namespace, fit: bool = False) -> ZImagePipeline:
    """The pipeline that the options of `add_model` name; without any the embedded model.

    Args:
        args: The options.
        fit: Whether weights may be streamed to a GPU that was not asked for and has too little memory.
    """
    pipeline = _loaded(args, device_options(args, fit))
    if args.own_process:
        settle_threads(pipeline, args)
    if args.compute == "auto" and pipeline.compute != "exact" and not args.quiet:
        from zimage_core.nn.compute import automatic

        reason = automatic(pipeline.transformer, pipeline.device)[1]
        say(f"compute: {pipeline.compute}, {reason}; --compute exact rounds nothing")
    return pipeline


def _loaded(args: argparse.Namespace, options: dict[str, Any]) -> ZImagePipeline:
    from zimage_core.pipeline import ZImagePipeline

    if args.dtype != "auto":
        options["dtype"] = args.dtype
    options["compute"] = args.compute
    parts = given(args, (*COMPONENTS, "tokenizer", "siglip"))
    if args.model is not None:
        return ZImagePipeline.from_pretrained(args.model, **parts, **options, variant=args.variant)
    if not parts:
        if getattr(args, "reference_images", None):
            options["omni"] = True
        return ZImagePipeline.from_default(**options)
    return ZImagePipeline.from_files(**parts, **options)


def read_prompts(name: str) -> list[str]:
    """Prompts of a file, one a line, without the white space around them; empty lines are passed over."""
    from zimage_core.files.untrusted import lines

    prompts = [line.strip() for line in lines(read_text(name)) if line.strip()]
    if not prompts:
        raise BadArgument(f"--prompts {printable(name)}: no prompt in it; one a line was expected")
    return prompts


def read_prompt(text: str) -> str:
    """The prompt itself, or for "-" what standard input holds, without the end of its last line."""
    if text != "-":
        return text
    found = read_text("-").rstrip("\r\n")
    if not found:
        raise BadArgument("standard input is empty; a prompt was expected there")
    return found


def read_text(name: str) -> str:
    """Text of a file, or of standard input for "-", in UTF-8."""
    from zimage_core.files.untrusted import decode_text, read_file

    if name == "-":
        data = sys.stdin.buffer.read(MAX_PROMPT_FILE + 1)
        name = "standard input"
    else:
        data = read_file(name)
    if len(data) > MAX_PROMPT_FILE:
        raise BadFile(name, f"holds more than {MAX_PROMPT_FILE >> 20} MiB of prompts")
    return decode_text(name, data)
