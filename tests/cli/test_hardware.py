"""The command line computes on a GPU if there is one, says so, and takes no more threads than help."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from zimage_core import ZImagePipeline
from zimage_core.cli import hardware
from zimage_core.cli.main import build_parser, main
from zimage_core.cli.model_options import load_pipeline
from zimage_core.cpu.threads import VARIABLES
from zimage_core.run import checks


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs that torch can use, and the arguments that the embedded pipeline was opened with."""
    asked = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card of {device}")
    monkeypatch.setattr(checks, "_computes", lambda device: True)

    def opened(compute, **options):
        asked.update(options)
        return SimpleNamespace(compute="exact")

    monkeypatch.setattr(ZImagePipeline, "from_default", opened)
    return asked


def loaded(*words, **options):
    args = build_parser().parse_args(["generate", "a", *words])
    args.own_process = False
    return load_pipeline(args, **options)


def test_a_gpu_is_used_and_said_in_one_line(gpus, capsys):
    loaded(fit=True)
    assert gpus == {"device": "cuda:0", "vram": "auto"}
    said = "device: cuda:0 (Card of cuda:0, the first of 2; --device cuda:1 takes another)\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["--quiet"], {"device": "cuda:0"}),
        (["--quiet", "--vram", "6GiB"], {"device": "cuda:0", "vram": "6GiB"}),
        (["--quiet", "--ram", "6GiB"], {"device": "cuda:0", "ram": "6GiB"}),
        (["--device", "cpu"], {"device": "cpu"}),
        (["--device", "cuda:1"], {"device": "cuda:1"}),
    ],
)
def test_what_is_asked_for_is_taken(gpus, capsys, words, asked):
    loaded(*words)
    assert gpus == asked
    assert capsys.readouterr().err == ""


def test_a_gpu_that_cannot_compute_is_left(gpus, monkeypatch):
    """A build of torch may lack kernels for an old GPU, or another process may hold its memory."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def fail(*args, **options):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch, "ones", fail)
    assert checks.read_device("auto") == torch.device("cpu")


def test_python_takes_auto_as_well():
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    assert ZImagePipeline.from_default(device="auto").device.type == wanted


@pytest.mark.parametrize("chosen", [None, *hardware.WAIT])
def test_threads_wait_asleep_unless_the_user_chose(monkeypatch, chosen):
    environment = {} if chosen is None else {chosen: "active"}
    monkeypatch.setattr(hardware, "os", SimpleNamespace(environ=environment))
    hardware.wait_passively()
    assert environment == ({"OMP_WAIT_POLICY": "passive"} if chosen is None else {chosen: "active"})


@pytest.mark.parametrize(
    ("words", "variable", "threads"),
    [([], None, 1), (["-W", "1024", "-H", "1024"], None, None), ([], "OMP_NUM_THREADS", None)],
)
def test_a_small_step_takes_one_thread(monkeypatch, words, variable, threads):
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "2")
    args = build_parser().parse_args(["generate", "a", "--device", "cpu", *words])
    args.own_process = True
    load_pipeline(args)
    assert taken == ([] if threads is None else [threads])


def test_the_threads_of_a_calling_program_stay(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: pytest.fail("changed"))
    words = ["generate", "a red circle", "--steps", "1", "-W", "16", "-H", "16", "--quiet"]
    assert main([*words, "-o", str(tmp_path / "a.png")]) == 0
