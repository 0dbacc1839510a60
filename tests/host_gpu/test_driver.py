"""The driver that is not there keeps the rules that the other tests rely on."""

from __future__ import annotations

import os
from functools import cache

import pytest

from tests.host_gpu import driven

MIB = 1 << 20


@cache
def run():
    return driven.run("driver")


@pytest.mark.fake_cuda
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("contexts before", [False, False]),
        ("contexts", [False, True]),
        ("used", 16 * MIB),
        ("free", (1024 - 300 - 16) * MIB),
        ("copied", 0),
        ("free beside another program", (1024 - 300 - 16 - 2 - 100) * MIB),
        ("third pinned", ""),
        ("nothing left", "CUDA out of memory"),
        ("survived", ""),
        ("waits of an item", 1),
    ],
)
def test_memory_and_failures(name, expected):
    assert run()[name] == expected


@pytest.mark.fake_cuda
def test_a_failure_is_asked_for_by_the_environment():
    assert "out of memory" in run()["second pinned"]


@pytest.mark.fake_cuda
def test_a_device_that_went_away_stays_away():
    first, *later = run()["synchronisations"]
    assert first == ""
    assert all("illegal memory access" in text for text in [*later, run()["allocation after it"]])


def test_where_there_is_no_driver_the_skip_says_how_to_get_one(monkeypatch, tmp_path):
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    monkeypatch.setenv("FAKE_CUDA_PYTHON", os.fspath(python))
    monkeypatch.delenv("FAKE_CUDA", raising=False)
    driven.missing.cache_clear()
    absent = driven.missing()
    python.touch()
    driven.missing.cache_clear()
    unbuilt = driven.missing()
    driven.missing.cache_clear()
    assert "torch's CUDA build" in absent
    assert all("tests/host_gpu/driver/build" in text for text in (absent, unbuilt))
