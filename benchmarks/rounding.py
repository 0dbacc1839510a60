"""Rounding of the element-wise steps: once at the end, as now, and after each factor, as diffusers does.

python -m benchmarks.rounding
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.report import RESULTS, write
from zimage_core.nn import elementwise as once

EPS = 1e-5


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm that rounds before the weight."""
    wide = x.float()
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return unit.to(x.dtype) * weight.to(x.dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[:, None], sin[:, None]
    return torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2).to(x.dtype)


def steps(d: dict[str, Tensor]) -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]]:
    """Name -> (once, after each factor), of the tensors in `d`."""
    return {
        "norm and modulation": (
            lambda d: once.rms_norm_modulate_torch(d["x"], d["w"], EPS, d["s"]),
            lambda d: _norm(d["x"], d["w"]) * (1 + d["s"]),
        ),
        "norm and rotation": (
            lambda d: once.qk_norm_rope_torch(d["q"], d["q"], d["v"], d["v"], EPS, d["cos"], d["sin"])[0],
            lambda d: _turn(_norm(d["q"], d["v"]), d["cos"], d["sin"]),
        ),
        "SiLU gate": (
            lambda d: once.silu_gate_torch(d["x"], d["y"]),
            lambda d: functional.silu(d["x"]) * d["y"],
        ),
        "gated residual": (
            lambda d: once.gate_norm_residual_torch(d["x"], d["y"], d["w"], EPS, d["s"]),
            lambda d: d["x"] + d["s"].tanh() * _norm(d["y"], d["w"]),
        ),
    }


def exact(name: str, d: dict[str, Tensor]) -> Tensor:
    """The step in float64."""
    d = {key: value.double() for key, value in d.items()}

    def norm(x: Tensor, w: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * w

    if name == "norm and modulation":
        return norm(d["x"], d["w"]) * (1 + d["s"])
    if name == "norm and rotation":
        pairs = torch.view_as_complex(norm(d["q"], d["v"]).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(d["cos"], d["sin"])[:, None]).flatten(-2)
    if name == "SiLU gate":
        return functional.silu(d["x"]) * d["y"]
    return d["x"] + d["s"].tanh() * norm(d["y"], d["w"])


def main() -> None:
    """Relative error (Frobenius norm) against float64 on the same rounded inputs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "rounding.json")
    args = parser.parse_args()
    g = torch.Generator().manual_seed(0)
    shapes = {
        "x": (288, 3840),
        "y": (288, 3840),
        "w": (3840,),
        "s": (3840,),
        "q": (288, 30, 128),
        "v": (128,),
    }
    drawn = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    angle = torch.rand(288, 64, generator=g) * 6.28
    found: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        d = {name: value.to(dtype) for name, value in drawn.items()}
        d |= {"cos": angle.cos(), "sin": angle.sin()}
        for name, (now, each) in steps(d).items():
            want = exact(name, d)
            relative = [float((run(d).double() - want).norm() / want.norm()) for run in (now, each)]
            found.append(
                {"step": name, "dtype": str(dtype)[6:], "once": relative[0], "after each factor": relative[1]}
            )
    print(json.dumps(found, indent=1))
    write(args.out, {"relative_error": found})


if __name__ == "__main__":
    main()
