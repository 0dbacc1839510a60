"""The model of a step on several GPUs: traffic is the formula's, and work and links count as they must."""

from __future__ import annotations

import pytest

from benchmarks import ulysses_model
from benchmarks.report import read
from benchmarks.ulysses_model import PIXELS, RANKS, SETUPS, computed, figures, traffic


def test_traffic_is_that_of_a_count_by_hand():
    """2112 tokens of a rank, of whose 4 x 3840 numbers in bfloat16 the other rank gets half, 32 times."""
    assert traffic(4224, 32, 2) == 2112 * 4 * 3840 * 2 * 32 / 2
    assert traffic(4224, 32, 2) / 1e9 == pytest.approx(1.04, abs=0.005)
    assert traffic(4224, 32, 4) / 1e9 == pytest.approx(0.78, abs=0.005)
    assert traffic(4224, 32, 1) == 0


@pytest.mark.parametrize("name", SETUPS)
def test_work_falls_with_ranks_but_not_below_its_share(name):
    gpu = SETUPS[name].gpu
    for pixels in PIXELS:
        work = [computed(gpu, pixels, ranks).middle for ranks in RANKS]
        assert work == sorted(work, reverse=True)
        assert all(each >= work[0] / ranks for each, ranks in zip(work, RANKS, strict=True))


def test_the_committed_figures_are_those_of_the_model():
    assert read("ulysses_model.json")["model"] == figures(), "python -m benchmarks.ulysses_model"
    slow, fast = (
        read("ulysses_model.json")["model"][f"H100, {link}"]["1024"] for link in ("PCIe 4", "NVLink")
    )
    assert all(slow[str(ranks)]["times"] < fast[str(ranks)]["times"] for ranks in RANKS[1:])
    assert ulysses_model.LATENCY.low > 0
