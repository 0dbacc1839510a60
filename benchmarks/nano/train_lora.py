"""Train the LoRA "outline": shapes drawn as outlines; glyphs stay as they are.

    python -m benchmarks.nano.train_lora --runs RUNS

Low-rank matrices beside every matrix of attention and feed-forward in the noise refiner and the main
layers, by flow matching on outline drawings. Writes RUNS/outline.pt, RUNS/outline.png and, into the package,
outline.safetensors with PEFT's names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.nano.draw import Scene, draw
from benchmarks.nano.model import Nano
from benchmarks.nano.tune import Tuner, arguments, base
from zimage_core.nn.linear import Linear

RANK = 8
NAME = "outline"


def outlined(scene: Scene, rng: np.random.Generator) -> tuple[Scene, list[np.ndarray]]:
    """The scene and its outline drawing."""
    return scene, [draw(scene, rng, outline=True)]


class LowRank(nn.Module):
    """B A x beside a layer's own product, zero until it is trained."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.lora_A = nn.Linear(columns, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, rows, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The layer's own product and the branch's; the type is that of `Linear.branch`."""
        out: Tensor = product(x) + self.lora_B(self.lora_A(x))
        return out


class LoRA(nn.Module):
    """A branch for every matrix of the modulated blocks' attention and feed-forward."""

    def __init__(self, model: Nano) -> None:
        super().__init__()
        self.branches: dict[str, LowRank] = {}
        for name, layer in list(model.transformer.named_modules()):
            inside = name.startswith(("noise_refiner.", "layers.")) and "adaLN" not in name
            if inside and isinstance(layer, Linear):
                rows, columns = layer.weight.shape
                self.branches[name] = LowRank(columns, rows)
                self.add_module(name.replace(".", "/"), self.branches[name])
                layer.branch = self.branches[name].forward  # a Linear holds no branch as a module

    def tensors(self) -> dict[str, Tensor]:
        """Name in the file -> float16 weight."""
        return {
            f"transformer.{name}.{half}.weight": getattr(branch, half).weight.detach().half().contiguous()
            for name, branch in self.branches.items()
            for half in ("lora_A", "lora_B")
        }


def export(lora: LoRA, path: Path) -> None:
    """Write the file; the metadata is PEFT's configuration as diffusers writes it."""
    config = {
        "transformer.r": RANK,
        "transformer.lora_alpha": RANK,
        "transformer.target_modules": sorted(lora.branches),
    }
    metadata = {"format": "pt", "name": NAME, "license": "apache-2.0"}
    save_file(lora.tensors(), path, {**metadata, "lora_adapter_metadata": json.dumps(config)})
    print(f"{path.name}: {path.stat().st_size:,} bytes")


def main() -> None:
    args = arguments(steps=4400, lr=3e-3)
    nano, vae = base()
    lora = LoRA(nano)
    tuner = Tuner(args, NAME, lora, (nano, vae), outlined, kinds=1)
    try:
        tuner.run()
    finally:
        tuner.keep()
    tuner.finish()
    export(lora, args.to / f"{NAME}.safetensors")


if __name__ == "__main__":
    main()
