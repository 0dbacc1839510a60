"""Hooks on the blocks of the transformer: how large the activations are in each block and step.

python examples/hooks.py [--model FOLDER] [--prompt TEXT] [--steps N]
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from zimage_core import ZImagePipeline


def main(argv: Sequence[str] | None = None) -> dict[str, list[tuple[float, float]]]:
    """Draw one image and print a table: root mean square and largest number of each block's output."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="default", help="folder or repository (default: embedded)")
    parser.add_argument("--prompt", default="a red circle on a blue background")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args(argv)

    pipe = ZImagePipeline.from_pretrained(args.model)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def statistics_of(name: str) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
            tokens = output.float()
            found[name].append((float(tokens.square().mean().sqrt()), float(tokens.abs().max())))

        return hook

    handles = [
        block.register_forward_hook(statistics_of(f"{part}.{i}"))
        for part in ("noise_refiner", "layers")
        for i, block in enumerate(getattr(pipe.transformer, part))
    ]
    pipe(args.prompt, num_inference_steps=args.steps, seed=0, output_type="latent")
    for handle in handles:
        handle.remove()

    print("root mean square / largest number of each block's output, a column a step")
    for name, steps in found.items():
        print(f"{name:<16}" + "".join(f"{rms:9.3g} /{largest:6.3g}" for rms, largest in steps))
    return dict(found)


if __name__ == "__main__":
    main()
