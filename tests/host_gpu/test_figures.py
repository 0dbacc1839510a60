"""What a step of the full-size model asks of the driver is what figures.json says."""

from __future__ import annotations

import json
from functools import cache

import pytest

from tests.host_gpu import figures

pytestmark = pytest.mark.fake_cuda

WAITS = ("synchronize", "copy_wait", "free")


@cache
def measured(name, folder):
    return figures.measure(name, folder)


@pytest.mark.parametrize("name", figures.RUNS)
def test_figures_are_those_of_the_file(models, name):
    known = json.loads(figures.FILE.read_text())[name]
    assert measured(name, models("Q4_K_M")) == known, "if it is meant: python -m tests.host_gpu.figures"


@pytest.mark.parametrize("name", figures.RUNS)
def test_the_host_waits_at_most_once_in_a_step(models, name):
    """For the check that the result is finite; the ring's waits for copies are `event_wait`."""
    step = measured(name, models("Q4_K_M"))["step"]
    assert sum(step[wait] for wait in WAITS) <= 1


@pytest.mark.parametrize("name", figures.RUNS)
def test_a_step_takes_no_new_memory_of_the_driver(models, name):
    step = measured(name, models("Q4_K_M"))["step"]
    assert (step["malloc"], step["host_alloc"]) == (0, 0)
