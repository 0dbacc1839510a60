"""VAE decode in tiles: how far it is from decoding at once. Times are `python -m benchmarks.run vae`.

python -m benchmarks.vae_tiles [--latents 48]
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import arguments, write
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


def errors(vae: Autoencoder, side: int, tiles: tuple[int, ...] = (32, 16)) -> list[dict[str, Any]]:
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
    """Errors of the full-size architecture and of the embedded model, that against float64 too."""
    parser = arguments(__doc__, "vae_tiles.json")
    parser.add_argument(
        "--latents", type=int, default=48, help="side of the full-size architecture's latents"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    _, full = autoencoder_pair(AutoencoderConfig(), 0.01)
    single, z = ZImagePipeline.from_default().vae, latents("noise", 64)
    exact = ZImagePipeline.from_default().vae.double().decoder(z.double())
    own = {
        name: float((single.decode(z, tile).double() - exact).abs().max())
        for name, tile in (("whole", None), ("tile 32", 32))
    }
    figures = {
        "latents": args.latents,
        "full_size": errors(full, args.latents),
        "embedded_64": errors(single, 64),
        "embedded_64_against_float64": own,
    }
    print(json.dumps(figures, indent=1))
    write(args.out, figures)


if __name__ == "__main__":
    main()
