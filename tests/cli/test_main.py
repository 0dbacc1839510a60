"""The process: exit status, one line for an error, and nothing left behind when it is stopped."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.tree import ROOT
from zimage_core.cli import inspect
from zimage_core.cli.main import build_parser
from zimage_core.cli.model_options import call_arguments
from zimage_core.errors import BadFile
from zimage_core.files.png import read_metadata

READY = (
    "import sys, zimage_core.cli.main as m; m._handle_signals(); "
    "sys.stderr.write('ready\\n'); sys.stderr.flush(); m.process()"
)


def start(*words: object, code: str = "from zimage_core.cli.main import process; process()", **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_help_and_version_are_status_0(zimage):
    assert zimage("--help").status == 0
    assert zimage("--version").out.startswith("zimage-core ")
    for verb in ("generate", "inspect", "doctor"):
        assert verb in zimage("--help").out
        assert zimage(verb, "--help").status == 0


def test_options_of_an_image_are_arguments_of_the_call():
    """An option under another name would be left out of the call without a word."""
    drawn = [["generate", "a"], ["compare", "a", "b", "--prompt", "c"], ["imatrix"], ["sensitivity"]]
    words = ["-W", 32, "-H", 48, "--steps", 2, "--negative", "n", "--max-length", 9, "--seed", 3]
    wanted = {
        "width": 32, "height": 48, "num_inference_steps": 2, "negative_prompt": "n",
        "max_sequence_length": 9, "seed": 3,
    }  # fmt: skip
    for verb in drawn:
        prompts = [] if len(verb) > 1 else ["--prompts", "p"]
        for scale, name in (("--guidance", "guidance_scale"), ("--cfg", "cfg")):
            args = build_parser().parse_args([*verb, *prompts, *map(str, words), scale, "1.5"])
            assert call_arguments(args, ["a"]) == {**wanted, name: 1.5}, verb


def test_the_embedded_model_has_a_name_for_every_verb(zimage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "nothing is missing" in zimage("inspect", "default").out
    assert zimage("plan", "--model", "default").out == zimage("plan").out
    assert zimage("convert", "default", "a.gguf", "--quiet").status == 0
    words = ("--transformer", "a.gguf", "--steps", 1, "--quiet", "-o", "a.png")
    assert zimage("generate", "red circle", "--model", "default", *words).status == 0
    assert read_metadata("a.png").settings["width"] == 80


@pytest.mark.parametrize("words", [(), ("bogus",), ("inspect",), ("inspect", "--bogus", "x"), ("\x1b[31m",)])
def test_a_wrong_command_is_one_line_and_status_2(zimage, words):
    outcome = zimage(*words)
    assert outcome.status == 2
    assert "\x1b" not in outcome.error


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (BadFile("a.gguf", "is cut"), 1, "a.gguf: is cut"),
        (PermissionError(13, "Permission denied", "x\ny"), 1, "x\\ny: permission denied"),
        (MemoryError(), 1, "not enough memory"),
        (KeyError("k\x1b"), 1, "internal error, KeyError"),
    ],
)
def test_every_error_is_one_line(zimage, monkeypatch, raised, status, said):
    def fail(*args, **kwargs):
        raise raised

    monkeypatch.setattr(inspect, "inspect_file", fail)
    outcome = zimage("inspect", "x")
    assert outcome.status == status
    assert said in outcome.error
    assert "\x1b" not in outcome.error
    shown = zimage("inspect", "x", "--debug").err
    assert "Traceback" in shown
    assert said in shown.splitlines()[-1]


def test_a_closed_pipe_is_silent(model):
    process = start("inspect", "--tensors", *[model] * 200)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 1
    assert process.stderr.read() == ""


def test_a_terminal_without_unicode_is_no_error(model):
    process = start("inspect", model / "vae" / "圆.gguf", PYTHONIOENCODING="ascii")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.startswith("error: ")
    assert "Traceback" not in err


def stopped(number: signal.Signals, delay: float, model, folder) -> None:
    """Stop a long run after `delay` and hold it to its promises."""
    words = (
        "generate",
        "--prompts",
        folder.parent / "prompts",
        "--model",
        model,
        "-W",
        32,
        "-H",
        32,
        "-o",
        folder,
    )
    process = start(*words, code=READY)
    assert process.stderr.readline() == "ready\n"
    time.sleep(delay)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)  # the run itself would take longer
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    for path in folder.iterdir():
        assert path.suffix == ".png", f"{path.name} was left"
        read_metadata(path)  # whole


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "prompts").write_text("a red circle\n" * 10_000)
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("number", "delay"),
    [(n, d) for n in (signal.SIGINT, signal.SIGTERM) for d in (0.0, 0.5, 3.0)] + [(signal.SIGHUP, 3.0)],
)
def test_a_stopped_run_ends_at_once_and_leaves_whole_images(number, delay, model, folder):
    stopped(number, delay, model, folder)


def test_a_signal_in_the_middle_of_an_import_ends_it_as_well():
    """Then the module that removes unfinished files exists without its functions."""
    code = (
        "import os, sys, types, zimage_core.cli.main as m; m._handle_signals(); "
        "sys.modules['zimage_core.files.atomic'] = types.ModuleType('atomic'); os.kill(os.getpid(), 15)"
    )
    process = start(code=code)
    assert (process.wait(120), process.stderr.read()) == (143, "")


def test_nohup_stays_without_effect():
    code = (
        "import os, signal, zimage_core.cli.main as m; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
        "m._handle_signals(); os.kill(os.getpid(), signal.SIGHUP); print('alive')"
    )
    process = start(code=code)
    assert (process.communicate(timeout=120)[0], process.returncode) == ("alive\n", 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_a_run_can_be_stopped_at_any_time(seed, model, folder):
    draw = random.Random(seed)
    stopped(draw.choice([signal.SIGINT, signal.SIGTERM]), draw.uniform(0, 5), model, folder)


@pytest.mark.parametrize(
    ("words", "closed"),
    [("plan", "0<&-"), ("plan", "1>&-"), ("plan", "2>&-"), ("doctor", "0<&- 1>&- 2>&-")],
)
def test_closed_streams_are_no_fault(tmp_path, words, closed):
    """As cron and daemons start programs."""
    command = f'"{sys.executable}" -m zimage_core {words} {closed}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
