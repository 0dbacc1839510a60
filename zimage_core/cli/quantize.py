"""`zimage quantize IN OUT`: make a GGUF of fewer bits, or int8 safetensors, from any checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from zimage_core.assets import named
from zimage_core.cli.progress import Progress
from zimage_core.errors import BadArgument
from zimage_core.files.atomic import check_destination
from zimage_core.files.units import in_bytes, in_seconds, parse_bytes

EPILOG = """types:
  Q8_0 Q6_K Q5_K_M Q5_K_S Q4_K_M Q4_K_S Q3_K_L Q3_K_M Q3_K_S Q2_K, Q4_0 Q4_1 Q5_0 Q5_1, F16 BF16,
  IQ4_NL IQ4_XS IQ3_M IQ3_S IQ3_XS IQ3_XXS IQ2_M IQ2_S IQ2_XS IQ2_XXS IQ1_M IQ1_S (slow to make),
  TQ1_0 TQ2_0 MXFP4 NVFP4; each is a mix: embedders, refiners and the final layer keep their floats.
  INT8_CONVROT (ComfyUI's, rotated) and INT8_ROW: int8 rows as NAME.safetensors.

examples:
  zimage quantize Z-Image-Turbo/ z-image-turbo-Q4_K_M.gguf --type Q4_K_M
  zimage quantize Z-Image-Turbo/ encoder.gguf --component text_encoder --type Q5_K_M
  zimage quantize Z-Image-Turbo/ turbo_int8_convrot.safetensors --type INT8_CONVROT
  zimage quantize turbo.safetensors turbo.gguf --size 3.5GB --imatrix turbo.imatrix.gguf
  zimage quantize turbo.safetensors turbo.gguf --fit 6GiB --sensitivity turbo.json

An interrupted run leaves OUT as it was. docs/guides/recipes.md has the recipes.
"""


def add_parser(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "quantize",
        parents=[common],
        help="make a GGUF of fewer bits, or an int8 file, from any checkpoint",
        description="Quantise a transformer or a text encoder, from any layout that is read here, into one "
        "GGUF with the names that diffusers, ComfyUI-GGUF and stable-diffusion.cpp read, or into one int8 "
        "safetensors file for ComfyUI. No GPU, memory for one tensor.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="IN", help="GGUF, safetensors, a folder, or default: the embedded model")
    add("out", metavar="OUT", help="the file to write: NAME.gguf, or NAME.safetensors for int8")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--type", metavar="NAME", help="a standard mix, such as Q4_K_M, or INT8_CONVROT")
    choice.add_argument("--recipe", metavar="FILE", help="lines of PATTERN [LAYERS] = TYPE")
    choice.add_argument("--size", metavar="BYTES", help="of the file: 3.5GB, 3.2GiB; types are chosen for it")
    choice.add_argument(
        "--fit",
        metavar="VRAM",
        help="6GiB: the size whose steps keep all weights there, at the size of -W -H",
    )
    add("-W", "--width", type=int, default=1024, metavar="N", help="for --fit (default: 1024)")
    add("-H", "--height", type=int, default=1024, metavar="N", help="for --fit (default: 1024)")
    add(
        "--sensitivity", metavar="FILE", help="measured costs for --size and --fit, from `zimage sensitivity`"
    )
    add("--write-recipe", metavar="FILE", help="write the chosen types as a recipe, too")
    add("--imatrix", metavar="FILE", help="importance matrix, from `zimage imatrix`")
    add("--variant", metavar="NAME", help="of the files in the folder IN, such as fp16 (default: none)")
    add(
        "--component",
        choices=("transformer", "text_encoder", "siglip"),
        help="of a folder or file with several; default: the transformer",
    )
    add("--force", action="store_true", help="replace OUT if it exists")
    add("--requantize", action="store_true", help="take a source that is quantised already; errors add up")
    add("--allow-nonfinite", action="store_true", help="take NaN as 0 and infinity as the largest number")
    add("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Quantise, and print one line about the file."""
    from zimage_core.export.mixes import INT8
    from zimage_core.export.quantizing import quantize_file
    from zimage_core.export.recipes import write_recipe

    if args.write_recipe is not None:
        if (args.type or "").upper() in INT8:
            raise BadArgument("--write-recipe: int8 rows follow no recipe; leave it out")
        check_destination(args.write_recipe, args.force)
        if Path(args.write_recipe).resolve() == Path(args.out).resolve():
            raise BadArgument("--write-recipe: names OUT itself; give the recipe another name")

    progress = Progress(args.quiet)
    progress.start("quantise")
    try:
        done = quantize_file(
            named(args.source),
            args.out,
            args.type,
            recipe=args.recipe,
            size=_size(args),
            sensitivity=args.sensitivity,
            imatrix=args.imatrix,
            component=args.component,
            variant=args.variant,
            overwrite=args.force,
            requantize=args.requantize,
            allow_nonfinite=args.allow_nonfinite,
            progress=progress.weights,
            log=progress.say,
        )
    finally:
        progress.finish()
    if args.write_recipe is not None:
        write_recipe(done.recipe, args.write_recipe, args.force)
    types = ", ".join(f"{name} {count}" for name, count in sorted(done.types.items()))
    sys.stdout.write(f"{done.path}: {in_bytes(done.nbytes)} in {in_seconds(done.seconds)}; {types}\n")
    return 0


def _size(args: argparse.Namespace) -> int | None:
    """Bytes that the file may have; None where its size is not limited."""
    if args.fit is None:
        return None if args.size is None else parse_bytes("--size", args.size)
    if args.component == "text_encoder":
        raise BadArgument("--fit is for a transformer, whose steps it counts; give --size for a text encoder")
    from zimage_core.export.sizing import largest_transformer

    vram = parse_bytes("--fit", args.fit)
    return largest_transformer(named(args.source), vram, args.width, args.height)
