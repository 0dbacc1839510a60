"""Streamed weights are complete when they are read, on streams that lag at random."""

from __future__ import annotations

from functools import cache

import pytest

from tests.host_gpu import driven

pytestmark = pytest.mark.fake_cuda

RUNS = [
    f"{name}, slow {slow}" for name in ("transformer", "text_encoder") for slow in ("copies", "computation")
]
MUTATIONS = [
    "the computation does not wait for the copy",
    "the copy does not wait for the computation",
    "the ring does not wait for the copy",
]


@cache
def run():
    return driven.run("ordering")


@pytest.mark.parametrize("name", RUNS)
def test_every_read_sees_its_bytes(name):
    total, wrong = run()["runs"][name]
    assert total > 100
    assert wrong == 0


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wait_that_is_left_out_is_noticed(name):
    _, wrong = run()["mutations"][name]
    assert wrong > 0
