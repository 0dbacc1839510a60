"""VAE decode in tiles: how far from decoding at once, and the processor time of both.

python -m benchmarks.vae_tiles [--latents 48 --repeats 3]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import RESULTS, spread, write
from tests.helpers.parity import autoencoder_pair
from zimage_core import ZImagePipeline
from zimage_core.config import AutoencoderConfig
from zimage_core.models.autoencoder import Autoencoder


def latents(kind: str, side: int) -> Tensor:
    """[1, 16, side, side]: noise, or a ramp from corner to corner in every channel."""
    if kind == "noise":
        return torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(-2, 2, side)
    return (ramp[:, None] + ramp[None, :]).expand(1, 16, side, side) / 2


def errors(vae: Autoencoder, side: int, tiles: tuple[int, ...]) -> list[dict[str, Any]]:
    """Largest and mean difference of each tile size to decoding at once, pixels from -1 to 1."""
    found = []
    for kind in ("noise", "gradient"):
        z = latents(kind, side)
        whole = vae.decode(z)
        for tile in tiles:
            apart = (vae.decode(z, tile) - whole).abs()
            found.append(
                {"latents": kind, "tile": tile, "max": float(apart.max()), "mean": float(apart.mean())}
            )
    return found


@torch.no_grad()
def main() -> None:
    """Errors of the full-size architecture and of the embedded model, then times in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "vae_tiles.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    _, full = autoencoder_pair(AutoencoderConfig(), 0.01)
    nano = ZImagePipeline.from_default().vae
    seconds: dict[str, list[float]] = {"whole": [], "tile 32": [], "tile 16": []}
    z = latents("noise", args.latents)
    for _ in range(args.repeats):
        for name in seconds:
            tile = None if name == "whole" else int(name.split()[1])
            begin = time.process_time()
            full.decode(z, tile)
            seconds[name].append(time.process_time() - begin)
    wide = nano.double()
    reference = wide.decoder(latents("noise", 64).double())
    single = ZImagePipeline.from_default().vae
    own = {
        name: float((single.decode(latents("noise", 64), tile).double() - reference).abs().max())
        for name, tile in (("whole", None), ("tile 32", 32))
    }
    figures = {
        "latents": args.latents,
        "full_size": errors(full, args.latents, (32, 16)),
        "embedded_64": errors(single, 64, (32, 16)),
        "embedded_64_against_float64": own,
        "processor_seconds": {name: spread(times) for name, times in seconds.items()},
    }
    print(json.dumps(figures, indent=1))
    write(args.out, {**figures, "seconds": seconds})


if __name__ == "__main__":
    main()
