"""What Omni costs: a text-to-image step against that of another checkout, and a step with reference images.

    python -m benchmarks.omni_cost [--before CHECKOUT] [--json benchmarks/results/omni_cost.json]

Times are of one thread (`time.thread_time`) on an S3-DiT of width 768 with 6 layers at 256 x 256 pixels.
Variants take turns and the median of their ratios counts. A text-to-image step is measured in two processes,
one for each checkout, and in this process on a plain and on an Omni transformer. In a step with references,
two segments are modulated; beside it is a step on as many tokens that are all noisy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import ROOT, machine
from zimage_core.config import TransformerConfig
from zimage_core.cpu import capability
from zimage_core.models.transformer import ZImageTransformer

SIZES: dict[str, Any] = {
    "dim": 768, "n_heads": 6, "hidden_dim": 2048, "cap_feat_dim": 768, "n_layers": 6, "n_refiner_layers": 2,
    "siglip_feat_dim": 96,
}  # fmt: skip
SIDE, CAPTION, ROUNDS, FEWER = 32, 40, 21, 7
REFERENCES = (1, 2)
MAP = (16, 16)
"""Rows and columns of the features of a reference."""


def step_of(kind: str) -> Callable[[], object]:
    """A text-to-image step; the plain transformer is all that another checkout must have."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make: Any = ZImageTransformer
    if kind == "omni":
        from zimage_core.models.omni import OmniTransformer

        make = OmniTransformer
    net = make(TransformerConfig(**SIZES)).requires_grad_(False).eval()
    prepared = net.prepare([torch.randn(CAPTION, 768)], [0.3], (SIDE, SIDE))
    latent = torch.randn(16, SIDE, SIDE)
    return lambda: net.step(latent, prepared, 0)


def seconds(call: Callable[[], object]) -> float:
    """CPU time of this thread."""
    start = time.thread_time()
    with torch.no_grad():
        call()
    return time.thread_time() - start


def serve() -> None:
    """Answer each line with the seconds of one step."""
    step = step_of("plain")
    step()
    for _ in sys.stdin:
        print(seconds(step), flush=True)


class Worker:
    """A process that measures steps of one checkout, one at a time."""

    def __init__(self, checkout: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": os.fspath(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self) -> float:
        stdin, stdout = self.process.stdin, self.process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the process has no pipes")
        stdin.write("\n")
        stdin.flush()
        return float(stdout.readline())


def in_turn(calls: dict[str, Callable[[], float]], count: int) -> dict[str, Any]:
    """Median seconds of each, and the median ratio to the first within a round."""
    rounds = [{name: call() for name, call in calls.items()} for _ in range(count)]
    first = next(iter(calls))
    return {
        name: {
            "seconds": statistics.median(each[name] for each in rounds),
            "ratio": statistics.median(each[name] / each[first] for each in rounds),
        }
        for name in calls
    }


@torch.no_grad()
def with_references(count: int) -> dict[str, Any]:
    """A step with so many references, against one on as many tokens of one kind."""
    from zimage_core.models.omni import OmniTransformer, Reference

    torch.manual_seed(0)
    net = OmniTransformer(TransformerConfig(**SIZES)).requires_grad_(False).eval()
    pieces = [torch.randn(n, 768) for n in (5, *[2] * (count - 1), CAPTION, 2)]
    references = [Reference(torch.randn(16, SIDE, SIDE), torch.randn(*MAP, 96)) for _ in range(count)]
    prepared = net.prepare_omni([pieces], [references], [0.3], (SIDE, SIDE))
    one = prepared.samples[0]
    alike = one._replace(
        images=(torch.cat(one.images), one.images[0][:0]), rest=(torch.cat(one.rest), one.rest[0][:0])
    )
    noisy, latent = prepared._replace(samples=(alike,)), torch.randn(16, SIDE, SIDE)
    calls = {"all noisy": noisy, "two segments": prepared}
    for each in calls.values():
        net.step_omni(latent, each, 0)
    found = in_turn(
        {name: partial(seconds, partial(net.step_omni, latent, each, 0)) for name, each in calls.items()},
        FEWER,
    )
    return {"tokens": len(one.rotation[0]), **found}


def main() -> None:
    """Print the figures, and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    torch.set_num_threads(1)
    rows = {}
    if given.before:
        workers = {"before": Worker(given.before.resolve()), "now": Worker(ROOT)}
        rows["text to image, two checkouts"] = in_turn(dict(workers), ROUNDS)
        for worker in workers.values():
            worker.process.kill()
    rows["text to image, two transformers"] = in_turn(
        {kind: partial(seconds, step_of(kind)) for kind in ("plain", "omni")},
        ROUNDS,
    )
    print(json.dumps(rows), flush=True)
    rows |= {f"{count} reference(s)": with_references(count) for count in REFERENCES}
    print(json.dumps(rows))
    print(capability.features())
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "steps": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
