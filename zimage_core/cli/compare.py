"""`zimage compare A B`: compare two transformers, or two settings, drawing the same images."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import TYPE_CHECKING, Any

from zimage_core.cli.beforehand import check_call
from zimage_core.cli.messages import say
from zimage_core.cli.model_options import (
    COMPUTE,
    DTYPES,
    add_image,
    add_model,
    call_arguments,
    check_model,
    load_pipeline,
    read_prompt,
    read_prompts,
)
from zimage_core.cli.progress import Progress
from zimage_core.config import COMPONENTS
from zimage_core.errors import BadArgument, printable
from zimage_core.files.atomic import check_destination, write_atomically
from zimage_core.files.units import in_seconds
from zimage_core.sampling.samplers import SAMPLERS

if TYPE_CHECKING:
    from zimage_core.study.comparison import Comparison

SAME = "default"
"""The word that names the transformer of --model, or the embedded one."""
MAX_SEEDS = 1000
_EPILOG = """\
A and B are transformer files; `default` is the transformer of --model or the embedded one. The other parts
are --model's, or --text-encoder and --vae, or the embedded ones. Give the same file twice, with --b-...
options, to compare settings. A is let go before B is loaded.
"""


def add_parser(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "compare",
        parents=[common],
        help="how far two checkpoints or settings are apart, with images",
        description="Draw the same images by A and B: errors per step and block, PSNR, SSIM, a report.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", help="transformer file of the reference, or default")
    parser.add_argument("b", metavar="B", help="transformer file that is judged, or default")
    words = parser.add_mutually_exclusive_group(required=True)
    words.add_argument("--prompt", dest="text", metavar="TEXT", help="what to draw; - is standard input")
    words.add_argument("--prompts", metavar="FILE", help="a prompt a line, UTF-8; - is standard input")
    add_model(parser, without=("transformer",), compute="exact")
    image = add_image(parser)
    image.add_argument("--seed", type=int, default=0, metavar="N", help="the first (default: 0)")
    image.add_argument(
        "-n", "--count", type=int, default=1, metavar="N", help="seeds for each prompt (default: 1)"
    )
    other = parser.add_argument_group("B alone")
    other.add_argument("--b-dtype", choices=DTYPES, help="arithmetic of B's networks")
    other.add_argument("--b-compute", choices=COMPUTE, help="numbers in which B's blocks multiply")
    other.add_argument("--b-steps", type=int, metavar="N", help="steps of B; only images are compared then")
    other.add_argument("--b-guidance", type=float, metavar="X", help="guidance scale of B")
    other.add_argument("--b-sampler", choices=tuple(SAMPLERS), help="sampler of B")
    other.add_argument("--b-text-encoder", metavar="FILE", help="text encoder of B")
    other.add_argument("--b-vae", metavar="FILE", help="VAE of B")
    output = parser.add_argument_group("output")
    output.add_argument("--report", metavar="FILE", help="write a page of HTML with charts and images")
    output.add_argument("--sheet", metavar="FILE", help="write a contact sheet as PNG")
    output.add_argument(
        "--block-steps", type=int, default=3, metavar="N", help="steps whose blocks are compared (default: 3)"
    )
    output.add_argument("--force", action="store_true", help="replace files that exist")
    output.add_argument("--json", action="store_true", help="print all figures as JSON")
    output.add_argument("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the arguments, compare, write the reports and print the figures."""
    prompts = [read_prompt(args.text)] if args.text is not None else read_prompts(args.prompts)
    call = call_arguments(args, prompts)
    _check(args)
    a = _side(args, args.a)
    changes = {"dtype": args.b_dtype, "compute": args.b_compute}
    b = _side(args, args.b, **changes, text_encoder=args.b_text_encoder, vae=args.b_vae)
    _check_outputs(args)

    from zimage_core.study.compare import check_shapes, compare

    of_call = {"num_inference_steps": args.b_steps, "guidance_scale": args.b_guidance,
               "sampler": args.b_sampler}  # fmt: skip
    later = {name: value for name, value in of_call.items() if value is not None}
    check_shapes(check_call(a, call, prompts), check_call(b, {**call, **later}, prompts))
    progress = Progress(quiet=args.quiet)
    progress.start("comparing")
    first = call.pop("seed")
    comparison = compare(
        lambda: load_pipeline(a),
        lambda: load_pipeline(b),
        prompts,
        [(first + i) % 2**64 for i in range(args.count)],
        labels=_labels(args),
        options_b=later,
        block_steps=args.block_steps,
        on_run=lambda done, total: progress.step(done, total, "runs", "a run"),
        **call,
    )
    progress.finish()
    _write(args, comparison)
    return 0


def _check(args: argparse.Namespace) -> None:
    from zimage_core.run import checks
    from zimage_core.sampling.schedule import MAX_STEPS

    checks.whole("count", args.count, 1, MAX_SEEDS)
    checks.whole("block_steps", args.block_steps, 0, MAX_SEEDS)
    if args.b_steps is not None:
        checks.whole("b_steps", args.b_steps, 1, MAX_STEPS)
    if args.b_guidance is not None:
        checks.real("b_guidance", args.b_guidance, 0, checks.MAX_GUIDANCE)
    if args.b_guidance is not None and args.cfg is not None:
        raise BadArgument("--b-guidance goes with --guidance; --cfg counts from 1")


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse reports that cannot be written, or whose names say something else."""
    for name, endings in (("report", (".html", ".htm")), ("sheet", (".png",))):
        path = getattr(args, name)
        if path is not None:
            check_destination(path, args.force)
            if not path.lower().endswith(endings):
                raise BadArgument(f"--{name} {printable(path)}: wanted a name that ends in {endings[0]}")


def _side(args: argparse.Namespace, transformer: str, **own: str | None) -> argparse.Namespace:
    """The options of `load_pipeline` for one of the two models: those of both, replaced by its own."""
    own_given = {name: value for name, value in own.items() if value is not None}
    side = argparse.Namespace(**{**vars(args), **own_given})
    side.transformer = None if transformer == SAME else transformer
    if side.model is None:
        from zimage_core.run.sources import embedded

        # `check_model` refuses an encoder without a VAE, and says what is missing
        alone = args.text_encoder is None and args.vae is None
        for name in COMPONENTS if alone else ("transformer",):
            if getattr(side, name) is None:
                setattr(side, name, str(embedded().paths[name]))
    check_model(side)
    return side


def _labels(args: argparse.Namespace) -> tuple[str, str]:
    """Labels of A and B: their files, and the options that differ for B."""
    options = ("b_dtype", "b_compute", "b_steps", "b_guidance", "b_sampler", "b_text_encoder", "b_vae")
    changed = [f"{name[2:]}={getattr(args, name)}" for name in options if getattr(args, name) is not None]
    return printable(args.a), printable(" ".join([args.b, *changed]))


def _write(args: argparse.Namespace, comparison: Comparison) -> None:
    from zimage_core.study import report

    if args.report is not None:
        write_atomically(args.report, report.html(comparison).encode(), args.force)
    if args.sheet is not None:
        write_atomically(args.sheet, report.sheet_png(comparison), args.force)
        for row in report.legend(comparison):
            say(f"{printable(args.sheet)}: {printable(row)}")
    text = json.dumps(comparison.to_json(), indent=2, ensure_ascii=False)
    sys.stdout.write((text if args.json else "\n".join(_lines(comparison))) + "\n")


def _lines(c: Comparison) -> list[str]:
    """The comparison as lines of text."""
    lines = [f"{label}: {in_seconds(time)}" for label, time in zip(c.labels, c.seconds, strict=True)]
    images = f"{len(c.images)} images" if len(c.images) > 1 else "1 image"
    velocity = "" if c.velocity is None else f", velocity error {c.velocity:.3%}"
    lines.append(f"{images}: PSNR {_db(c.psnr)}, SSIM {c.ssim:.4f}{velocity}")
    if c.steps:
        lines += ["", "step  noise level  velocity  latents"]
        lines += [f"{s.step + 1:4}  {s.sigma:11.3f}  {s.velocity:8.3%}  {s.latents:7.3%}" for s in c.steps]
    else:
        lines.append("steps and blocks were not compared: A and B have other noise levels, or not euler")
    if c.blocks:
        worst = max(c.blocks, key=lambda block: block.own)
        lines += ["", f"worst block: {worst.block}, {worst.own:.3%} of what it adds in step {worst.step + 1}"]
    return lines


def _db(value: float) -> str:
    return f"{value:.2f} dB" if math.isfinite(value) else "equal"
