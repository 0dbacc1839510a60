"""Recorded steps, other devices."""

from __future__ import annotations

from functools import cache

import pytest

from tests.host_gpu import driven

pytestmark = pytest.mark.fake_cuda


@cache
def run(name):
    return driven.run(name)


def test_every_step_is_a_replay_and_no_call_is_forbidden():
    for size in run("capture")["sizes"]:
        assert (size["replays"], size["forbidden"]) == (size["steps"], 0), size


def test_a_known_size_is_not_recorded_again():
    first, _, again = run("capture")["sizes"]
    assert again["launches"] < first["launches"]
    assert again["grown"] == 0


def test_a_synchronisation_in_a_recorded_step_is_noticed():
    assert run("capture")["mutated"] > 0


@pytest.mark.parametrize("number", range(4), ids=["resident", "auto", "least", "something on GPU 0"])
def test_a_pipeline_on_the_second_gpu_leaves_the_first_alone(number):
    found = run("devices")["runs"][number]
    assert found["given"][0] == 0
    assert found["given"][1] > 0
    assert found["contexts"] == [number == 3, True]
    assert (found["wrong"], found["current"]) == (0, 0)


def test_a_launch_without_device_guard_is_noticed():
    assert run("devices")["mutated"] > 0
