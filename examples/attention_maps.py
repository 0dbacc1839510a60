"""Which parts of the image attend to which words of the prompt, as a picture.

    python examples/attention_maps.py [--model FOLDER] [--prompt TEXT] [--out FILE]

A map is the word's share of what the image gives to the text, over all heads, layers and steps.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from zimage_core import ZImagePipeline
from zimage_core.nn.attention import attention
from zimage_core.text.prompt import prompt_ids


def main(argv: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    """Draw an image; write a strip of it and a map for each word."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="default", help="folder or repository (default: embedded)")
    parser.add_argument("--prompt", default="a red circle on the left")
    parser.add_argument("--out", default="attention_maps.png")
    args = parser.parse_args(argv)

    pipe = ZImagePipeline.from_pretrained(args.model)
    side = pipe.sample_size // 16  # a token is 2 x 2 latents of 8 x 8 pixels
    tokens = side * side
    text = -(-tokens // 32) * 32  # the image comes first, padded to a multiple of 32
    total = torch.zeros(())

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        """Add what the image gives to the text; q, k and v are [tokens, heads, channels]."""
        nonlocal total
        for head in range(q.shape[1]):  # one at a time: at 1024 px the scores of a head take 68 MB
            scores = q[:tokens, head].float() @ k[:, head].float().T * q.shape[-1] ** -0.5
            total = total + scores.softmax(-1)[:, text:].cpu()
        return attention(q, k, v, **options)

    for block in pipe.transformer.layers:
        block.attention.attend = attend
    image = pipe(args.prompt, seed=1).images[0]
    maps: dict[str, torch.Tensor] = {}
    for place, token in enumerate(prompt_ids(pipe.tokenizer, args.prompt)):
        if (word := pipe.tokenizer.decode([token]).strip()) in args.prompt.split():  # not the template
            maps.setdefault(word, (total[:, place] / total.sum(1)).view(side, side))
    strip = Image.new("RGB", (image.width * (1 + len(maps)), image.height))
    strip.paste(image)
    for i, (word, found) in enumerate(maps.items(), 1):
        grey = ((found - found.min()) / (found.max() - found.min()) * 255).byte().numpy()
        strip.paste(Image.fromarray(grey).resize(image.size), (i * image.width, 0))
        print(f"map {i}: {word}")
    strip.save(args.out)
    return maps


if __name__ == "__main__":
    main()
