"""Streamed steps on the virtual clock against max(computation, transfer): random plans, nothing is moved.

python -m benchmarks.stream_clock [--plans 1500]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from benchmarks.report import RESULTS, write
from zimage_core.memory.clock import Machine, simulate
from zimage_core.memory.residency import spread

STEPS = 8
BANDS = {"T/C below 0.75": (0.2, 0.75), "T/C 0.75 to 1.5": (0.75, 1.5), "T/C above 1.5": (1.5, 2.5)}
"""Transfer over computation."""


def excess(rng: random.Random, band: tuple[float, float], slots: int, together: bool) -> float:
    """Time of a random plan over the longer of its lanes and the end where only the other is busy, less 1.

    Args:
        rng: Draws 8 to 48 blocks of sizes within 15 per cent of their mean, and how many stay.
        band: Of transfer over computation.
        slots: On the device.
        together: Blocks that stay lie in one row instead of evenly among the others.
    """
    count = rng.randint(8, 48)
    staying = rng.randint(0, count - 4)
    resident = set(range(staying)) if together else set(spread(count, staying))
    size = rng.randint(20, 200) * 1_000_000
    nbytes = [int(size * rng.uniform(0.85, 1.15)) for _ in range(count)]
    seconds = [rng.choice([0.002, 0.01, 0.1])] * count
    streamed = [i for i in range(count) if i not in resident]
    moved = sum(nbytes[i] for i in streamed)
    link = moved / (sum(seconds) * rng.uniform(*band))
    transfer, compute = moved / link, sum(seconds)
    if transfer <= compute:
        alone = max(0.0, nbytes[streamed[0]] / link - sum(seconds[: streamed[0]]))
    else:
        alone = sum(seconds[streamed[-1] :])
    machine = Machine(link, link * rng.choice([2.0, 8.0]))
    taken = simulate(nbytes, seconds, resident, slots, machine, STEPS).seconds
    return taken / (STEPS * max(transfer, compute) + alone) - 1


def main() -> None:
    """The worst of each band."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=RESULTS / "stream_clock.json")
    args = parser.parse_args()
    worst = []
    for slots, together in ((3, False), (2, False), (3, True)):
        for name, band in BANDS.items():
            rng = random.Random(0)
            found = [excess(rng, band, slots, together) for _ in range(args.plans)]
            worst.append(
                {"slots": slots, "resident in one row": together, "band": name, "worst": round(max(found), 4)}
            )
    print(json.dumps(worst, indent=1))
    write(args.out, {"plans": args.plans, "steps": STEPS, "worst_excess": worst})


if __name__ == "__main__":
    main()
