"""`zimage convert IN OUT`: write a checkpoint in another layout."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from zimage_core.assets import named
from zimage_core.cli.progress import Progress
from zimage_core.files.units import in_bytes, parse_bytes

EPILOG = """examples:
  zimage convert Z-Image-Turbo/ turbo.safetensors              diffusers folder -> one file for ComfyUI
  zimage convert turbo.safetensors Z-Image-Turbo/transformer   and back
  zimage convert sdcpp.gguf turbo.gguf                         names that diffusers and ComfyUI know
  zimage convert turbo-Q8_0.gguf turbo.safetensors --dequantize bf16
"""


def add_parser(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "convert",
        parents=[common],
        help="write a checkpoint in another layout, every number the same",
        description="Convert between a diffusers folder, a single safetensors file (ComfyUI's names) and a "
        "GGUF. Tensors are renamed, fused and cut, never rounded; packed weights stay packed in a GGUF.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="IN", help="GGUF, safetensors, a folder, or default: the embedded model")
    add("out", metavar="OUT", help="NAME.gguf, NAME.safetensors, or a new folder")
    add("--to", choices=("diffusers", "single", "gguf"), help="default: what the name of OUT says")
    add("--variant", metavar="NAME", help="of the files in the folder IN, such as fp16 (default: none)")
    add(
        "--component",
        choices=("transformer", "text_encoder", "vae", "siglip"),
        help="of a folder or file with several; default: the transformer",
    )
    add("--dequantize", choices=("bf16", "f16", "f32"), help="make packed weights plain numbers of this type")
    add(
        "--prefix",
        default="",
        metavar="TEXT",
        help="before each name of a single file: model.diffusion_model.",
    )
    add("--shard-size", metavar="BYTES", help="of a folder's files (default: 5GB)")
    add("--force", action="store_true", help="replace OUT if it is a file that exists")
    add("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, and print one line about the file or folder."""
    shard_bytes = None if args.shard_size is None else parse_bytes("--shard-size", args.shard_size)
    from zimage_core.export.converting import convert_file

    progress = Progress(args.quiet)
    progress.start("convert")
    try:
        done = convert_file(
            named(args.source),
            args.out,
            args.to,
            component=args.component,
            variant=args.variant,
            dequantize=args.dequantize,
            prefix=args.prefix,
            shard_bytes=shard_bytes,
            overwrite=args.force,
            progress=progress.weights,
            log=progress.say,
        )
    finally:
        progress.finish()
    types = ", ".join(f"{name} {count}" for name, count in sorted(done.types.items()))
    sys.stdout.write(f"{done.path}: {in_bytes(done.nbytes)}; {types}\n")
    return 0
