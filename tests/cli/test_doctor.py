"""`zimage doctor` reports what is there and fails when something needed is not."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from zimage_core.cli import doctor
from zimage_core.cpu import capability
from zimage_core.quant import gpu
from zimage_core.quant.dispatch import int8_gain


def gpu_device(architecture="sm_86", obstacle="", transformer=("cudnn", "flash")):
    ways = {"transformer": transformer, "text encoder": ("flash",), "VAE": ("efficient",)}
    return {
        "name": "cuda:0", "architecture": architecture, "kernels_obstacle": obstacle, "attention": ways
    }  # fmt: skip


def test_it_names_versions_devices_and_where_things_run(zimage):
    facts = json.loads(zimage("doctor", "--json").out)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["devices"][0]["name"] == "cpu"
    assert facts["devices"][0]["threads"] == torch.get_num_threads()
    assert facts["runs"][0].startswith("cpu")
    assert len(facts["devices"]) == 1 + torch.cuda.device_count()


@pytest.mark.parametrize(
    ("architecture", "lines", "why"),
    [("cpu", 1, "no GPU: slab by slab"), ("sm_86", 2, "are more than 465 to 631"), ("sm_86", 2, "no planar")],
)
def test_formats_with_the_same_paths_share_a_line(zimage, architecture, lines, why):
    words = ("doctor", "--paths", "--architecture", architecture)
    shown = zimage(*words).out.splitlines()
    assert len(shown) == 2 + 2 * lines
    assert sum(why in line for line in shown) == 1
    found = json.loads(zimage(*words, "--json").out)["paths"]
    assert sorted(name for line in shown[3::2] for name in line.split()) == sorted(f["format"] for f in found)


def test_the_default_device_is_the_one_that_is_taken(monkeypatch):
    devices = [{"name": "cpu", "cores": 4}, gpu_device()]
    cpu, gpu = doctor._plan(devices, "cuda:0")
    assert cpu.startswith("cpu (with --device cpu): ")
    assert gpu.startswith("cuda:0 (default): ")


def test_it_says_how_fast_the_cpu_multiplies_and_what_auto_chooses(zimage, monkeypatch):
    rates = capability.Rates(float32=94.4, bfloat16=0.0, int8=430.2)
    monkeypatch.setattr(capability, "rates", lambda: rates)
    cpu = json.loads(zimage("doctor", "--json").out)["devices"][0]
    assert cpu["gflops_a_core"] == {"float32": 94.4, "bfloat16": 0.0, "int8": 430.2}
    assert cpu["instructions"] == capability.features()
    out = zimage("doctor").out
    assert f"cores, {capability.features()}, " in out
    assert "products, measured: float32 94, bfloat16 0, int8 430 GFLOP/s a core" in out
    assert "; --compute auto: int8, 4.6 times as fast as float32 on this CPU (" in out
    assert out.rstrip().endswith("without packed weights stay exact")
    monkeypatch.setattr(capability, "rates", lambda: capability.Rates(70.0, 9.0, 3.5))
    assert "--compute auto: exact, int8 is 0.1 times as fast as float32" in zimage("doctor").out


@pytest.mark.parametrize(("architecture", "choice"), [("sm_86", "int8, "), ("gfx1100", "exact, int8 is ")])
def test_what_auto_chooses_on_a_gpu_is_said(monkeypatch, architecture, choice):
    monkeypatch.setattr(gpu, "architecture", lambda device: architecture)
    device = {**gpu_device(architecture), **doctor._products(torch.device("cuda"))}
    (line,) = doctor._plan([device], "cpu")
    assert f"--compute auto: {choice}{int8_gain(architecture):.1f} times as fast" in line


def test_a_missing_package_is_a_problem_and_status_1(zimage, monkeypatch):
    def version(name):
        if name == "sentencepiece":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor, "version", version)
    outcome = zimage("doctor")
    assert outcome.status == 1
    assert "sentencepiece is not installed" in outcome.out


def test_what_kernels_lack_is_a_line_with_and_without_a_gpu(zimage, monkeypatch):
    assert "GPU kernels" in zimage("doctor").out
    monkeypatch.setattr(doctor, "lacks", lambda: "there is no C compiler; install gcc")
    assert "  GPU kernels      there is no C compiler; install gcc\n" in zimage("doctor").out
    (line,) = doctor._plan([gpu_device(obstacle="Triton is not installed")], "cuda:0")
    assert "unpacked by plain torch, slower than by kernels: Triton is not installed" in line


@pytest.mark.parametrize(
    ("architecture", "transformer", "says"),
    [
        ("sm_90", ("cudnn", "flash"), "cudnn (transformer), flash (text encoder), efficient (VAE)"),
        ("sm_75", (), "attention: chunks of queries (transformer), flash"),
        ("gfx1100", ("flash",), "efficient (VAE), where this torch has it, else chunks of queries"),
    ],
)
def test_the_kind_of_attention_is_said(architecture, transformer, says):
    (line,) = doctor._plan([gpu_device(architecture, transformer=transformer)], "cpu")
    assert says in line


def test_paths_of_this_gpu_say_that_no_kernel_runs_here(zimage, monkeypatch):
    facts = {
        "devices": [{"name": "cpu"}, {**gpu_device(obstacle="no compiler"), "memory_free_bytes": 1 << 33}]
    }
    monkeypatch.setattr(doctor, "examine", lambda: facts)
    assert (
        "do not run here, so plain torch unpacks all weights: no compiler" in zimage("doctor", "--paths").out
    )
    assert "no compiler" not in zimage("doctor", "--paths", "--architecture", "sm_90").out
