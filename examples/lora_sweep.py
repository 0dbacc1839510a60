"""A strip of one image over the weights of a LoRA.

python examples/lora_sweep.py [--model FOLDER --lora FILE] [--prompt TEXT] [--weights W ...] [--out FILE]
"""

import argparse
from collections.abc import Sequence

from PIL import Image

from zimage_core import ZImagePipeline
from zimage_core.assets import embedded_part


def main(argv: Sequence[str] | None = None) -> Image.Image:
    """Draw the same prompt and seed at each weight, and write the images side by side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="default", help="folder or repository (default: embedded)")
    parser.add_argument("--lora", default="outline", help="file (default: the embedded model's outlines)")
    parser.add_argument("--prompt", default="a big red circle on a white background")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0, 1.5])
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", default="lora_sweep.png")
    args = parser.parse_args(argv)

    pipe = ZImagePipeline.from_pretrained(args.model)
    name = pipe.load_lora(embedded_part(args.lora) or args.lora)
    images = []
    for weight in args.weights:
        pipe.set_adapters(name, weight)
        images.append(pipe(args.prompt, seed=args.seed).images[0])
        print(f"weight {weight:g}")

    width, height = images[0].size
    strip = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        strip.paste(image, (i * width, 0))
    strip.save(args.out)
    return strip


if __name__ == "__main__":
    main()
