"""Defends: where no Triton kernel can run, one sentence says why, and the slower way is taken."""

from __future__ import annotations

import subprocess
import warnings
from types import SimpleNamespace

import pytest
import torch

from zimage_core.errors import Unsupported
from zimage_core.quant import dispatch, probe

GPU = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine on which everything is there; a test takes something away by setting an attribute."""
    here = SimpleNamespace(triton="3.7.1", programs={"gcc"}, include=tmp_path, capability=(8, 6), error=None)
    (tmp_path / "Python.h").touch()

    def launch(device):
        if here.error is not None:
            raise here.error

    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(probe, "_verdicts", {})
    monkeypatch.setattr(probe, "find_spec", lambda name: object() if here.triton else None)
    monkeypatch.setattr(probe, "version", lambda package: here.triton)
    monkeypatch.setattr(probe.shutil, "which", lambda name: name if name in here.programs else None)
    monkeypatch.setattr(probe.sysconfig, "get_paths", lambda scheme: {"include": str(here.include)})
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: here.capability)
    monkeypatch.setattr("zimage_core.kernels.probe.launch", launch)
    monkeypatch.setattr(dispatch, "KERNELS", "auto")
    return here


CASES = {
    "no Triton": ({"triton": None}, "Triton is not installed; install 3.6 or newer: pip install"),
    "old Triton": ({"triton": "3.2.0"}, "Triton 3.2 is too old; a newer torch brings 3.6 or newer"),
    "old GPU": ({"capability": (6, 1)}, "compute capability 6.1 and Triton needs 7.0"),
    "no compiler": (
        {"programs": set(), "error": RuntimeError("Failed to find C compiler.")},
        "there is no C compiler for Triton's launcher; install gcc or clang, or name one in CC",
    ),
    "no headers": (
        {"include": None, "error": subprocess.CalledProcessError(1, ["gcc"])},
        "no Python.h in .*; install Python's headers",
    ),
    "another fault": (
        {"error": OSError("libcuda.so: cannot open\nmore")},
        "a tiny kernel ends in OSError: libcuda.so: cannot open; repair Triton",
    ),
    "a launcher for each kernel": ({"triton": "3.6.0", "programs": set()}, "there is no C compiler"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_fault_is_one_warning_and_the_slower_way(machine, case):
    faults, sentence = CASES[case]
    for name, value in faults.items():
        setattr(machine, name, machine.include / "none" if name == "include" else value)
    with pytest.warns(UserWarning, match=f"cuda:0: Triton kernels do not run: .*{sentence}") as seen:
        assert not dispatch.kernels_for(GPU)
    text = str(seen[0].message)
    assert "plain torch unpacks the weights instead" in text
    assert "\n" not in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not dispatch.kernels_for(GPU), "one warning for a process"


@pytest.mark.parametrize("case", CASES)
def test_kernels_that_were_asked_for_are_an_error(machine, case, monkeypatch):
    faults, sentence = CASES[case]
    for name, value in faults.items():
        setattr(machine, name, machine.include / "none" if name == "include" else value)
    monkeypatch.setattr(dispatch, "KERNELS", "on")
    for _ in range(2):
        with pytest.raises(Unsupported, match=f"ZIMAGE_KERNELS is on, but .*{sentence}"):
            dispatch.kernels_for(GPU)


@pytest.mark.parametrize("triton", ["3.7.1", "3.10.0", "4.0", "git"])
def test_kernels_run_where_a_kernel_launches(machine, triton):
    machine.triton = triton
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.kernels_for(GPU)


def test_a_launcher_in_tritons_cache_needs_no_compiler(machine):
    machine.programs = set()
    assert dispatch.kernels_for(GPU)
    assert "no C compiler" in probe.lacks()


def test_each_gpu_is_tried_once(machine):
    machine.error = OSError("broken")
    with pytest.warns(UserWarning, match="OSError: broken"):
        assert not dispatch.kernels_for(GPU)
    machine.error = None
    assert not dispatch.kernels_for(GPU)
    assert dispatch.kernels_for(torch.device("cuda", 1))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out"), RuntimeError("Triton Error [CUDA]: out of memory")], ids=type
)
def test_too_little_memory_is_no_verdict(machine, error):
    machine.error = error
    with pytest.raises(type(error)):
        dispatch.kernels_for(GPU)
    machine.error = None
    assert dispatch.kernels_for(GPU)


@pytest.mark.parametrize(("programs", "cc"), [({"clang"}, None), (set(), "/opt/cc"), ({"gcc"}, None)])
def test_a_compiler_is_found_as_triton_finds_it(machine, monkeypatch, programs, cc):
    machine.programs = programs
    if cc:
        monkeypatch.setenv("CC", cc)
    assert probe.lacks() == ""


@pytest.mark.parametrize("value", ["auto", "off"])
def test_nothing_is_tried_for_a_cpu_or_when_kernels_are_off(machine, monkeypatch, value):
    monkeypatch.setattr(dispatch, "KERNELS", value)
    monkeypatch.setattr(dispatch, "works", None)
    assert not dispatch.kernels_for(torch.device("cpu"))
    assert not dispatch.kernels_for(torch.device("mps"))
    assert value == "auto" or not dispatch.kernels_for(GPU)
