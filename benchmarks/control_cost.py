"""What a ControlNet costs: the time of a step beside a step without it, and bytes of weights and maps.

    python -m benchmarks.control_cost [--json benchmarks/results/control_cost.json]

Times are of one thread (`time.thread_time`) on a narrow S3-DiT with as many layers as Z-Image, at 256 x 256
pixels; plain steps and steps with control take turns, and the median of their ratios counts. Beside them is
the ratio that follows from counting blocks. Bytes are those of the full-size nets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import machine
from zimage_core.config import TransformerConfig
from zimage_core.control.apply import Control, Controls
from zimage_core.control.config import ControlConfig
from zimage_core.control.load import control_table
from zimage_core.control.model import ControlNet
from zimage_core.cpu import capability
from zimage_core.memory.nets import MAPS
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.weights.controlnets import OWN, PLAIN, SHARED
from zimage_core.weights.names import checkpoint_shapes

NARROW = TransformerConfig(
    dim=256, n_heads=2, hidden_dim=682, cap_feat_dim=256, n_layers=30, n_refiner_layers=2
)
VARIANTS = {
    "1.0": (6, 16, PLAIN, 2),
    "2.0": (15, 33, SHARED, 0),
    "2.1": (15, 33, OWN, 2),
    "2.1 lite": (3, 33, OWN, 2),
}
SIDE, CAPTION, ROUNDS = 32, 40, 7
TOKENS, FULL_TOKENS = (256, 64), (4096, 64)
"""Tokens of image and caption, here and at 1024 x 1024 pixels."""


def config_of(variant: str, base: TransformerConfig) -> ControlConfig:
    """A variant for a base model."""
    layers, channels, refiner, refiners = VARIANTS[variant]
    return ControlConfig(base.dim, base.n_heads, base.hidden_dim, channels, layers, refiners, refiner)


def counted(variant: str, tokens: tuple[int, int]) -> float:
    """Work of a step with control over that of one without, by blocks and tokens; projections count 1/12."""
    layers, _, refiner, refiners = VARIANTS[variant]
    image, joint = tokens[0], sum(tokens)
    base = 2 * image + 30 * joint
    projected = 1 + 1 / 12
    alone = {PLAIN: refiners, OWN: refiners * projected, SHARED: layers + 2 / 12}[refiner]
    return 1 + (alone * image + layers * projected * joint) / base


def weights(variant: str) -> int:
    """Numbers in a full-size net."""
    table = control_table(config_of(variant, TransformerConfig()), "split")
    return sum(torch.Size(shape).numel() for shape in checkpoint_shapes(table).values())


@torch.no_grad()
def measured(variant: str, base: ZImageTransformer) -> dict[str, Any]:
    """Seconds of a step, and the median ratio."""
    net = ControlNet(config_of(variant, base.config)).requires_grad_(False).eval()
    latent, caption = torch.randn(16, SIDE, SIDE), torch.randn(CAPTION, base.config.cap_feat_dim)
    prepared = base.prepare([caption], [0.3], (SIDE, SIDE))
    controls = Controls(base, [Control(net, torch.randn(1, net.config.channels, SIDE, SIDE), 0.75, (0, 1))])

    def seconds(controlled: bool) -> float:
        after = controls.after(prepared, 0, 0, 0) if controlled else None
        start = time.thread_time()
        base.step(latent, prepared, 0, after=after)
        return time.thread_time() - start

    seconds(True), seconds(False)
    pairs = [(seconds(False), seconds(True)) for _ in range(ROUNDS)]
    plain, controlled = (statistics.median(each) for each in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    return {"plain": plain, "controlled": controlled, "ratio": ratio}


def main() -> None:
    """Print a table, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = ZImageTransformer(replace(NARROW)).requires_grad_(False).eval()
    rows = {}
    for variant in VARIANTS:
        count = weights(variant)
        rows[variant] = {
            **measured(variant, base),
            "counted_here": counted(variant, TOKENS),
            "counted_1024": counted(variant, FULL_TOKENS),
            "weights": count,
            "bytes_bfloat16": 2 * count,
            "bytes_q8_0": count * 34 // 32,
            "maps_1024_bfloat16": (MAPS * sum(FULL_TOKENS) + FULL_TOKENS[0]) * 3840 * 2,
        }
        shown = "  ".join(f"{key} {value:.4g}" for key, value in rows[variant].items())
        print(f"{variant:9} {shown}")
    print(capability.features())
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "variants": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
