"""VAE decode at full size on the CPU: ours and diffusers' in one run, interleaved.

python -m benchmarks.cpu_vae [--size 256 --repeats 5] [--out benchmarks/results/cpu_vae.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from tests.helpers.parity import randomise
from zimage_core.config import AutoencoderConfig
from zimage_core.models.autoencoder import Autoencoder


def pair() -> tuple[AutoencoderKL, Autoencoder]:
    """Both decoders with the same random weights."""
    config = AutoencoderConfig()
    theirs = AutoencoderKL(
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels, norm_num_groups=config.norm_num_groups,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip
    randomise(theirs, 0.01)
    ours = Autoencoder(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def spread(seconds: list[float]) -> dict[str, float]:
    """Median with the 20th and 80th percentile."""
    ranked = sorted(seconds)
    at = [ranked[round(q * (len(ranked) - 1))] for q in (0.2, 0.8)]
    return {"median": statistics.median(ranked), "p20": at[0], "p80": at[1]}


@torch.no_grad()
def main() -> None:
    """Check that both agree, then time them in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    theirs, ours = pair()
    z = torch.randn(1, 16, args.size // 8, args.size // 8, generator=torch.Generator().manual_seed(0))
    runs: dict[str, Callable[[], torch.Tensor]] = {
        "zimage_core": lambda: ours.decode(z),
        "diffusers": lambda: theirs.decode(z).sample,
    }
    apart = float((runs["zimage_core"]() - runs["diffusers"]()).abs().max())
    if apart > 1e-3:
        raise SystemExit(f"the two decoders differ by {apart}: nothing was timed")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    ratios = [a / b for a, b in zip(seconds["zimage_core"], seconds["diffusers"], strict=True)]
    report = {
        "machine": {"torch": torch.__version__, "threads": torch.get_num_threads(), "python": platform.python_version(),
                    "date": time.strftime("%Y-%m-%d")},
        "size": args.size, "max_abs_difference": apart, "seconds": seconds,
        "summary": {name: spread(s) for name, s in seconds.items()}, "ratio": spread(ratios),
    }  # fmt: skip
    text = json.dumps(report, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
