"""`zimage generate PROMPT`: images from a prompt."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from zimage_core.cli import ranks
from zimage_core.cli.adapters import add_lora, load_loras, read_loras
from zimage_core.cli.control import add_control, load_controlnets, read_controlnets
from zimage_core.cli.model_options import (
    add_image,
    add_model,
    call_arguments,
    check_model,
    load_pipeline,
    read_prompt,
    read_prompts,
)
from zimage_core.cli.progress import Progress
from zimage_core.cli.references import add_references, check_references
from zimage_core.cli.writing import add_writing, read_writing, refuse_writing
from zimage_core.errors import BadArgument, printable
from zimage_core.files.atomic import check_destination, write_atomically
from zimage_core.files.units import in_bytes

if TYPE_CHECKING:
    from zimage_core.pipeline import ZImagePipeline
    from zimage_core.run.result import ZImageResult

MAX_COUNT = 100_000
_EPILOG = """\
Without a model, or with --model default, the one inside the package is used.
PROMPT - reads one prompt from standard input; --prompts FILE makes images of every line of a file.
Image i of a run is made from seed + i, so `--seed` of its settings makes it again alone.
With --enhance all images of a prompt are made from what was written with the first seed; to make one again,
give the prompt in its settings, without --enhance.
"""


def add_parser(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "generate",
        parents=[common],
        help="make images from a prompt",
        description="Make images from a prompt and write them as PNG.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "text", nargs="?", metavar="PROMPT", help="what to draw; - reads it from standard input"
    )
    parser.add_argument("--prompt", dest="named_text", metavar="TEXT", help="the same as PROMPT")
    parser.add_argument("--prompts", metavar="FILE", help="a prompt a line, UTF-8; - is standard input")
    parser.add_argument(
        "--enhance", action="store_true", help="let the text encoder write each prompt anew, and show it"
    )
    model = add_model(parser)
    add_lora(model)
    model.add_argument(
        "--guidance-ranks", type=int, choices=(1, 2), metavar="N",
        help="under torchrun: 2 gives each half of the ranks one side of guidance, 1 all ranks both "
        "(default: 2 with guidance and an even number of ranks)",
    )  # fmt: skip
    model.add_argument(
        "--profile",
        metavar="FILE",
        help="with a limit: write a page of HTML that shows when weights moved",
    )
    add_writing(parser)
    image = add_image(parser)
    image.add_argument("--seed", type=int, metavar="N", help="0 to 2^64-1 (default: drawn, and printed)")
    image.add_argument(
        "-n", "--count", type=int, default=1, metavar="N", help="images of each prompt (default: 1)"
    )
    _add_editing(parser)
    add_control(parser)
    add_references(parser, model)
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o", "--output", metavar="FILE", help="PNG, or a folder with / (default: zimage-SEED.png here)"
    )
    output.add_argument("--force", action="store_true", help="replace files that exist")
    output.add_argument(
        "--no-metadata", action="store_true", help="write no prompt and settings into the PNG"
    )
    output.add_argument(
        "--preview",
        metavar="PNG",
        help="write a quick look at the image after each step, in place of the last",
    )
    output.add_argument(
        "--taef1", metavar="FILE", help="draw --preview by this decoder, safetensors of TAEF1"
    )
    output.add_argument("--json", action="store_true", help="print settings, times and memory as JSON")
    output.add_argument("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=run)


def _add_editing(parser: argparse.ArgumentParser) -> None:
    editing = parser.add_argument_group(
        "editing", "Begin from an image; docs/guides/editing.md has examples."
    )
    editing.add_argument("--image", metavar="FILE", help="image to begin from")
    editing.add_argument(
        "--strength", type=float, metavar="X",
        help="share of the noise levels it goes through, above 0, up to 1 (default: 0.6; 1 with a mask)",
    )  # fmt: skip
    editing.add_argument(
        "--mask", dest="mask_image", metavar="FILE", help="where to paint anew: white; black stays to the bit"
    )
    editing.add_argument(
        "--mask-blur", type=float, metavar="N", help="pixels outside of the mask to blend over"
    )
    editing.add_argument(
        "--outpaint",
        type=_margins,
        metavar="L,T,R,B",
        help="pixels to paint around the image, such as 64,0,64,0",
    )
    editing.add_argument(
        "--hires", type=float, metavar="SCALE",
        help="make the image, enlarge it by SCALE, paint it anew; --strength says how much (default: 0.6)",
    )  # fmt: skip


def _margins(text: str) -> tuple[int, ...]:
    """The argument of --outpaint."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() and len(part) < 8 for part in parts):
        raise argparse.ArgumentTypeError(
            f"got {printable(text, 40)!r}, wanted four numbers such as 64,0,64,0"
        )
    return tuple(int(part) for part in parts)


def run(args: argparse.Namespace) -> int:
    """Check what can be checked, load, draw, write."""
    prompts = ranks.share(lambda: _prompts(args))
    if args.seed is None:
        args.seed = ranks.share(lambda: secrets.randbelow(2**32))
    call = call_arguments(args, prompts)
    _check(args, len(prompts))
    _check_editing(args, call)
    check_references(args, call)
    writing = _writing(args, prompts)
    loras, nets = read_loras(args.lora), read_controlnets(args, call)
    names = [Path(name) for name in ranks.share(lambda: _checked_names(args, len(prompts) * args.count))]

    records: list[dict[str, Any]] = []
    try:
        _make(args, prompts, call, names, records, loras, nets, writing)
    finally:  # what was written before a failure is reported too
        if args.json and ranks.first():
            sys.stdout.write(json.dumps(records, indent=2) + "\n")
    return 0


def _make(
    args: argparse.Namespace,
    prompts: list[str],
    call: dict[str, Any],
    names: list[Path],
    records: list[dict[str, Any]],
    loras: list[tuple[str, float]],
    nets: list[str | Path],
    writing: dict[str, Any],
) -> None:
    """Load the model, draw image after image, write each before the next and add its record."""
    progress = Progress(quiet=args.quiet)
    pipeline = load_pipeline(args, fit=True)
    ranks.parallelize(pipeline, args)
    show = _previewer(args, pipeline) if ranks.first() else None

    def on_step(pipe: Any, step: int, _timestep: object, tensors: dict[str, Any]) -> None:
        progress.step(step + 1, pipe.num_timesteps)
        if show is not None:
            show(tensors["denoised"])

    load_loras(pipeline, loras)
    load_controlnets(pipeline, nets)
    call["callback_on_step_end"] = on_step
    draw = pipeline if args.hires is None else partial(pipeline.hires, scale=args.hires)
    call["callback_on_step_end_tensor_inputs"] = ("denoised",) if show is not None else ()
    for number, path in enumerate(names):
        if args.enhance and number % args.count == 0:
            written = partial(_enhanced, pipeline, prompts[number // args.count], writing, progress)
            prompts[number // args.count] = ranks.share(written)
        progress.start(f"image {number + 1}/{len(names)}" if len(names) > 1 else "drawing")
        call["seed"] = (args.seed + number) % 2**64
        result = cast("ZImageResult", draw(prompts[number // args.count], **call))
        progress.finish()
        if not ranks.first():
            continue
        result.save(path, force=args.force, metadata=not args.no_metadata)
        if args.profile is not None and result.memory is not None:
            result.memory.save_timeline(args.profile, overwrite=args.force)
        records.append(_record(result, path))
        if not args.json:
            sys.stdout.write(f"{printable(path, 4096)}\n")
            sys.stdout.flush()
        if not args.quiet:
            progress.say(_summary(result))
            for line in result.memory.summary() if result.memory is not None else ():
                progress.say(line)


def _writing(args: argparse.Namespace, prompts: list[str]) -> dict[str, Any]:
    """The arguments of `enhance_prompt`, checked; none without --enhance, which they then need."""
    if not args.enhance:
        refuse_writing(args)
        return {}
    from zimage_core.language.enhance import Wish

    writing = {**read_writing(args), "seed": args.seed}
    for prompt in prompts:
        Wish.of(prompt, **writing)
    return writing


def _enhanced(pipeline: ZImagePipeline, prompt: str, writing: dict[str, Any], progress: Progress) -> str:
    """The prompt that the text encoder writes; it is shown, since it is what is drawn."""
    progress.start("writing the prompt")
    found = pipeline.enhance_prompt(prompt, **writing)
    progress.finish()
    progress.say(f"prompt: {printable(found, 10 * len(found))}")
    return found


def _previewer(args: argparse.Namespace, pipeline: ZImagePipeline) -> Callable[[Any], None] | None:
    """The function that writes --preview from latents; None without the option."""
    if args.preview is None:
        return None
    from zimage_core.files.png import encode
    from zimage_core.preview import Preview

    preview = Preview(pipeline, args.taef1)
    return lambda latents: write_atomically(args.preview, encode(preview(latents)), overwrite=True)


def _check_preview(args: argparse.Namespace, names: list[Path]) -> None:
    """Refuse a preview that cannot be written, or would take the place of an image."""
    if args.preview is None:
        if args.taef1 is not None:
            raise BadArgument("--taef1 goes with --preview PNG: it draws previews, the VAE draws images")
        return
    check_destination(args.preview, overwrite=args.force)
    if Path(args.preview).suffix.lower() != ".png":
        raise BadArgument(f"--preview {printable(args.preview)}: wanted a name that ends in .png")
    if Path(args.preview).resolve() in {name.resolve() for name in names}:
        raise BadArgument(f"--preview {printable(args.preview)}: this is the name of an image, give another")
    # --force allows to replace an image, but not the one that is being edited, by a rough look at another
    read = (args.image, args.mask_image, *(args.control_image or ()), *(args.reference_images or ()))
    if Path(args.preview).resolve() in {Path(name).resolve() for name in read if name is not None}:
        raise BadArgument(f"--preview {printable(args.preview)}: the run reads this file, give another name")


def _prompts(args: argparse.Namespace) -> list[str]:
    if [args.text, args.named_text, args.prompts].count(None) != 2:
        raise BadArgument("give one prompt, or - to read it from standard input, or --prompts FILE")
    if args.prompts is not None:
        return read_prompts(args.prompts)
    return [read_prompt(args.named_text if args.text is None else args.text)]


def _check(args: argparse.Namespace, prompts: int) -> None:
    """Refuse options that do not go together, for a number of prompts."""
    from zimage_core.run.checks import whole

    whole("count", args.count, 1, MAX_COUNT)
    if args.guidance_ranks is not None and not ranks.launched():
        raise BadArgument("--guidance-ranks goes with torchrun --nproc-per-node N -m zimage_core generate")
    if args.profile is not None:
        if args.vram is None and args.ram is None:
            raise BadArgument("--profile: without --vram or --ram nothing is moved; give one of them")
        if prompts * args.count > 1:
            raise BadArgument("--profile shows one run; ask for one image")
        check_destination(args.profile, args.force)
    check_model(args)


def _check_editing(args: argparse.Namespace, call: dict[str, Any]) -> None:
    """Refuse an image that cannot be read, and options that lack another, before anything is loaded."""
    from zimage_core.run import edits
    from zimage_core.run.request import Request

    request = Request(**call)
    if args.hires is not None:
        from zimage_core.run.checks import real
        from zimage_core.run.image_calls import MAX_SCALE

        real("--hires", args.hires, 1, MAX_SCALE)
        for name in ("image", "mask_image", "outpaint"):
            if name in call:
                raise BadArgument(f"--hires makes its own image; leave --{name.partition('_')[0]} out")
        request = Request(**{name: value for name, value in call.items() if name != "strength"})
    edits.check(request)
    for name in ("image", "mask_image"):
        if name in call:
            from zimage_core.editing.images import open_images

            open_images(call[name], f"--{name.partition('_')[0]}")


def _checked_names(args: argparse.Namespace, count: int) -> list[str]:
    """Where the images go, in order, once all that is written is known to be allowed."""
    names = _names(args, count)
    for name in names:
        check_destination(name, overwrite=args.force)
    _check_preview(args, names)
    return [str(name) for name in names]


def _names(args: argparse.Namespace, count: int) -> list[Path]:
    """Where the images go, in order."""
    if args.output is None or args.output.endswith("/") or Path(args.output).is_dir():
        folder = Path(args.output or ".")
        with suppress(FileExistsError):  # a file of that name is refused with the images' names
            folder.mkdir(parents=True, exist_ok=True)
        return [_free(folder, f"zimage-{(args.seed + i) % 2**64}", args.force) for i in range(count)]
    target = Path(args.output)
    if target.suffix.lower() != ".png":
        hint = f"use {printable(target.with_suffix('.png'))}, or {printable(args.output)}/ for a new folder"
        raise BadArgument(f"--output {printable(args.output)}: images are written as PNG; {hint}")
    if count == 1:
        return [target]
    digits = len(str(count))
    return [target.with_name(f"{target.stem}-{i + 1:0{digits}}{target.suffix}") for i in range(count)]


def _free(folder: Path, stem: str, force: bool) -> Path:
    """The first path that is not taken: STEM.png, STEM-2.png and so on; STEM.png with `force`."""
    path, number = folder / f"{stem}.png", 1
    while not force and os.path.lexists(path):
        number += 1
        path = folder / f"{stem}-{number}.png"
    return path


def _record(result: ZImageResult, path: Path) -> dict[str, Any]:
    """What --json prints of one image."""
    timings = result.timings
    return {
        "path": str(path),
        "seed": result.seed,
        "settings": result.metadata(),
        "sigmas": list(result.sigmas),
        "seconds": {
            "encode": timings.encode,
            "steps": list(timings.steps),
            "decode": timings.decode,
            "total": timings.total,
        },
        "peak_memory_bytes": result.peak_memory,
    }


def _summary(result: ZImageResult) -> str:
    timings = result.timings
    steps = sum(timings.steps)
    pace = f", {steps / len(timings.steps):.2f} s a step" if timings.steps else ""
    return (
        f"seed {result.seed}: text {timings.encode:.2f} s, {len(timings.steps)} steps {steps:.2f} s{pace}, "
        f"decoding {timings.decode:.2f} s, memory {in_bytes(result.peak_memory)}"
    )
