"""VAE decode at full size on the CPU: ours and diffusers' in one run, interleaved.

python -m benchmarks.cpu_vae [--size 256 --repeats 5]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.report import RESULTS, spread, write
from tests.helpers.parity import autoencoder_pair
from zimage_core.config import AutoencoderConfig


@torch.no_grad()
def main() -> None:
    """Check that both agree, then time them in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_vae.json")
    args = parser.parse_args()
    theirs, ours = autoencoder_pair(AutoencoderConfig(), 0.01)
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
    figures = {
        "size": args.size,
        "max_abs_difference": apart,
        "summary": {name: spread(s) for name, s in seconds.items()},
        "ratio": spread(ratios),
    }
    print(json.dumps(figures, indent=1))
    write(args.out, {**figures, "seconds": seconds})


if __name__ == "__main__":
    main()
