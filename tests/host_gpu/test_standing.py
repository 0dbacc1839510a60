"""The standing list of GPU figures runs from end to end, on tiny shapes."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks import gpu
from tests.host_gpu import driven

pytestmark = pytest.mark.fake_cuda


@cache
def found():
    return driven.run("standing")


def test_every_kind_of_case_is_timed():
    kinds = {what for part in gpu.PARTS.values() for what, _ in part.work}
    assert set(found()["kinds"]) == kinds


def test_only_cudnn_and_absent_peers_are_left_out():
    for row in found()["left"]:
        assert row["note"].startswith("skipped: ") or "cudnn" in row["variant"], row


def test_no_row_claims_to_be_checked():
    assert found()["unchecked"]


def test_parts_of_a_step_are_recorded_as_graphs():
    assert found()["graphs"] == [
        "attention", "attention, flash", "attention, int8", "dequantise", "element-wise", "linears",
    ]  # fmt: skip


def test_a_step_has_the_launches_of_the_model():
    counted, modelled = found()["launches"]
    assert counted == modelled
