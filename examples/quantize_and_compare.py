"""Write a transformer in several types, and see what each costs in bytes and changes in the images.

    python examples/quantize_and_compare.py [--model FOLDER] [--types Q8_0 Q4_K_M ...] [--out FILE]

`zimage compare` measures more, block by block; this is the short way in Python.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from zimage_core import ZImagePipeline, quantize_file
from zimage_core.study.metrics import psnr

PROMPTS = ("a big red circle on a white background", "three green stars", "a blue letter K")


def draw(pipe: ZImagePipeline) -> torch.Tensor:
    """One image a prompt, [3, 3, H, W] in [0, 1]."""
    return torch.cat([pipe(prompt, seed=0, output_type="pt").images for prompt in PROMPTS])


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[int, float]]:
    """Print a table and write the images, a row a type; the first row is the source's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="default", help="folder or repository (default: embedded)")
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q4_K_M", "Q2_K"])
    parser.add_argument("--out", default="quantize_and_compare.png")
    args = parser.parse_args(argv)

    pipe = ZImagePipeline.from_pretrained(args.model)
    source = pipe.files()["transformer"]
    rows = [draw(pipe)]
    found = {"source": (source.size, float("inf"))}
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.types:
            path = Path(folder) / f"{kind}.gguf"
            quantize_file(source.path, path, kind, component="transformer", requantize=True)
            rows.append(draw(ZImagePipeline.from_pretrained(args.model, transformer=path)))
            found[kind] = (path.stat().st_size, psnr(rows[-1], rows[0]))
    for kind, (size, decibels) in found.items():
        print(f"{kind:<8} {size / 1e6:9.2f} MB  PSNR {decibels:5.1f} dB")
    table = torch.cat([torch.cat(list(row), -1) for row in rows], -2)  # [3, rows * H, prompts * W]
    Image.fromarray((table.permute(1, 2, 0) * 255).round().byte().numpy()).save(args.out)
    return found


if __name__ == "__main__":
    main()
