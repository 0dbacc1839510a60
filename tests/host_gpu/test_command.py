"""Commands that take references or write prompts run on a GPU, with a budget and without one."""

from __future__ import annotations

from functools import cache

import pytest

from tests.host_gpu import driven

pytestmark = pytest.mark.fake_cuda


@cache
def run(folder):
    return driven.run("command", "--files", folder)


@pytest.mark.parametrize("budget", ["no budget", "auto", "least"])
@pytest.mark.parametrize("verb", ["reference", "enhance"])
def test_a_command_runs_on_a_gpu(models, verb, budget):
    found = run(models("Q4_K_M"))[f"{verb}, {budget}"]
    assert found["status"] == 0, found["said"]
    assert found["launches"] > 100, "it computed there"
